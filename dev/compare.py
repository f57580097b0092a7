#!/usr/bin/env python3
"""Compares upsamplers by training: box AP, mask AP and boundary AP, with their spread over seeds.

Every run is train_net.py with the same config, schedule and seeds; only the upsamplers of pyramid
and mask head differ. A stopped comparison goes on where it was when the command is repeated.

Examples:
    python dev/compare.py
    python dev/compare.py --methods nearest,carafe --seeds 5 --output output/compare_5
    python dev/compare.py --markdown docs/compare.md
"""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from carafe_d2.collect_env import describe_machine, machine_sentence
from carafe_d2.config import load_config
from carafe_d2.data.build import check_datasets
from carafe_d2.errors import UserError, exit_on_user_error
from carafe_d2.files import MarkdownBlock, format_table, write_file

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
QUICK_START = ROOT / "configs" / "shapes_mask_rcnn_R18_FPN_carafe.yaml"
# In a training this short, small steps on few images teach more than few steps on many; the rate
# follows the square root of the number of images, as suits AdamW.
SHORT_TRAINING = ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.001"]
# MODEL.FPN.UPSAMPLE, and the MODEL.ROI_MASK_HEAD.UPSAMPLE that goes with it. The mask head knows no
# pixel shuffle, so it keeps the stock deconvolution there.
METHODS = {
    "nearest": "nearest",
    "bilinear": "bilinear",
    "deconv": "deconv",
    "pixel_shuffle": "deconv",
    "carafe": "carafe",
}
METRICS = ("box AP", "mask AP", "boundary AP")
# Config keys that the comparison sets itself, and what sets them.
RESERVED = {
    "MODEL.FPN.UPSAMPLE": "--methods",
    "MODEL.ROI_MASK_HEAD.UPSAMPLE": "--methods",
    "SEED": "--seeds",
    "SOLVER.MAX_ITER": "--iterations",
    "OUTPUT_DIR": "--output",
}
BLOCK = "dev/compare.py --markdown writes this"


# --- boundary AP --------------------------------------------------------------------------------


def boundary(mask: np.ndarray, width: float = 0.02) -> np.ndarray:
    """The inner border of a mask: the pixels within a distance of the outside.

    Args:
        mask: uint8 (height, width) of 0 and 1. Outside of the image is background.
        width: the distance as a share of the image's diagonal; at least one pixel is taken.

    Returns:
        uint8 (height, width) of 0 and 1.
    """
    distance = max(1, round(width * math.hypot(*mask.shape)))
    square = np.ones((3, 3), np.uint8)
    inside = cv2.erode(
        mask, square, iterations=distance, borderType=cv2.BORDER_CONSTANT, borderValue=0
    )
    return mask - inside


class BoundaryEval(COCOeval):
    """COCO's mask AP with min(mask IoU, boundary IoU) in place of the IoU of masks.

    This is the Boundary AP of Cheng et al., "Boundary IoU" (CVPR 2021, arXiv 2103.16562).
    """

    def __init__(self, ground_truth: COCO, detections: COCO):
        super().__init__(ground_truth, detections, "segm")

    def computeIoU(self, imgId, catId):
        mask_ious = super().computeIoU(imgId, catId)
        if len(mask_ious) == 0:
            return mask_ious
        # Nothing reads the masks of this image and category after this: areas are kept apart.
        for annotation in [*self._gts[imgId, catId], *self._dts[imgId, catId]]:
            border = boundary(mask_util.decode(annotation["segmentation"]))
            annotation["segmentation"] = mask_util.encode(np.asfortranarray(border))
        return np.minimum(mask_ious, super().computeIoU(imgId, catId))


def boundary_ap(annotation_file: str | Path, detections: list[dict]) -> float:
    """Boundary AP in percent; nan without detections, as in Detectron2's evaluation.

    Args:
        annotation_file: ground truth, COCO JSON.
        detections: COCO results with `segmentation`, what Detectron2's evaluator saves.
    """
    if not detections:
        return math.nan
    # Without the boxes COCO takes an object's size from its mask, as Detectron2's evaluation does.
    detections = [{k: v for k, v in d.items() if k != "bbox"} for d in detections]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints at every step
        ground_truth = COCO(str(annotation_file))
        evaluation = BoundaryEval(ground_truth, ground_truth.loadRes(detections))
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ap = evaluation.stats[0]
    return 100 * float(ap) if ap >= 0 else math.nan


