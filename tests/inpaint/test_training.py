"""Inpainting by the programs: training, resuming, evaluation and pictures on the shapes images."""

import contextlib
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.events import EventStorage
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from carafe_d2 import engine, train_net
from carafe_d2.config import load_config
from carafe_d2.data.register import register_datasets
from carafe_d2.errors import UserError
from carafe_d2.inference import Predictor, read_image
from carafe_d2.inpaint.data import InpaintMapper, irregular, rectangle
from carafe_d2.inpaint.evaluation import InpaintingEvaluator
from tools import analyze_model, predict, visualize

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


def train(config, folder, *flags, options=()):
    keys = [*SMALL, "OUTPUT_DIR", str(folder), *options]
    train_net.run(["--config-file", config, *flags, *keys])


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
    cfg = load_config(GLOBAL_LOCAL, [*SMALL, "MODEL.WEIGHTS", "plain.pth", "INPUT.FORMAT", "BGR"])
    (swapped,) = Predictor(cfg)([read_image(image)])
    assert (swapped.truth == given.truth).all()

    predict.main(["--config-file", GLOBAL_LOCAL, "--input", image, "--output", "out", *keys])
    drawn = read_image("out/000000.png")
    for i, picture in enumerate(given):
        assert (drawn[:32, i * (32 + 24) :][:, :32] == picture).all()
    options = ["--images", "2", "--columns", "1", "--width", "50", "--output", "sheet.png"]
    visualize.main(["--config-file", GLOBAL_LOCAL, *options, *keys])
    assert read_image("sheet.png").shape == (2 * (28 + 58 + 8), 3 * (50 + 24) - 24, 3)


@pytest.mark.parametrize("model", CONFIGS)
def test_evaluation_alone_finds_what_the_training_found(model, trained, tmp_path):
    found = evaluated(metrics_of(trained[model]))
    for deviation in (0.0, 1.0):
        expected = [["inpainting", "PSNR", found["inpainting/PSNR"] + deviation, 0.001]]
        keys = ["MODEL.WEIGHTS", str(trained[model] / "model_final.pth")]
        keys += ["TEST.EXPECTED_RESULTS", str(expected)]
        with pytest.raises(SystemExit) if deviation else contextlib.nullcontext():
            train(CONFIGS[model], tmp_path, "--eval-only", options=keys)


def test_analyze_model_counts_the_model_in_its_own_size(capsys):
    options = ["--tasks", "flop", "parameter"]
    analyze_model.main(["--config-file", CONFIGS["partial_conv"], *options, *SMALL])
    output = capsys.readouterr().out
    model = train_net.Trainer.build_model(load_config(CONFIGS["partial_conv"], SMALL))
    parameters = sum(p.numel() for p in model.parameters())
    assert f"parameters: {parameters / 1e6:.2f} M" in output
    assert re.search(r"decoder +\| [\d.]+K +\| \d\.\d+M +\|", output)


# --- data ---------------------------------------------------------------------------------------


def test_metrics_are_means_over_images():
    evaluator = InpaintingEvaluator()
    truth = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    for count in (1, 4):
        output = truth.float()
        output[:, 0, :count] += 51
        evaluator.process([{"image": truth}], [{"inpainted": output}])
    result = evaluator.evaluate()["inpainting"]
    assert result["L1"] == pytest.approx(100 * 0.2 * (1 / 16 + 4 / 16) / 2)
    psnr = [-10 * math.log10(0.2**2 * share) for share in (1 / 16, 4 / 16)]
    assert result["PSNR"] == pytest.approx(sum(psnr) / 2)
    evaluator.reset()
    evaluator.process([{"image": truth}], [{"inpainted": truth}])
    assert evaluator.evaluate()["inpainting"] == {"L1": 0.0, "PSNR": math.inf}


