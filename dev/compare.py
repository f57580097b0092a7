#!/usr/bin/env python3
"""Compares upsamplers by training on real images, with the pretrained features of MobileNetV2.

Studies:
    instances   Mask R-CNN, fine-tuned: upsamplers of pyramid and mask head
    semantic    Semantic FPN on frozen features: upsamplers of pyramid and head
    inpainting  Partial Conv, from random weights: all upsamplers

Every run is train_net.py with the same config and schedule; only upsampler, learning rate and seed
differ. The learning rate is chosen for each upsampler by a run on a part of the data that is in
neither training nor test; then come the seeds, which are tested. A stopped comparison goes on where
it was when the command is repeated. Data and weights are those of dev/real_images.py.

Examples:
    python dev/compare.py
    python dev/compare.py --studies semantic --methods bilinear,carafe --seeds 10
    python dev/compare.py --markdown docs/compare.md
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.analysis import FlopCountAnalysis
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.stats import t as student_t

from carafe_d2 import kernel_statistics
from carafe_d2.collect_env import describe_machine, machine_sentence
from carafe_d2.config import load_config
from carafe_d2.data.builtin import datasets_root
from carafe_d2.errors import UserError, exit_on_user_error
from carafe_d2.files import MarkdownBlock, format_table, save_figure, write_file
from carafe_d2.inference import blank_image, read_image
from carafe_d2.kernel_statistics import border_distance, labels_of

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = Path(__file__).with_name("compare")
BLOCK = "dev/compare.py --markdown writes this"
NUCLEUS = 1  # the class of the label images; 0 is background
TUNING_SEED = 0  # of the runs that choose the learning rate
METHODS = ("nearest", "bilinear", "deconv", "pixel_shuffle", "carafe")


@dataclasses.dataclass(frozen=True)
class Study:
    """A model whose upsamplers are compared.

    Attributes:
        name: of its config in dev/compare/, without ".yaml".
        keys: that choose the upsampler.
        metrics: what is measured, the first one to choose the learning rate by; more is better.
        rates: learning rates to choose from.
    """

    name: str
    keys: tuple[str, ...]
    metrics: tuple[str, ...]
    rates: tuple[float, ...]

    @property
    def config_file(self) -> Path:
        return CONFIGS / f"{self.name}.yaml"


STUDIES = {
    study.name: study
    for study in (
        Study(
            "instances",
            ("MODEL.FPN.UPSAMPLE", "MODEL.ROI_MASK_HEAD.UPSAMPLE"),
            ("mask AP", "box AP", "boundary AP"),
            (0.0003, 0.001, 0.003),
        ),
        Study(
            "semantic",
            ("MODEL.FPN.UPSAMPLE", "MODEL.SEM_SEG_HEAD.UPSAMPLE"),
            ("mIoU", "boundary IoU"),
            (0.001, 0.003, 0.01, 0.03),
        ),
        Study("inpainting", ("MODEL.INPAINT.UPSAMPLE",), ("PSNR",), (0.003, 0.01, 0.03)),
    )
}


# --- boundary AP and boundary IoU ---------------------------------------------------------------


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


def boundary_iou(predictions: list[dict], records: Iterable[dict], category: int) -> float:
    """The IoU of the borders of a class's regions, in percent, summed up over all images.

    The borders are those of Boundary IoU, and the sums as in the mean IoU.

    Args:
        predictions: what Detectron2's evaluator saves, a mask for each class of an image.
        records: Detectron2's dicts of the images.
        category: the class.
    """
    found = {p["file_name"]: p for p in predictions if p["category_id"] == category}
    both = either = 0
    for record in records:
        border = boundary((labels_of(record) == category + 1).astype(np.uint8))
        other = np.zeros_like(border)
        if record["file_name"] in found:
            other = boundary(mask_util.decode(found[record["file_name"]]["segmentation"]))
        both += int(np.count_nonzero(border & other))
        either += int(np.count_nonzero(border | other))
    return 100 * both / either if either else math.nan


# --- one run ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A training with its evaluation.

    Attributes:
        study: what is trained.
        method: the upsampler, one of `METHODS`.
        rate: the config's SOLVER.BASE_LR.
        seed: the config's SEED; that of `TUNING_SEED` is evaluated on the tuning set.
        folder: the config's OUTPUT_DIR; log, command and result are kept there too.
        command: the arguments of Python, train_net.py first.
    """

    study: Study
    method: str
    rate: float
    seed: int
    folder: Path
    command: list[str]

    def __str__(self):
        return f"{self.study.name}, {self.method}, learning rate {self.rate:g}, seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.folder / "train.log"

    @property
    def weights(self) -> Path:
        return self.folder / "model_final.pth"

    def config(self, *opts: str) -> CfgNode:
        """What train_net.py was given, and further keys and values."""
        return load_config(str(self.study.config_file), [*self.command[4:], *opts])

    def found(self) -> list[dict]:
        """What Detectron2's evaluator saved of its masks, those of an image one after the other."""
        name = {"instances": "coco_instances_results", "semantic": "sem_seg_predictions"}
        return json.loads((self.folder / "inference" / f"{name[self.study.name]}.json").read_text())

    def result(self) -> dict | None:
        """What was measured, or None where the run has not finished."""
        try:
            return json.loads((self.folder / "result.json").read_text())
        except FileNotFoundError:
            return None


