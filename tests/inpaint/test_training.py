"""Inpainting by the programs: training, resuming, evaluation and pictures on the shapes images."""

import json
import shutil

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.utils.events import EventStorage
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from carafe_d2 import engine, train_net
from carafe_d2.config import load_config
from carafe_d2.inference import Predictor, read_image
from tools import predict, visualize

CONFIGS = {
    model: f"shapes_inpaint_{model}_carafe.yaml" for model in ("global_local", "partial_conv")
}
GLOBAL_LOCAL = CONFIGS["global_local"]
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.INPAINT.CROP_SIZE", "32", "MODEL.INPAINT.LOCAL_SIZE", "16"),
    *("MODEL.INPAINT.HOLE_SIZE", "(8,12)", "MODEL.INPAINT.CHANNELS", "4"),
    *("MODEL.INPAINT.NUM_LEVELS", "4", "MODEL.CARAFE.COMPRESSED_CHANNELS", "8"),
    *("MODEL.INPAINT.COMPLETION_ITERS", "1", "MODEL.INPAINT.DISCRIMINATOR_ITERS", "1"),
    *("INPUT.MIN_SIZE_TRAIN", "(32,48)", "INPUT.MIN_SIZE_TEST", "40"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "4"),
]


@pytest.fixture(scope="module", autouse=True)
def datasets(register_shapes):
    register_shapes(train=4, val=3)


