"""Training and evaluation in two processes that torchrun starts, over gloo on the CPU."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from detectron2.utils import comm
from torch import nn
from torch.multiprocessing import ProcessExitedException

from carafe_d2 import engine
from carafe_d2.errors import UserError

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "shapes_mask_rcnn_R18_FPN_carafe.yaml"
LAZY_CONFIG = ROOT / "configs" / "lazy" / "shapes_mask_rcnn_R18_FPN_carafe.py"

# Whatever the processes share out among them, the losses of one process with the whole batch are
# the mean of theirs with their parts only if nothing is sampled at random, if every image counts
# alike, and if the statistics of normalization do not cross images. So all anchors take part in the
# proposal network's losses, all become RoIs, and all RoIs are positive, for in `whole_image_boxes`
# the one object of an image covers it all; group normalization takes the place of the batch's.
EVERYTHING_COUNTS = [
    *("MODEL.RESNETS.NORM", "GN", "MODEL.FPN.NORM", "", "MODEL.FPN.OUT_CHANNELS", "16"),
    *("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[1.0]]", "MODEL.RPN.NMS_THRESH", "1.0"),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "1000", "MODEL.RPN.POSITIVE_FRACTION", "1.0"),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", "1000", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "1000"),
    *("MODEL.ROI_HEADS.IOU_THRESHOLDS", "[0.0001]", "MODEL.ROI_HEADS.POSITIVE_FRACTION", "1.0"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "1000", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16"),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", "1", "MODEL.CARAFE.COMPRESSED_CHANNELS", "16"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
    # The momentum after the first step of SGD without weight decay is the gradient.
    *("SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", "0.01", "SOLVER.WEIGHT_DECAY", "0.0"),
    *("SOLVER.WARMUP_FACTOR", "1.0"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2", "SOLVER.CHECKPOINT_PERIOD", "1"),
]
# The quick start, small and short. Batch normalization needs two images in each process.
SMALL = [
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "20", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
    *("SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "9", "SOLVER.WARMUP_ITERS", "9"),
    *("SOLVER.CHECKPOINT_PERIOD", "3", "SOLVER.BASE_LR", "0.001"),
]
LAZY_SMALL = [
    *("dataloader.train.mapper.augmentations.0.short_edge_length=[64]",),
    *("dataloader.test.mapper.augmentations.0.short_edge_length=64",),
    *("model.proposal_generator.post_nms_topk=[20,20]", "model.roi_heads.batch_size_per_image=8"),
    *("model.roi_heads.box_predictor.test_score_thresh=0.0", "dataloader.train.total_batch_size=4"),
    *("train.max_iter=9", "lr_multiplier.warmup_length=1.0"),
    *("train.checkpointer.period=3", "optimizer.lr=0.001"),
]


def start(*arguments, datasets, processes=2, max_restarts=0, script="train_net.py"):
    """Starts a training script; one process without torchrun, more with it."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(processes), "--max-restarts", str(max_restarts)]
    return subprocess.Popen(
        [*launcher, str(ROOT / script), *map(str, arguments)],
        env={
            **os.environ,
            "DETECTRON2_DATASETS": str(datasets),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, returncode=0):
    output, _ = process.communicate()
    assert process.returncode == returncode, output[-5000:]
    return output


def detections(folder):
    """All that the last evaluation found, with scores and masks."""
    return json.loads((folder / "inference" / "coco_instances_results.json").read_text())


def checkpoint(folder, name="model_final"):
    return torch.load(folder / f"{name}.pth", weights_only=True)


@pytest.fixture(scope="module")
def datasets(make_shapes):
    return make_shapes(train=12, val=5)


@pytest.fixture(scope="module")
def whole_image_boxes(tmp_path_factory, datasets):
    """The same images, each with one object whose box is that of the image."""
    root = tmp_path_factory.mktemp("whole_image_boxes")
    for folder in ("train", "val"):
        (root / "shapes" / folder).parent.mkdir(exist_ok=True)
        (root / "shapes" / folder).symlink_to(datasets / "shapes" / folder)
    (root / "shapes" / "annotations").mkdir()
    for file in (datasets / "shapes" / "annotations").iterdir():
        content = json.loads(file.read_text())
        content["annotations"] = [
            {
                "id": i,
                "image_id": image["id"],
                "category_id": 1 + i % 6,
                "bbox": [0, 0, 64, 64],
                "segmentation": [[0, 4 * i, 64, 0, 64 - 3 * i, 64, 2 * i, 60]],
                "area": 64 * 64,
                "iscrowd": 0,
            }
            for i, image in enumerate(content["images"], start=1)
        ]
        (root / "shapes" / "annotations" / file.name).write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def one_and_two(whole_image_boxes, tmp_path_factory):
    """Folders of the same training in one process and in two."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one_process", "two_processes")]
    for processes, folder in enumerate(folders, start=1):
        keys = [*EVERYTHING_COUNTS, "OUTPUT_DIR", folder]
        arguments = ["--config-file", CONFIG, *keys]
        finish(start(*arguments, datasets=whole_image_boxes, processes=processes))
    return folders


def assert_close(tensors, others, tolerance):
    """Compares tensors of two dicts, each relative to the largest number in it."""
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        error = (tensor - others[name]).abs().max() / tensor.abs().max().clamp(min=1e-30)
        assert error <= tolerance, (name, error)


@pytest.mark.slow
def test_gradients_are_those_of_one_process(one_and_two):
    """After one iteration. The sums over images and RoIs have other orders, hence the tolerance;
    measured are differences of 5e-5 at most. A sum in place of the mean would be off by 1."""
    states = (
        checkpoint(folder, "model_0000000")["trainer"]["_trainer"]["optimizer"]["state"]
        for folder in one_and_two
    )
    one, two = ({i: s["momentum_buffer"] for i, s in state.items()} for state in states)
    assert all(gradient.abs().max() > 0 for gradient in one.values())
    assert_close(one, two, 5e-4)


@pytest.mark.slow
def test_training_is_that_of_one_process(one_and_two):
    """Weights after two iterations, as far as they have moved, and the last losses logged."""
    moved = []
    for folder in one_and_two:
        first, final = (
            checkpoint(folder, name)["model"] for name in ("model_0000000", "model_final")
        )
        moved.append({name: final[name] - first[name] for name in first})
    assert_close(*moved, 1e-2)

    one, two = (json.loads((folder / "metrics.json").open().readline()) for folder in one_and_two)
    losses = [name for name in one if "loss" in name]
    assert {"loss_mask", "loss_rpn_loc", "total_loss"} <= set(losses)
    for name in losses:
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
    assert two["iteration"] == 1


@pytest.fixture(scope="module")
def uninterrupted(datasets, tmp_path_factory):
    """A finished training of the small quick start in two processes: its folder and its log."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    arguments = ["--config-file", CONFIG, *SMALL, "OUTPUT_DIR", folder]
    return folder, finish(start(*arguments, datasets=datasets))


@pytest.mark.slow
def test_rank_0_speaks_for_all(uninterrupted):
    folder, output = uninterrupted
    assert output.count("No GPU found: running on the CPU") == 1
    assert output.count("Starting training from iteration 0") == 1
    assert output.count("Evaluation results for segm") == 1
    files = {path.name for path in folder.iterdir() if "tfevents" not in path.name}
    checkpoints = {f"model_{i}.pth" for i in ("0000002", "0000005", "0000008", "final")}
    # Detectron2 gives every rank a log of its own.
    logs = {"log.txt", "log.txt.rank1", "metrics.json", "config.yaml", "inference"}
    assert files == {*checkpoints, *logs, "last_checkpoint"}
    assert len(list(folder.glob("*tfevents*"))) == 1


@pytest.mark.slow
def test_evaluation_is_that_of_one_process(uninterrupted, datasets, tmp_path):
    """An image is evaluated by itself in either case, so the results are the same to the bit. Each
    process has batch statistics of its own; the evaluated ones are those saved, of rank 0."""
    folder, _ = uninterrupted
    keys = [*SMALL, "MODEL.WEIGHTS", folder / "model_final.pth", "OUTPUT_DIR", tmp_path]
    arguments = ["--eval-only", "--config-file", CONFIG, *keys]
    finish(start(*arguments, datasets=datasets, processes=1))
    assert len({d["image_id"] for d in detections(folder)}) == 5
    assert detections(tmp_path) == detections(folder)


def worker(torchrun, rank):
    """The process id of one of the workers that a torchrun has started."""
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            return int(child)
    raise AssertionError(f"no worker of rank {rank} among {children}")


@pytest.mark.slow
def test_killed_worker_is_restarted_and_nothing_is_lost(uninterrupted, datasets, tmp_path):
    """The same training by the LazyConfig, whose rank 0 is killed after the first checkpoint."""
    last_checkpoint = tmp_path / "last_checkpoint"
    # What an earlier training left is not what a restart goes on from.
    last_checkpoint.write_text("model_of_earlier_training.pth")
    arguments = ["--config-file", LAZY_CONFIG, *LAZY_SMALL, f"train.output_dir={tmp_path}"]
    script = "tools/lazyconfig_train_net.py"
    process = start(*arguments, datasets=datasets, script=script, max_restarts=1)
    while process.poll() is None:
        if last_checkpoint.exists() and last_checkpoint.read_text().startswith("model_0"):
            os.kill(worker(process, rank=0), signal.SIGKILL)
            break
        time.sleep(0.02)
    assert not (tmp_path / "model_final.pth").exists(), "finished before it was killed"

    output = finish(process)
    first, second = map(int, re.findall(r"Starting training from iteration (\d+)", output))
    assert first == 0
    assert second in (3, 6)
    ours, theirs = (checkpoint(folder)["model"] for folder in (tmp_path, uninterrupted[0]))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name
    assert detections(tmp_path) == detections(uninterrupted[0])


@pytest.mark.slow
def test_batch_that_cannot_be_shared_is_one_line(datasets, tmp_path):
    arguments = ["--config-file", CONFIG, "SOLVER.IMS_PER_BATCH", "3", "OUTPUT_DIR", tmp_path]
    output = finish(start(*arguments, datasets=datasets), returncode=1)
    errors = re.findall("^error: .*", output, re.MULTILINE)
    assert len(errors) == 1
    assert re.search(r"batch of 3 images .* 2 processes: SOLVER\.IMS_PER_BATCH", errors[0])
    # Behind it torchrun reports, with a traceback of its own, that its workers failed.
    assert "Traceback" not in output.split("torch/distributed/elastic")[0]


# --- in this process ----------------------------------------------------------------------------


def test_processes_that_start_again_leave_the_store_of_those_before(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    shared = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for start in range(3):  # at the second the first one's port is still there, but not its store

        def join(rank):
            client = torch.distributed.TCPStore("127.0.0.1", shared.port, is_master=False)
            return engine._store_of_this_start(client, rank)

        with ThreadPoolExecutor(3) as pool:
            stores = list(pool.map(join, [2, 1, 0]))
        assert not any(store.check(["key"]) for store in stores)
        stores[0].set("key", str(start))
        assert all(store.get("key") == str(start).encode() for store in stores)
        del stores


def arguments(**options):
    defaults = {"num_gpus": 1, "num_machines": 1, "machine_rank": 0, "dist_url": "auto"}
    return argparse.Namespace(**{**defaults, **options})


def never(args):
    raise AssertionError("started")


@pytest.mark.parametrize(
    ("by_torchrun", "num_gpus", "message"),
    [
        (True, 1, "2 processes on this machine, but it has 1 GPUs"),
        (True, 2, ".*2 processes .* --num-gpus"),
        (False, 2, "--num-gpus 2, but this machine has 1"),
    ],
)
def test_wrong_number_of_processes_is_one_line(monkeypatch, by_torchrun, num_gpus, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    if by_torchrun:
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, "0")
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.setenv(name, "2")
    with pytest.raises(SystemExit, match=f"error: {message}"):
        engine.launch(never, arguments(num_gpus=num_gpus))


def test_mistake_that_a_process_has_reported_is_not_reported_again(monkeypatch):
    def launch_on_gpus(*args, **kwargs):
        raise ProcessExitedException("exited", 0, error_pid=1, exit_code=exit_code)

    monkeypatch.setattr(engine, "launch_on_gpus", launch_on_gpus)
    exit_code = 1
    with pytest.raises(SystemExit) as exit:
        engine.launch(never, arguments())
    assert exit.value.code == 1
    exit_code = -11
    with pytest.raises(ProcessExitedException):
        engine.launch(never, arguments())


def test_models_on_the_cpu_do_not_train_over_nccl(monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):
        engine.build_trainer(nn.Linear(1, 1), [], None, amp=False)


def test_machines_without_a_common_output_folder_are_told(monkeypatch, tmp_path):
    trainer = argparse.Namespace(model=nn.Linear(1, 1), data_loader=[], state_dict=dict)
    checkpointer = engine.build_checkpointer(trainer, str(tmp_path))
    monkeypatch.setattr(comm, "all_gather", lambda start_iter: [12, start_iter])
    with pytest.raises(UserError, match=r"iterations \[0, 12\].*must be on a file system"):
        engine.resume_or_load(checkpointer, trainer, "", resume=True)