def registered(root: Path) -> tuple[str, ...]:
    """DATASETS.REGISTER of all sets of dev/real_images.py, in the three forms of the studies."""
    descriptions = []
    for name in ("train", "tune", "test"):
        images = root / name
        descriptions += [
            f"real_instances_{name}={root / name}.json:{images}",
            f"real_semantic_{name}={root / name}_labels:{images}",
            f"real_inpainting_{name}={images}",
        ]
    return tuple(descriptions)


def make_run(args: argparse.Namespace, study: Study, method: str, rate: float, seed: int) -> Run:
    """
    Raises:
        UserError: a run was begun in the same folder with other settings.
    """
    folder = args.output.absolute() / study.name / f"{method}_rate{rate:g}_seed{seed}"
    test = "tune" if seed == TUNING_SEED else "test"
    keys = {
        **dict.fromkeys(study.keys, method),
        "DATASETS.REGISTER": registered(args.data),
        "DATASETS.TEST": (f"real_{study.name}_{test}",),
        "SOLVER.BASE_LR": rate,
        "SEED": seed,
        "OUTPUT_DIR": folder,
    }
    if study.name != "inpainting":
        keys["MODEL.WEIGHTS"] = args.data / "mobilenet_v2.pth"
    if args.iterations:
        keys |= {"SOLVER.MAX_ITER": args.iterations, "SOLVER.WARMUP_ITERS": args.iterations // 10}
    opts = [str(word) for pair in keys.items() for word in pair]
    command = ["train_net.py", "--resume", "--config-file", str(study.config_file), *opts]
    run = Run(study, method, rate, seed, folder, command)
    begun = folder / "command.txt"
    if begun.exists() and begun.read_text() != shlex.join(["python", *command]):
        raise UserError(
            f"{folder} holds a run with other settings; remove it or choose another folder "
            "with --output"
        )
    return run


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


def finish(run: Run, returncode: int) -> dict:
    """Measures a run that has ended, and keeps the result in its folder.

    Returns:
        The metrics of its study, in percent and dB.

    Raises:
        UserError: the run failed.
    """
    if returncode < 0:
        raise UserError(f"ended by signal {-returncode}")
    if returncode:
        raise UserError(run.log.read_text().rstrip().rpartition("\n")[2].removeprefix("error: "))
    metrics: dict[str, Any] = {}
    for line in (run.folder / "metrics.json").read_text().splitlines():
        metrics |= json.loads(line)
    names = {
        "box AP": "bbox/AP",
        "mask AP": "segm/AP",
        "mIoU": "sem_seg/mIoU",
        "PSNR": "inpainting/PSNR",
    }
    result = {m: metrics[names[m]] for m in run.study.metrics if m in names}
    (dataset,) = run.config().DATASETS.TEST
    if run.study.name == "instances":
        annotations = MetadataCatalog.get(dataset).json_file
        result["boundary AP"] = boundary_ap(annotations, run.found())
    if run.study.name == "semantic":
        result["boundary IoU"] = boundary_iou(run.found(), DatasetCatalog.get(dataset), NUCLEUS)
    write_file(run.folder / "result.json", json.dumps(result))
    return result


def run_all(runs: list[Run], jobs: int, threads: int | None) -> dict[Run, str]:
    """Does the runs that have no result yet, `jobs` at a time, and prints what comes out.

    Returns:
        A line for each run that failed.
    """
    waiting = [run for run in runs if not run.result()]
    count, done = len(waiting), 0
    failures: dict[Run, str] = {}
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
                    result = finish(run, process.returncode)
                    text = ", ".join(f"{name} {result[name]:.2f}" for name in run.study.metrics)
                except UserError as error:
                    text = f"failed: {error} (log: {run.log})"
                    failures[run] = f"{run}: {text}"
                minutes = (time.monotonic() - begin) / 60
                left = minutes / done * (count - done)
                print(
                    f"[{done}/{count}] {run}: {text}; {minutes:.1f} min, about {left:.0f} min of "
                    "these to go",
                    flush=True,
                )
    finally:
        for process in running.values():
            process.terminate()
            process.wait()
    return failures


# --- report -------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of a sample, and half the width of its 95 % confidence interval by Student's t.

    Of one value there is no interval.
    """
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, None
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(student_t.ppf(0.975, len(values) - 1)) * error


def text_of(values: Sequence[float], sign: str = "") -> str:
    """Mean and confidence interval, as in tables."""
    mean, half = interval(values)
    return f"{mean:{sign}.2f}" if half is None else f"{mean:{sign}.2f} ± {half:.2f}"


def table(study: Study, methods: dict[str, dict], markdown: bool = False) -> str:
    """A row for each method; of the first metric also how far CARAFE is ahead, seed by seed."""
    rows = []
    first = study.metrics[0]
    for name, method in methods.items():
        seeds = method["seeds"]
        cells = [name, f"{method['rate']:g}"]
        cells += [
            text_of([result[metric] for result in seeds.values()]) for metric in study.metrics
        ]
        carafe = methods.get("carafe", {"seeds": {}})["seeds"]
        gains = [carafe[s][first] - seeds[s][first] for s in seeds if s in carafe]
        cells.append(text_of(gains, "+") if gains and name != "carafe" else "")
        cells += [f"{method['parameters'] / 1e6:.3f} M", f"{method['flops'] / 1e9:.2f}"]
        rows.append(cells)
    header = ["upsampler", "learning rate", *study.metrics, f"CARAFE ahead in {first}"]
    return format_table([*header, "parameters", "GFLOP"], rows, markdown)


def plot(report: dict[str, dict], path: Path) -> None:
    """Draws a panel for each metric: a dot for each seed, mean and confidence interval above it."""
    panels = [(STUDIES[name], metric) for name in report for metric in STUDIES[name].metrics]
    count = max(len(methods) for methods in report.values())
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.2 * len(panels) + 1.5, 1.3 + 0.5 * count), squeeze=False
    )
    for panel, (study, metric) in zip(axes[0], panels, strict=True):
        methods = report[study.name]
        for row, (name, method) in enumerate(methods.items()):
            color = "tab:red" if name == "carafe" else "tab:blue"
            values = [result[metric] for result in method["seeds"].values()]
            mean, half = interval(values)
            panel.plot(values, [row + 0.18] * len(values), "o", color=color, alpha=0.4, ms=4)
            panel.errorbar(mean, row - 0.12, xerr=half, fmt="D", color=color, ms=5, capsize=3)
        panel.set_title(f"{study.name}\n{metric}", fontsize=9)
        panel.set_yticks(range(len(methods)), list(methods) if panel is axes[0][0] else [])
        panel.set_ylim(len(methods) - 0.5, -0.6)  # the first method on top
        panel.margins(x=0.12)
        panel.grid(axis="x", color="0.9")
        panel.set_axisbelow(True)
        panel.spines[["top", "right", "left"]].set_visible(False)
    figure.supxlabel(
        "percent, PSNR in dB; diamond: mean and 95 % interval, dots: seeds", fontsize=9
    )
    save(figure, path)


def cost(run: Run) -> dict[str, int]:
    """Parameters, and FLOPs of one image with as many boxes as fit, of a run's model."""
    cfg = run.config("MODEL.DEVICE", "cpu", "MODEL.RPN.NMS_THRESH", "1.0",
        "MODEL.ROI_HEADS.NMS_THRESH_TEST", "1.0", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0",
    )  # fmt: skip
    model = build_model(cfg).eval()
    flops = FlopCountAnalysis(model, blank_image(cfg, *[cfg.INPUT.MIN_SIZE_TEST] * 2))
    flops.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops": int(flops.total()),
    }