def train(config, folder, *options):
    train_net.run(["--config-file", config, *options, *SMALL, "OUTPUT_DIR", str(folder)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Of each model the output folder of a finished training of six iterations."""
    folders = {}
    for model, config in CONFIGS.items():
        folders[model] = tmp_path_factory.mktemp(model)
        train(config, folders[model])
    return folders


def metrics_of(folder):
    metrics = {}
    for line in (folder / "metrics.json").open():
        metrics.update(json.loads(line))
    return metrics


def evaluated(metrics):
    return {name: value for name, value in metrics.items() if name.startswith("inpainting/")}


@pytest.mark.parametrize("model", CONFIGS)
def test_training_ends_with_an_evaluation(model, trained):
    metrics = metrics_of(trained[model])
    assert 0 < metrics["inpainting/L1"] < 50 and 5 < metrics["inpainting/PSNR"] < 40
    losses = {name for name in metrics if name.startswith("loss_")}
    assert (
        losses
        == {
            "global_local": {"loss_discriminators", "loss_hole", "loss_adversarial"},
            "partial_conv": {"loss_valid", "loss_hole", "loss_tv"},
        }[model]
    )


@pytest.mark.parametrize("model", CONFIGS)
def test_resumed_training_gives_the_same_weights_and_optimizer(model, trained, tmp_path):
    shutil.copy(trained[model] / "model_0000003.pth", tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    train(CONFIGS[model], tmp_path, "--resume")
    ours, theirs = (
        torch.load(folder / "model_final.pth", weights_only=True)
        for folder in (tmp_path, trained[model])
    )
    assert ours["iteration"] == theirs["iteration"] == 5
    for key, weight in theirs["model"].items():
        assert torch.equal(ours["model"][key], weight), key
    ours, theirs = (each["trainer"]["_trainer"]["optimizer"]["state"] for each in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for parameter, state in theirs.items():
        assert all(torch.equal(ours[parameter][key], value) for key, value in state.items())
    assert evaluated(metrics_of(tmp_path)) == evaluated(metrics_of(trained[model]))


def test_each_part_has_taken_its_own_steps(trained):
    """As by an optimizer for each: of six iterations, one was the completion network's alone and
    the next the discriminators'."""
    checkpoint = torch.load(trained["global_local"] / "model_final.pth", weights_only=True)
    model = train_net.Trainer.build_model(load_config(GLOBAL_LOCAL, SMALL))
    optimizer = checkpoint["trainer"]["_trainer"]["optimizer"]
    parameters = [i for group in optimizer["param_groups"] for i in group["params"]]
    built = train_net.Trainer.build_optimizer(load_config(GLOBAL_LOCAL, SMALL), model)
    in_order = [p for group in built.param_groups for p in group["params"]]
    names = {id(p): name.split(".")[0] for name, p in model.named_parameters()}
    steps = {"completion": set(), "discriminators": set()}
    for i, parameter in zip(parameters, in_order, strict=True):
        steps[names[id(parameter)]].add(int(optimizer["state"][i]["step"]))
    assert steps == {"completion": {1 + 4}, "discriminators": {1 + 4}}


def test_parts_get_the_same_steps_in_a_group_of_processes(tmp_path):
    """A group of one, whose wrapper looks in each turn for the parameters without a gradient."""
    cfg = load_config(GLOBAL_LOCAL, SMALL)
    weights = []
    for wrap in (lambda model, **_: model, DistributedDataParallel):
        store = distributed.FileStore(str(tmp_path / f"store{len(weights)}"), 1)
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            torch.manual_seed(0)
            model = train_net.Trainer.build_model(cfg)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(engine, "create_ddp_model", wrap)
                trainer = engine.build_trainer(
                    model,
                    train_net.Trainer.build_train_loader(cfg),
                    train_net.Trainer.build_optimizer(cfg, model),
                    amp=False,
                )
            with EventStorage():
                for trainer.iter in range(4):
                    trainer.run_step()
        finally:
            distributed.destroy_process_group()
        weights.append(model.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight)


def test_programs_draw_hole_result_and_truth(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = [*SMALL, "MODEL.WEIGHTS", str(trained["global_local"] / "model_final.pth")]
    image = DatasetCatalog.get("shapes_images_val")[0]["file_name"]
    (given,) = Predictor(load_config(GLOBAL_LOCAL, keys))([read_image(image)])
    assert given.masked.shape == given.inpainted.shape == given.truth.shape == (32, 32, 3)
    hole = (given.masked != given.truth).any(axis=2)
    assert 8 * 8 * 0.9 <= hole.sum() <= 12 * 12 and (given.masked[hole] == 127).all()
    assert (given.inpainted == given.truth)[~hole].all()
    weights = torch.load(trained["global_local"] / "model_final.pth", weights_only=True)["model"]
    torch.save({"model": weights}, "plain.pth")
    cfg = load_config(
        GLOBAL_LOCAL, [*SMALL, "MODEL.WEIGHTS", "plain.pth", "INPUT.FORMAT", "BGR"]
    )
    (swapped,) = Predictor(cfg)([read_image(image)])
    assert (swapped.truth == given.truth).all()

    predict.main(["--config-file", GLOBAL_LOCAL, "--input", image, "--output", "out", *keys])
    drawn = read_image("out/000000.png")
    for i, picture in enumerate(given):
        assert (drawn[:32, i * (32 + 24) :][:, :32] == picture).all()
    options = ["--images", "2", "--columns", "1", "--width", "50", "--output", "sheet.png"]
    visualize.main(["--config-file", GLOBAL_LOCAL, *options, *keys])
    assert read_image("sheet.png").shape == (2 * (28 + 58 + 8), 3 * (50 + 24) - 24, 3)


def test_checkpoint_is_evaluated_to_what_its_training_found(trained, tmp_path):
    weights = ["MODEL.WEIGHTS", str(trained["partial_conv"] / "model_final.pth")]
    train(CONFIGS["partial_conv"], tmp_path, "--eval-only", *weights)
    assert evaluated(metrics_of(trained["partial_conv"])) == results_in(tmp_path / "log.txt")


def results_in(log):
    (line,) = [line for line in log.read_text().splitlines() if line.endswith("L1,PSNR")]
    del line
    values = log.read_text().split("copypaste: L1,PSNR\n")[1].split("copypaste: ")[1].split("\n")[0]
    return values


# --- data ---------------------------------------------------------------------------------------
