"""The command lines of train_net.py and tools/lazyconfig_train_net.py, on a small dataset and a
small model. tests/test_distributed.py trains by them in several processes."""

import functools
import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPTS = {".yaml": ROOT / "train_net.py", ".py": ROOT / "tools" / "lazyconfig_train_net.py"}
YAML, LAZY = "shapes_mask_rcnn_R18_FPN_carafe.yaml", "lazy/shapes_mask_rcnn_R18_FPN_carafe.py"
SMALL = [
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "20", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "12", "SOLVER.STEPS", "(10,)"),
    *("SOLVER.CHECKPOINT_PERIOD", "4", "SOLVER.BASE_LR", "0.001"),
]


@pytest.fixture(scope="module")
def datasets(make_shapes):
    return make_shapes(train=12, val=4)


def command_line(config, *arguments):
    """Script and arguments that train by a config of this project, as a YAML or a LazyConfig."""
    script = SCRIPTS[Path(config).suffix]
    return [str(a) for a in (script, "--config-file", ROOT / "configs" / config, *arguments)]


@pytest.fixture(scope="module")
def start(start_program, datasets):
    """Starts a script with its arguments, where the small dataset is."""
    return functools.partial(start_program, DETECTRON2_DATASETS=str(datasets))


def average_precisions(output):
    """The last evaluation in a log: box AP and mask AP."""
    tables = re.findall(r"Evaluation results for (bbox|segm): \n.*\n.*\n\|\s*([\d.]+|nan)", output)
    return dict(tables[-2:])


def detections(folder):
    """All that the last evaluation found, with scores and masks."""
    return json.loads((folder / "inference" / "coco_instances_results.json").read_text())