# --- borders and kernels ------------------------------------------------------------------------

WINDOW = 64  # side of what is cut out of an image, in pixels
MAGNIFICATION = 4
CONFIDENT = 0.5  # detections below this score are not drawn


def found_labels(run: Run, record: dict) -> np.ndarray:
    """What a run has found in an image, as `labels_of` gives the truth."""
    key = "image_id" if run.study.name == "instances" else "file_name"
    found = [each for each in run.found() if each[key] == record[key]]
    labels = np.zeros_like(labels_of(record))
    for number, each in enumerate(sorted(found, key=lambda each: each.get("score", 1)), start=1):
        if each.get("score", 1) >= CONFIDENT:
            labels[mask_util.decode(each["segmentation"]) > 0] = number
    return labels


def busiest_window(records: Sequence[dict]) -> tuple[dict, tuple[slice, slice]]:
    """The image, and the window in it, with the most borders of the truth."""
    most, best = -1.0, (records[0], (slice(0), slice(0)))
    for record in records:
        borders = (border_distance(labels_of(record)) == 0).astype(np.float32)
        sums = cv2.boxFilter(borders, -1, (WINDOW, WINDOW), normalize=False, anchor=(0, 0))
        inside = sums[: max(1, len(sums) - WINDOW + 1), : max(1, len(sums[0]) - WINDOW + 1)]
        _, highest, _, (x, y) = cv2.minMaxLoc(inside)
        if highest > most:
            most, best = highest, (record, (slice(y, y + WINDOW), slice(x, x + WINDOW)))
    return best


