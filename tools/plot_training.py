#!/usr/bin/env python3
r"""Plots losses, learning rate and AP over the iterations of one or several trainings, as one PNG.

Examples:
    python tools/plot_training.py output/shapes_mask_rcnn_R18_FPN_carafe
    python tools/plot_training.py output/compare/nearest_seed1 output/compare/carafe_seed1 \
        --metrics total_loss 'bbox/AP*' --output comparison.png
"""

import argparse
import fnmatch
import json
import os
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from carafe_d2.errors import UserError, exit_on_user_error

METRICS = ["total_loss", "loss_*", "lr", "*/AP"]
NAMES = {"lr": "learning rate", "bbox/AP": "box AP", "segm/AP": "mask AP"}
COLUMNS = 3

# For each metric its iterations, in rising order, and its values.
Curves = dict[str, tuple[list[int], list[float]]]


def read_metrics(path: Path) -> Curves:
    """Reads what a training of Detectron2 has written to its metrics.json.

    A training that was resumed, or begun again in the same folder, has appended to the file: the
    later values count. Lines that were cut off when a training was killed are passed over.

    Args:
        path: the file, or the folder of the training.

    Raises:
        UserError: the file is missing or holds no metrics.
    """
    if path.is_dir():
        path = path / "metrics.json"
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error

    curves: Curves = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            iteration = entry.pop("iteration")
        except (ValueError, AttributeError, KeyError, TypeError):
            if number < len(lines):  # the last one is still being written, or was cut off
                print(f"{path}: line {number} is broken, passed over", file=sys.stderr)
            continue
        for name, value in entry.items():
            iterations, values = curves.setdefault(name, ([], []))
            while iterations and iterations[-1] >= iteration:
                iterations.pop()
                values.pop()
            iterations.append(iteration)
            values.append(value)
    if not curves:
        raise UserError(f"{path} holds no metrics of a training")
    return curves


def select(runs: dict[str, Curves], patterns: list[str]) -> list[str]:
    """The metrics of any run that match the patterns, in the patterns' order.

    Raises:
        UserError: a pattern that is not one of the default ones matches no metric.
    """
    known = sorted({name for curves in runs.values() for name in curves})
    selected = []
    for pattern in patterns:
        matching = fnmatch.filter(known, pattern)
        if not matching and pattern not in METRICS:
            raise UserError(f"--metrics: no run has {pattern!r}; there are {', '.join(known)}")
        selected += matching
    if not selected:
        raise UserError(f"no run has losses, learning rate or AP; there are {', '.join(known)}")
    return list(dict.fromkeys(selected))


def labels(paths: list[Path]) -> list[str]:
    """A name for each run in the legend: that of its folder, or more of the path if that is needed.

    Args:
        paths: metrics.json files or the folders of trainings, all different.
    """
    folders = [p.absolute() if p.is_dir() else p.absolute().parent for p in paths]
    if len({*folders}) < len(folders):  # two files of one folder
        return list(map(str, paths))
    if len({folder.name for folder in folders}) == len(folders):
        return [folder.name for folder in folders]
    shared = os.path.commonpath(folders)
    return [os.path.relpath(folder, shared) for folder in folders]


def plot(runs: dict[str, Curves], metrics: list[str]) -> Figure:
    """Draws a panel for each metric, with a line for each run that has it.

    Args:
        runs: the curves of each run by its name in the legend.
        metrics: names of the metrics.
    """
    columns = min(COLUMNS, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(3.3 * columns, 2.2 * rows + 0.4))
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for panel, metric in zip(panels.flat, metrics, strict=False):
        for i, (name, curves) in enumerate(runs.items()):
            iterations, values = curves.get(metric, ([], []))
            # Few values, as of AP, would vanish without marks.
            marker = "o" if len(values) <= 20 else None
            panel.plot(
                *(iterations, values), color=f"C{i % 10}", lw=1.4, marker=marker, ms=4, label=name
            )
            if len(values) == 1:
                panel.annotate(
                    f"{values[0]:.4g}",
                    (iterations[0], values[0]),
                    xytext=(-6, 0),
                    textcoords="offset points",
                    ha="right",
                    va="center",
                    fontsize=8,
                )
        panel.set_title(NAMES.get(metric, metric), fontsize=10)
        panel.grid(color="0.9")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
        panel.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
        if panel.dataLim.ymin >= 0:
            panel.set_ylim(bottom=0)
    for panel in panels.flat[len(metrics) :]:
        panel.set_axis_off()
    for panel in panels.flat[max(0, len(metrics) - columns) : len(metrics)]:
        panel.tick_params(labelbottom=True)
        panel.set_xlabel("iteration", fontsize=9)

    handles, names = panels.flat[0].get_legend_handles_labels()
    figure.tight_layout()
    figure.legend(
        *(handles, names),
        loc="lower center",
        bbox_to_anchor=(0.5, 1),
        # about twelve letters an inch
        ncols=max(1, min(len(names), 40 * columns // (6 + max(map(len, names))))),
        frameon=False,
        fontsize=9,
    )
    return figure


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="metrics.json files or their folders")
    parser.add_argument("--output", type=Path, default=Path("training.png"), help="the PNG")
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=METRICS,
        metavar="NAME",
        help="names or patterns of what to plot; default: losses, learning rate and AP",
    )
    return parser.parse_args()


@exit_on_user_error()
def main():
    args = parse_args()
    paths = list(dict.fromkeys(args.runs))
    runs = {name: read_metrics(p) for name, p in zip(labels(paths), paths, strict=True)}
    metrics = select(runs, args.metrics)
    figure = plot(runs, metrics)
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.output, dpi=100, bbox_inches="tight")
    except (OSError, ValueError) as error:  # ValueError: a suffix of no picture format
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {args.output}: {reason}") from error
    print(f"{len(metrics)} metrics of {len(runs)} trainings plotted to {args.output}")


if __name__ == "__main__":
    main()