@pytest.fixture(scope="module")
def trained(start, tmp_path_factory):
    """A finished training: its output folder and its log."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, start(*command_line(YAML, *SMALL, "OUTPUT_DIR", folder)).finish()


def test_training_ends_with_evaluation_of_boxes_and_masks(trained):
    folder, output = trained
    assert set(average_precisions(output)) == {"bbox", "segm"}
    assert (folder / "model_final.pth").is_file()
    assert detections(folder)
    metrics = {}
    for line in (folder / "metrics.json").open():
        metrics.update(json.loads(line))
    assert {"loss_mask", "loss_cls", "bbox/AP", "segm/AP"} <= metrics.keys()


def test_cpu_is_announced_once(trained):
    expected = 0 if torch.cuda.is_available() else 1
    assert trained[1].count("No GPU found: running on the CPU") == expected


@pytest.mark.slow
def test_killed_training_resumes_to_the_same_result(start, trained, tmp_path):
    arguments = command_line(YAML, *SMALL, "OUTPUT_DIR", tmp_path)
    training = start(*arguments)
    last_checkpoint = tmp_path / "last_checkpoint"
    while training.process.is_alive() and not (
        last_checkpoint.exists() and last_checkpoint.read_text() >= "model_0000003.pth"
    ):
        time.sleep(0.02)
    training.process.kill()
    training.finish(-signal.SIGKILL)
    assert not (tmp_path / "model_final.pth").exists(), "finished before it was killed"

    output = start(*arguments[:1], "--resume", *arguments[1:]).finish()
    resumed_at = int(re.search(r"Starting training from iteration (\d+)", output)[1])
    assert 4 <= resumed_at < 12
    assert detections(tmp_path) == detections(trained[0])
    ours, theirs = (
        torch.load(folder / "model_final.pth", weights_only=True)
        for folder in (tmp_path, trained[0])
    )
    assert ours["iteration"] == theirs["iteration"] == 11
    for key, weight in theirs["model"].items():
        assert torch.equal(ours["model"][key], weight), key


def test_evaluation_only_gives_the_results_of_the_training_and_verifies_them(
    start, trained, tmp_path
):
    folder, output = trained
    keys = [
        *("MODEL.WEIGHTS", folder / "model_final.pth", "OUTPUT_DIR", tmp_path),
        *("TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 99.0, 0.5]]"),
    ]
    evaluated = start(*command_line(YAML, "--eval-only", *SMALL, *keys)).finish(1)
    assert "Result verification failed" in evaluated
    assert average_precisions(evaluated) == average_precisions(output)
    assert detections(tmp_path) == detections(folder)


def test_evaluation_by_lazy_config_gives_the_results_of_the_training(start, trained, tmp_path):
    folder, output = trained
    keys = [
        "dataloader.test.mapper.augmentations.0.short_edge_length=64",
        "model.proposal_generator.post_nms_topk=[20,20]",
        "model.roi_heads.box_predictor.test_score_thresh=0.0",
        f"train.init_checkpoint={folder / 'model_final.pth'}",
        f"train.output_dir={tmp_path}",
    ]
    evaluated = start(*command_line(LAZY, "--eval-only", *keys)).finish()
    assert average_precisions(evaluated) == average_precisions(output)
    assert detections(tmp_path) == detections(folder)


# Arguments, and what the one line of the error has to say.
COCO = "mask_rcnn_R50_FPN_carafe_1x.yaml"
MISTAKES = [
    (YAML, ["--config-file", "absent.yaml"], r"config file 'absent\.yaml' does not exist"),
    (YAML, ["MODEL.NONSENSE", "1"], r"Non-existent (config )?key: MODEL\.NONSENSE"),
    (YAML, ["MODEL.WEIGHTS", "absent.pth"], r"weights absent\.pth do not exist.*MODEL\.WEIGHTS"),
    (YAML, ["MODEL.FPN.UPSAMPLE", "lanczos"], r"MODEL\.FPN\.UPSAMPLE must be one of .*'lanczos'"),
    (YAML, ["MODEL.CARAFE.UP_GROUP", "5"], r"MODEL\.CARAFE\.UP_GROUP = 5 must divide the 64"),
    (YAML, ["SOLVER.OPTIMIZER", "Adam"], r"SOLVER\.OPTIMIZER must be SGD or AdamW, got 'Adam'"),
    (YAML, ["DATASETS.TRAIN", "('nonsense',)"], r"dataset 'nonsense' .* is not registered"),
    (YAML, ["--num-gpus", "99"], r"--num-gpus 99"),
    (COCO, [], r"/coco/annotations/instances_train2017\.json does not exist.*DETECTRON2_DATASETS"),
    (LAZY, ["--config-file", "absent.py"], r"config file 'absent\.py' does not exist"),
    (LAZY, ["train.max_itr=1"], r"no key 'train\.max_itr'"),
    (LAZY, ["dataloader.train.dataset.names=nonsense"], r"dataset 'nonsense' .* not registered"),
    (LAZY, ["train.init_checkpoint=absent.pth"], r"weights absent\.pth do not exist"),
]


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    MISTAKES,
    ids=[" ".join(arguments) or config for config, arguments, _ in MISTAKES],
)
def test_mistakes_get_one_clear_line(start, tmp_path, config, arguments, message):
    folder = [f"train.output_dir={tmp_path}"] if config == LAZY else ["OUTPUT_DIR", tmp_path]
    output = start(*command_line(config, *arguments, *folder)).finish(1)
    assert re.search(f"^error: .*{message}", output, re.MULTILINE), output
    assert "Traceback" not in output


def test_image_that_does_not_decode_is_named(start, datasets, tmp_path):
    shutil.copytree(datasets / "shapes", tmp_path / "shapes")
    for image in (tmp_path / "shapes" / "train").iterdir():
        image.write_bytes(image.read_bytes()[:100])
    # From a worker process the error comes with that one's traceback, which has to go.
    keys = ["DATALOADER.NUM_WORKERS", "1", "OUTPUT_DIR", tmp_path / "out"]
    training = start(*command_line(YAML, *SMALL, *keys), DETECTRON2_DATASETS=str(tmp_path))
    output = training.finish(1)
    assert re.search(r"^error: .*cannot read image .*shapes/train/\d+\.png", output, re.MULTILINE)
    assert "Traceback" not in output