def outlined(record: dict, labels: np.ndarray, window: tuple[slice, slice]) -> np.ndarray:
    """A magnified window of an image with the borders between labels, RGB (height, width, 3)."""
    image = read_image(record["file_name"])[window]
    size = (WINDOW * MAGNIFICATION,) * 2
    picture = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
    labels = cv2.resize(labels[window], size, interpolation=cv2.INTER_NEAREST)
    picture[border_distance(labels) == 0] = (255, 160, 0)
    return picture


def draw_borders(runs: list[list[Run]], path: Path) -> None:
    """Draws what each upsampler has found beside the truth: two windows of each study.

    Args:
        runs: for each study one run of each method.
        path: of the picture.
    """
    rows, names = [], []
    for methods in runs:
        records = DatasetCatalog.get(methods[0].config().DATASETS.TEST[0])
        half = len(records) // 2
        for part in (records[:half], records[half:]):
            record, window = busiest_window(part)
            labels = [labels_of(record), *(found_labels(run, record) for run in methods)]
            rows.append([outlined(record, each, window) for each in labels])
            names.append(methods[0].study.name)
    figure, axes = plt.subplots(
        len(rows), len(rows[0]), figsize=(1.5 * len(rows[0]), 1.5 * len(rows) + 0.3), squeeze=False
    )
    for panel, picture in zip(axes.flat, itertools.chain(*rows), strict=True):
        panel.imshow(picture)
        panel.set(xticks=[], yticks=[])
    for panel, name in zip(axes[:, 0], names, strict=True):
        panel.set_ylabel(name, fontsize=9)
    for panel, title in zip(axes[0], ["truth", *(run.method for run in runs[0])], strict=True):
        panel.set_title(title, fontsize=9)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    save_figure(path, figure, dpi=120)
    plt.close(figure)