@pytest.mark.parametrize("size", [32, 200])
def test_holes_are_of_the_sizes_that_are_asked_for(size):
    rng = np.random.default_rng(0)
    rectangles, shares = set(), []
    for _ in range(40):
        hole = rectangle(rng, size, (size // 4, size // 2))
        rows, columns = hole.any(1).sum(), hole.any(0).sum()
        assert hole.sum() == rows * columns
        rectangles |= {rows, columns}
        shares.append(irregular(rng, size).mean())
    assert size // 4 <= min(rectangles) < max(rectangles) <= size // 2
    assert 0.05 <= min(shares) < 0.15 and 0.4 < max(shares) < 0.65


def test_holes_differ_in_training_and_stay_in_evaluations():
    cfg = load_config(GLOBAL_LOCAL, SMALL)
    records = DatasetCatalog.get("shapes_images_val")
    training, evaluation = (InpaintMapper(cfg, is_train) for is_train in (True, False))
    first, again = ([evaluation(record) for record in records] for _ in range(2))
    for ours, theirs in zip(first, again, strict=True):
        assert torch.equal(ours["image"], theirs["image"])
        assert torch.equal(ours["mask"], theirs["mask"])
    assert not torch.equal(first[0]["mask"], first[1]["mask"])
    np.random.seed(0)
    seen = [training(records[0]) for _ in range(4)]
    for key in ("image", "mask"):
        assert len({each[key].numpy().tobytes() for each in seen}) == 4
        assert {each[key].shape[-2:] for each in seen} == {(32, 32)}


def test_middle_of_the_resized_image_is_evaluated():
    cfg = load_config(GLOBAL_LOCAL, [*SMALL, "INPUT.MIN_SIZE_TEST", "0"])
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    given = InpaintMapper(cfg, is_train=False).prepare(image, "it")
    assert (given["image"].numpy() == image[4:36, 9:41].transpose(2, 0, 1)).all()


# --- folders and mistakes -----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A folder with two images, one of them in a folder below it, and something else."""
    (tmp_path / "images" / "below").mkdir(parents=True)
    records = DatasetCatalog.get("shapes_images_val")
    shutil.copy(records[0]["file_name"], tmp_path / "images" / "a.png")
    shutil.copy(records[1]["file_name"], tmp_path / "images" / "below" / "b.PNG")
    (tmp_path / "images" / "notes.txt").touch()
    yield tmp_path / "images"
    for name in ("folder_of_a_test", "other_of_a_test"):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def of_folder(folder):
    name = "('folder_of_a_test',)"
    registered = f"('folder_of_a_test={folder}/',)"
    return ["DATASETS.REGISTER", registered, "DATASETS.TRAIN", name, "DATASETS.TEST", name]


def test_any_folder_of_images_is_a_dataset(folder, tmp_path):
    train(CONFIGS["partial_conv"], tmp_path / "out", options=of_folder(folder))
    assert "inpainting/PSNR" in metrics_of(tmp_path / "out")
    files = [record["file_name"] for record in DatasetCatalog.get("folder_of_a_test")]
    assert files == [str(folder / "a.png"), str(folder / "below" / "b.PNG")]
    register_datasets([f"folder_of_a_test={folder}"])  # once more is no mistake
    with pytest.raises(UserError, match="another dataset of this name"):
        register_datasets([f"folder_of_a_test={folder}/below"])


def error_of(config, folder, *options):
    with pytest.raises(SystemExit) as exit:
        train(config, folder, options=options)
    message = exit.value.code
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("MODEL.INPAINT.MASK circle", "MODEL.INPAINT.MASK must be one of rectangle, irregular"),
        ("MODEL.INPAINT.HOLE_SIZE (8,40)", "MODEL.INPAINT.HOLE_SIZE must be .* at most CROP_SIZE"),
        ("MODEL.INPAINT.HOLE_SIZE (8,)", "MODEL.INPAINT.HOLE_SIZE must be the least and"),
        ("MODEL.INPAINT.CROP_SIZE 30", "MODEL.INPAINT.CROP_SIZE must be a multiple of 4"),
        ("MODEL.INPAINT.UPSAMPLE lanczos", "MODEL.INPAINT.UPSAMPLE must be one of"),
        ("INPUT.MIN_SIZE_TEST 24", "it is fed in as 24 x 24 pixels, smaller than the 32 x 32"),
        ("DATASETS.TEST ('shapes_val',)", "'shapes_val': a GlobalLocalInpainter takes its images"),
        ("DATASETS.TRAIN ('places365_train',)", "places365/data_256 does not exist; unpack Places"),
        ("TEST.AUG.ENABLED True", "TEST.AUG.ENABLED"),
    ],
)
def test_mistakes_are_one_line(options, message, tmp_path):
    assert re.search(message, error_of(GLOBAL_LOCAL, tmp_path, *options.split()))


def test_folders_that_cannot_be_used_are_named(folder, tmp_path):
    data = of_folder(folder)
    bad = folder / "below" / "b.PNG"
    bad.write_bytes(bad.read_bytes()[:200])
    assert f"cannot read image {bad}" in error_of(GLOBAL_LOCAL, tmp_path, *data)
    detector = "shapes_mask_rcnn_R18_FPN_carafe.yaml"
    with pytest.raises(SystemExit, match="a GeneralizedRCNN takes annotated images"):
        train_net.run(["--config-file", detector, *data, "OUTPUT_DIR", str(tmp_path / "out")])
    bad.unlink()
    (folder / "a.png").unlink()
    assert f"there are no images in {folder}" in error_of(GLOBAL_LOCAL, tmp_path, *data)
    registered = f"('other_of_a_test={folder}/missing',)"
    message = error_of(GLOBAL_LOCAL, tmp_path, "DATASETS.REGISTER", registered)
    assert "NAME=IMAGES/" in message


def test_what_predict_cannot_do_is_named(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = [*SMALL, "MODEL.WEIGHTS", str(trained["global_local"] / "model_final.pth")]
    image = DatasetCatalog.get("shapes_images_val")[0]["file_name"]
    (tmp_path / "clip.mp4").touch()
    for options, message in (
        (["--input", image, "--json"], "leave out --webcam and --json"),
        (["--webcam"], "leave out --webcam and --json"),
        (["--input", "clip.mp4"], "--input names a video"),
        (["--input", image, "--output", "out", *keys, "INPUT.MIN_SIZE_TEST", "24"], "smaller than"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            predict.main(["--config-file", GLOBAL_LOCAL, *options])