# --- one run ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A training with its evaluation.

    Attributes:
        method: a key of `METHODS`.
        seed: the config's SEED.
        folder: the config's OUTPUT_DIR; log, command and result are kept there too.
        command: the arguments of Python, train_net.py first.
    """

    method: str
    seed: int
    folder: Path
    command: list[str]

    def __str__(self):
        return f"{self.method}, seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.folder / "train.log"

    def result(self) -> dict | None:
        """What was measured, or None where the run has not finished."""
        try:
            return json.loads((self.folder / "result.json").read_text())
        except FileNotFoundError:
            return None


def make_runs(args: argparse.Namespace, cfg: CfgNode) -> list[Run]:
    """All runs of the comparison, seed by seed.

    Raises:
        UserError: a run was begun in the same folder with other settings.
    """
    # Warm-up and steps keep their place in the schedule.
    scale = args.iterations / cfg.SOLVER.MAX_ITER
    steps = tuple(round(step * scale) for step in cfg.SOLVER.STEPS)
    schedule = [
        *("SOLVER.MAX_ITER", str(args.iterations), "SOLVER.STEPS", str(steps)),
        *("SOLVER.WARMUP_ITERS", str(round(cfg.SOLVER.WARMUP_ITERS * scale))),
    ]
    runs = []
    for seed in range(1, args.seeds + 1):
        for method in args.methods:
            folder = args.output.absolute() / f"{method}_seed{seed}"
            command = [
                *("train_net.py", "--resume", "--config-file", str(args.config_file)),
                *("MODEL.FPN.UPSAMPLE", method, "MODEL.ROI_MASK_HEAD.UPSAMPLE", METHODS[method]),
                *(*args.opts, *schedule, "SEED", str(seed), "OUTPUT_DIR", str(folder)),
            ]
            runs.append(Run(method, seed, folder, command))
            begun = folder / "command.txt"
            if begun.exists() and begun.read_text() != shlex.join(["python", *command]):
                raise UserError(
                    f"{folder} holds a run with other settings; remove it or choose another folder "
                    "with --output"
                )
    return runs


def start(run: Run, threads: int | None) -> subprocess.Popen:
    """Starts a run, or goes on with one that was stopped; `threads` limits its CPU threads."""
    write_file(run.folder / "command.txt", shlex.join(["python", *run.command]))
    environment = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    script, *arguments = run.command
    command = [sys.executable, str(ROOT / script), *arguments]
    with run.log.open("a") as log:
        return subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT
        )


def finish(run: Run, returncode: int, annotation_file: str) -> dict:
    """Measures a run that has ended, and keeps the result in its folder.

    Returns:
        `METRICS` in percent, and seconds per iteration (None if training was too short to tell).

    Raises:
        UserError: the run failed.
    """
    if returncode < 0:
        raise UserError(f"ended by signal {-returncode}")
    if returncode:
        raise UserError(run.log.read_text().rstrip().rpartition("\n")[2].removeprefix("error: "))
    evaluated, seconds = {}, []
    for line in (run.folder / "metrics.json").read_text().splitlines():
        entry = json.loads(line)
        if "bbox/AP" in entry:
            evaluated = entry
        if "time" in entry:
            seconds.append(entry["time"])
    detections = run.folder / "inference" / "coco_instances_results.json"
    values = (
        evaluated["bbox/AP"],
        evaluated["segm/AP"],
        boundary_ap(annotation_file, json.loads(detections.read_text())),
    )
    result = {
        **dict(zip(METRICS, values, strict=True)),
        "s/iteration": statistics.median(seconds) if seconds else None,
    }
    write_file(run.folder / "result.json", json.dumps(result))
    return result


def run_all(runs: list[Run], jobs: int, threads: int | None, annotation_file: str) -> list[str]:
    """Does the runs, `jobs` at a time, and prints what comes out.

    Returns:
        A line for each run that failed.
    """
    waiting, failures, done = list(runs), [], 0
    running: dict[Run, subprocess.Popen] = {}
    begin = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running[run] = start(run, threads)
            time.sleep(0.2)
            for run in [run for run, process in running.items() if process.poll() is not None]:
                process = running.pop(run)
                done += 1
                try:
                    result = finish(run, process.returncode, annotation_file)
                    text = ", ".join(f"{name} {result[name]:.1f}" for name in METRICS)
                except UserError as error:
                    text = f"failed: {error} (log: {run.log})"
                    failures.append(f"{run}: {text}")
                minutes = (time.monotonic() - begin) / 60
                left = minutes / done * (len(runs) - done)
                print(
                    f"[{done}/{len(runs)}] {run}: {text}; {minutes:.1f} min, "
                    f"about {left:.0f} min to go",
                    flush=True,
                )
    finally:
        for process in running.values():
            process.terminate()
            process.wait()
    return failures


# --- report -------------------------------------------------------------------------------------


def summarize(results: list[dict]) -> dict:
    """Mean and sample standard deviation of each metric over the seeds of a method.

    Args:
        results: what :func:`finish` returned for each seed.

    Returns:
        For each metric `mean` and `std`; std is None for one seed. Of the time only the mean.
    """
    summary: dict = {}
    for name in METRICS:
        values = [result[name] for result in results]
        std = statistics.stdev(values) if len(values) > 1 else None
        summary[name] = {"mean": statistics.fmean(values), "std": std}
    seconds = [r["s/iteration"] for r in results if r["s/iteration"] is not None]
    summary["s/iteration"] = statistics.fmean(seconds) if seconds else None
    return summary


def table(methods: dict[str, dict], markdown: bool = False) -> str:
    """A row for each method of the report."""
    rows = []
    for name, method in methods.items():
        summary, cells = method["summary"], [name, METHODS[name]]
        for metric in METRICS:
            mean, std = summary[metric]["mean"], summary[metric]["std"]
            cells.append(f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}")
        seconds = summary["s/iteration"]
        cells.append(f"{method['parameters'] / 1e6:.2f} M")
        rows.append([*cells, "-" if seconds is None else f"{seconds:.2f}"])
    header = ["pyramid", "mask head", *METRICS, "parameters", "s/iteration"]
    return format_table(header, rows, markdown, text_columns=2)


def plot(methods: dict[str, dict], path: Path) -> None:
    """Draws a panel for each metric: a dot for each seed, mean and standard deviation above it."""
    height = 1.3 + 0.5 * len(methods)
    figure, panels = plt.subplots(1, len(METRICS), figsize=(10, height), sharey=True)
    for panel, metric in zip(panels, METRICS, strict=True):
        for row, (name, method) in enumerate(methods.items()):
            color = "tab:red" if name == "carafe" else "tab:blue"
            mean, std = method["summary"][metric]["mean"], method["summary"][metric]["std"]
            values = [result[metric] for result in method["seeds"].values()]
            panel.plot(values, [row + 0.18] * len(values), "o", color=color, alpha=0.4, ms=5)
            panel.errorbar(mean, row - 0.12, xerr=std, fmt="D", color=color, ms=6, capsize=4)
            panel.text(mean, row - 0.22, f"{mean:.1f}", ha="center", va="bottom", fontsize=8)
        panel.set_title(metric)
        panel.margins(x=0.12)
        panel.grid(axis="x", color="0.9")
        panel.set_axisbelow(True)
        panel.spines[["top", "right", "left"]].set_visible(False)
    panels[0].set_yticks(range(len(methods)), list(methods))
    panels[0].set_ylim(len(methods) - 0.5, -0.6)  # the first method on top
    figure.supxlabel("percent; diamond: mean ± standard deviation, dots: seeds", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def describe(args: argparse.Namespace, cfg: CfgNode) -> str:
    """One line that says what was compared, and on what."""
    return (
        f"{args.seeds} seeds, {args.iterations} iterations of {cfg.SOLVER.IMS_PER_BATCH} images, "
        f"evaluated on {cfg.DATASETS.TEST[0]}, {args.jobs} at a time; "
        f"{machine_sentence(describe_machine(cfg.MODEL.DEVICE))}."
    )


# --- command line -------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--config-file", type=Path, metavar="FILE",
        help="a Mask R-CNN with CARAFE; default: that of the quick start, with "
             + " ".join(SHORT_TRAINING))  # fmt: skip
    add("--methods", default=",".join(METHODS), metavar="NAME,...",
        help="upsamplers of the pyramid; default: %(default)s")  # fmt: skip
    add("--seeds", type=int, default=3, help="seeds of each; default: %(default)s")
    add("--iterations", type=int, default=550, help="of each run; default: %(default)s")
    add("--jobs", type=int,
        help="runs side by side; default: one for each CPU core, or one where there is a GPU",
    )  # fmt: skip
    add("--output", type=Path, default=ROOT / "output" / "compare")
    add("--markdown", type=Path, metavar="FILE",
        help="also write table and plot into this page, e.g. docs/compare.md")  # fmt: skip
    add("opts", nargs=argparse.REMAINDER, help="config keys and values")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> CfgNode:
    """Checks the arguments and puts defaults and lists in place; returns the config.

    Raises:
        UserError: an argument, the config, the dataset or the page does not do.
    """
    args.methods = list(dict.fromkeys(args.methods.split(",")))
    for method in args.methods:
        if method not in METHODS:
            raise UserError(f"--methods must be of {', '.join(METHODS)}, got {method!r}")
    for name in ("seeds", "iterations", "jobs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    for key in args.opts[::2]:
        if key in RESERVED:
            raise UserError(f"{key} is set by {RESERVED[key]}")
    if args.config_file is None:
        args.config_file, args.opts = QUICK_START, [*SHORT_TRAINING, *args.opts]
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {args.output}: {error.strerror}") from error

    cfg = load_config(str(args.config_file), args.opts)
    if not cfg.MODEL.MASK_ON or len(cfg.DATASETS.TEST) != 1:
        raise UserError(f"{args.config_file} needs MODEL.MASK_ON and one dataset in DATASETS.TEST")
    check_datasets(cfg.DATASETS.TRAIN + cfg.DATASETS.TEST)
    if args.jobs is None:
        num_runs = args.seeds * len(args.methods)
        args.jobs = min(cores(), num_runs) if cfg.MODEL.DEVICE == "cpu" else 1
    return cfg


def cores() -> int:
    return len(os.sched_getaffinity(0))


def count_parameters(cfg: CfgNode, method: str) -> int:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.FPN.UPSAMPLE = method
    cfg.MODEL.ROI_MASK_HEAD.UPSAMPLE = METHODS[method]
    return sum(parameter.numel() for parameter in build_model(cfg).parameters())


def make_report(args: argparse.Namespace, cfg: CfgNode, runs: list[Run]) -> dict:
    """Collects the results of all finished runs by method; leaves out methods that have none."""
    methods = {}
    for method in args.methods:
        seeds = {r.seed: result for r in runs if r.method == method and (result := r.result())}
        if seeds:
            methods[method] = {
                "parameters": count_parameters(cfg, method),
                "summary": summarize(list(seeds.values())),
                "seeds": seeds,
            }
    return {"settings": describe(args, cfg), "methods": methods}


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    block = MarkdownBlock(args.markdown, BLOCK) if args.markdown else None
    cfg = check_args(args)
    # Trainings must not outlive this program, whichever way it is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    runs = make_runs(args, cfg)
    missing = [run for run in runs if not run.result()]
    print(f"{len(runs)} runs, {len(runs) - len(missing)} of them finished already", flush=True)
    threads = max(1, cores() // args.jobs) if cfg.MODEL.DEVICE == "cpu" else None
    annotation_file = MetadataCatalog.get(cfg.DATASETS.TEST[0]).json_file
    failures = run_all(missing, args.jobs, threads, annotation_file)

    command = shlex.join(["python", "dev/compare.py", *argv])
    report = {"command": command, **make_report(args, cfg, runs)}
    if report["methods"]:
        write_file(args.output / "results.json", json.dumps(report, indent=2) + "\n")
        plot(report["methods"], args.output / "compare.png")
        print("", table(report["methods"]), "", report["settings"], sep="\n")
        print(f"Each seed: {args.output}/results.json; plot: {args.output}/compare.png")
    if failures:
        print("", *failures, sep="\n")
        raise UserError(f"{len(failures)} of {len(runs)} runs failed, for the reasons above")
    if block:
        plot(report["methods"], args.markdown.parent / "images" / "compare.png")
        picture = "![Box, mask and boundary AP of each upsampler](images/compare.png)"
        origin = f"Measured with `{command}`: {report['settings']}"
        block.write("\n\n".join([table(report["methods"], markdown=True), picture, origin]))
        print(f"Written to {args.markdown}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command to continue", file=sys.stderr)
        sys.exit(130)