# --- command line -------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--studies", default=",".join(STUDIES), metavar="NAME,...", help="default: %(default)s")
    add("--methods", default=",".join(METHODS), metavar="NAME,...", help="default: %(default)s")
    add("--seeds", type=int, default=5, help="seeds of each; default: %(default)s")
    add("--iterations", type=int, help="of each run; default: what the study's config says")
    add("--jobs", type=int,
        help="runs side by side; default: one for each CPU core, or one where there is a GPU",
    )  # fmt: skip
    add("--data", type=Path, metavar="FOLDER",
        help="what dev/real_images.py wrote; default: real/ in $DETECTRON2_DATASETS or datasets",
    )  # fmt: skip
    add("--output", type=Path, default=ROOT / "output" / "compare")
    add("--markdown", type=Path, metavar="FILE",
        help="also write tables and plot into this page, e.g. docs/compare.md")  # fmt: skip
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> str:
    """Checks the arguments and puts defaults and lists in place; returns the device.

    Raises:
        UserError: an argument, the data or the page does not do.
    """
    for name, known in (("studies", tuple(STUDIES)), ("methods", METHODS)):
        values = list(dict.fromkeys(getattr(args, name).split(",")))
        setattr(args, name, values)
        for value in values:
            if value not in known:
                raise UserError(f"--{name} must be of {', '.join(known)}, got {value!r}")
    for name in ("seeds", "iterations", "jobs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    args.data = (args.data or datasets_root() / "real").absolute()
    if not (args.data / "mobilenet_v2.pth").is_file():
        raise UserError(f"{args.data} holds no data; get them by `python dev/real_images.py`")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {args.output}: {error.strerror}") from error
    cfg = load_config(str(STUDIES[args.studies[0]].config_file))
    if args.jobs is None:
        args.jobs = len(os.sched_getaffinity(0)) if cfg.MODEL.DEVICE == "cpu" else 1
    return cfg.MODEL.DEVICE


def compare(
    args: argparse.Namespace, study: Study, threads: int | None
) -> tuple[dict[str, list[Run]], list[str]]:
    """Chooses the learning rate of each method, and does the runs that are tested.

    Returns:
        For each method its runs, those of the choice first; and a line for each run that failed,
        but for those of the choice where another one has a result.
    """
    runs = {
        method: [make_run(args, study, method, rate, TUNING_SEED) for rate in study.rates]
        for method in args.methods
    }
    failures = run_all([*itertools.chain(*runs.values())], args.jobs, threads)
    lines = []
    chosen = []
    for method, tuning in runs.items():
        results = {run.rate: result for run in tuning if (result := run.result())}
        if results:
            # AP is nan where nothing was detected.
            rate = max(results, key=lambda rate: np.nan_to_num(results[rate][study.metrics[0]]))
            seeds = range(1, args.seeds + 1)
            chosen.append([make_run(args, study, method, rate, seed) for seed in seeds])
            tuning += chosen[-1]
        else:  # a training may diverge at one of the rates
            lines += [failures[run] for run in tuning]
    # Seed by seed, so that a comparison that is stopped has something of every method.
    by_seed = [*itertools.chain(*zip(*chosen, strict=True))]
    return runs, [*lines, *run_all(by_seed, args.jobs, threads).values()]


def summary(runs: dict[str, list[Run]]) -> dict[str, dict]:
    """For each method with a result `rate`, `parameters`, `flops`; its results by seed, `seeds`,
    and by learning rate `tuning`.
    """
    methods = {}
    for method, each in runs.items():
        results = [(run, result) for run in each if (result := run.result())]
        tested = [(run, result) for run, result in results if run.seed != TUNING_SEED]
        if tested:
            methods[method] = {
                "rate": tested[0][0].rate,
                **cost(tested[0][0]),
                "tuning": {run.rate: result for run, result in results if not run.seed},
                "seeds": {run.seed: result for run, result in tested},
            }
    return methods


def illustrate(runs: Iterable[dict[str, list[Run]]], folder: Path) -> list[str]:
    """Draws borders and kernels of the first seed; returns what a page shows of them.

    Args:
        runs: of each study, for each method.
        folder: of the pictures.
    """
    firsts = [
        [run for each in methods.values() for run in each if run.seed == 1] for methods in runs
    ]
    firsts = [first for first in firsts if first[0].study.name != "inpainting"]
    if not firsts:
        return []
    draw_borders(firsts, folder / "compare_borders.png")
    parts = ["**Borders**", "![What each upsampler finds](images/compare_borders.png)"]
    statistics = {
        f"{run.study.name}, {name}": regions
        for run in itertools.chain(*firsts)
        if run.method == "carafe"
        for name, regions in kernel_statistics.kernel_statistics(
            run.config("MODEL.WEIGHTS", str(run.weights))
        ).items()
    }
    if statistics:
        save_figure(folder / "compare_kernels.png", kernel_statistics.plot(statistics))
        parts += ["**Kernels**", kernel_statistics.table(statistics, markdown=True)]
        parts.append("![Statistics of CARAFE's kernels](images/compare_kernels.png)")
    return parts


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    block = MarkdownBlock(args.markdown, BLOCK) if args.markdown else None
    device = check_args(args)
    # Trainings must not outlive this program, whichever way it is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    threads = max(1, len(os.sched_getaffinity(0)) // args.jobs) if device == "cpu" else None
    runs: dict[str, dict[str, list[Run]]] = {}
    report: dict[str, dict] = {}
    failures: list[str] = []
    for name in args.studies:
        print(f"== {name}", flush=True)
        runs[name], failed = compare(args, STUDIES[name], threads)
        failures += failed
        if methods := summary(runs[name]):
            report[name] = methods
            print(table(STUDIES[name], methods), flush=True)
    if report:
        command = shlex.join(["python", "dev/compare.py", *argv])
        machine = machine_sentence(describe_machine(device))
        content = {"command": command, "machine": machine, "studies": report}
        write_file(args.output / "results.json", json.dumps(content, indent=2) + "\n")
        plot(report, args.output / "compare.png")
        print(f"Each seed: {args.output}/results.json; plot: {args.output}/compare.png")
    if failures:
        print("", *failures, sep="\n")
        raise UserError(f"{len(failures)} runs failed, for the reasons above")
    illustrations = illustrate(runs.values(), args.output)
    if block:
        for picture in args.output.glob("compare*.png"):
            write_file(args.markdown.parent / "images" / picture.name, picture.read_bytes())
        parts = ["![The metrics of each upsampler](images/compare.png)"]
        for name, methods in report.items():
            parts += [f"**{name.capitalize()}**", table(STUDIES[name], methods, markdown=True)]
        block.write("\n\n".join([*parts, *illustrations, f"Measured by `{command}`; {machine}."]))
        print(f"Written to {args.markdown}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command to continue", file=sys.stderr)
        sys.exit(130)
