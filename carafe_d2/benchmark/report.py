"""What a benchmark leaves behind: tables, JSON, a plot."""

import datetime
import json
import os
import platform
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..version import __version__
from .upsampling import FORWARD, FORWARD_BACKWARD, GROUPS, PASSES, Case, Result

if TYPE_CHECKING:
    from .detectors import Result as DetectorResult

# ---------------------------------------------------------------------------------- machine


def _cpu_model() -> str:
    with open("/proc/cpuinfo") as lines:
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def describe_machine(device: torch.device, arguments: Sequence[str]) -> dict:
    """What has to be known to read the times of a run, and to repeat it."""
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "python -m carafe_d2.benchmark", *arguments]),
        "carafe_d2": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        # carafe_d2 takes the widest that the processor has, unless this variable says otherwise.
        "CARAFE_D2_CPU": os.environ.get("CARAFE_D2_CPU"),
        "device": device.type,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = properties.name
        facts["gpu_memory"] = properties.total_memory
        facts["cuda"] = torch.version.cuda
    return facts


def machine_sentence(machine: dict) -> str:
    if machine["device"] == "cuda":
        place = f"{machine['gpu']}, CUDA {machine['cuda']}"
    else:
        instructions = machine["CARAFE_D2_CPU"] or machine["torch_instruction_set"]
        place = (
            f"{machine['cpu']}, {instructions}, {machine['threads']} of {machine['cores']} cores"
        )
    versions = f"PyTorch {machine['torch']}, carafe_d2 {machine['carafe_d2']}"
    return f"{place}, {versions}, {machine['date'][:10]}"


# ----------------------------------------------------------------------------------- tables


def significant(value: float | None, digits: int = 3) -> str:
    """A number without an exponent; a dash where there is none."""
    if not value:
        return "-"
    decimals = digits - len(str(int(value))) if value >= 1 else digits
    return f"{value:.{max(0, decimals)}f}"


def percent(value: float | None) -> str:
    return f"{100 * value:.0f}%" if value is not None else "-"


@dataclass(frozen=True)
class Table:
    """A table for the terminal and for Markdown.

    Attributes:
        title: one line, without a full stop.
        header: of each column; the first column is text, the others hold numbers.
        notes: lines below the table.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def text(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        lines = [self.title]
        for first, *rest in [self.header, *self.rows]:
            cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
            lines.append("  ".join([first.ljust(widths[0]), *cells]))
        return "\n".join([*lines, *self.notes])

    def markdown(self) -> str:
        alignment = [":--", *["--:"] * (len(self.header) - 1)]
        table = [f"| {' | '.join(cells)} |" for cells in [self.header, alignment, *self.rows]]
        return "\n\n".join([f"**{self.title}**", "\n".join(table), *self.notes])


UPSAMPLING_NOTE = """\
speed-up: how many times faster the CARAFE of the same group is than this row
MB: the fewest that have to move; of copy: their rate relative to that of a large copy
copy, matmul: rates of a large copy and of a large matrix product, in float32, in both passes"""
UPSAMPLING_HEADER = [
    *("", "forward ms", "speed-up", "MB", "of copy", "GFLOP/s"),
    *("fwd+bwd ms", "speed-up", "MB", "of copy", "GFLOP/s"),
]


def _upsampling_cells(result: Result) -> list[str]:
    return [
        significant(result.milliseconds),
        significant(result.speedup) + "x" * bool(result.speedup),
        significant(result.fewest_bytes and result.fewest_bytes / 1e6),
        percent(result.copy_share),
        significant(result.gflops),
    ]


def upsampling_table(case: Case, results: Iterable[Result]) -> Table:
    """The table of one case, dtype and layout."""
    by_pass: dict[str, dict[str, Result]] = {pass_: {} for pass_ in PASSES}
    for result in results:
        by_pass[result.pass_][result.candidate] = result
    copies, matmuls = ([by_pass[p].pop(name) for p in PASSES] for name in ("copy", "matmul"))
    rows, notes = [], []
    for name, forward in by_pass[FORWARD].items():
        both = by_pass[FORWARD_BACKWARD][name]
        if not (forward.skipped and both.skipped):
            rows.append([name, *_upsampling_cells(forward), *_upsampling_cells(both)])
        if forward.skipped and forward.skipped == both.skipped:
            notes.append(f"{name}: not measured, {forward.skipped}")
        else:
            notes += [
                f"{name}, {result.pass_}: not measured, {result.skipped}"
                for result in (forward, both)
                if result.skipped
            ]
    bandwidths = [f"{copy.fewest_bytes / copy.milliseconds / 1e6:.1f}" for copy in copies]
    rates = [f"{matmul.gflops:.0f}" for matmul in matmuls]
    title = f"{case}, {copies[0].dtype}, {copies[0].layout}"
    notes.insert(0, f"copy: {' and '.join(bandwidths)} GB/s, matmul: {' and '.join(rates)} GFLOP/s")
    return Table(title, UPSAMPLING_HEADER, rows, notes)


DETECTOR_HEADER = ["", "ms/image", "images/s", "of baseline", "GFLOP/image", "objects"]


def detector_table(mode: str, size: Sequence[int], results: Iterable["DetectorResult"]) -> Table:
    """The table of one mode; its images have (height, width) = `size`."""
    rows = [
        [
            result.config,
            significant(result.milliseconds),
            significant(result.images_per_second),
            significant(result.speed) + "x" * bool(result.speed),
            significant(result.gflops),
            "-" if result.objects is None else str(result.objects),
        ]
        for result in results
    ]
    return Table(f"{mode}, one image of {size[0]}x{size[1]}, random weights", DETECTOR_HEADER, rows)


def markdown(machine: dict, tables: Iterable[Table]) -> str:
    origin = f"Measured on {machine_sentence(machine)}, by `{machine['command']}`."
    return "\n\n".join([origin, *(table.markdown() for table in tables)])


# ------------------------------------------------------------------------------------- JSON


def write_json(path: Path, machine: dict, settings: dict, results: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "settings": settings, "results": results}
    path.write_text(json.dumps(content, indent=2) + "\n")


# ------------------------------------------------------------------------------------- plot

OURS_COLOR, PEER_COLOR = "#d1495b", "#5b7c99"
BACKWARD_ALPHA = 0.38


def plot(path: Path, title: str, cases: dict[str, Case], results: Sequence[Result]) -> None:
    """Times of all candidates, a panel for each case, as a PNG.

    Args:
        results: of one dtype and layout.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    measured = [r for r in results if "/" in r.candidate and not r.skipped]
    panels = {name: list(rows) for name, rows in groupby(measured, key=lambda result: result.case)}
    names = list(dict.fromkeys(result.candidate for result in measured))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(4 + 4 * columns, 1.6 + rows * (0.9 + 0.24 * len(names))),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (name, panel) in zip(axes.flat, panels.items(), strict=False):
        _draw_panel(axis, cases[name], names, panel)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(f"{title}\nmilliseconds: forward / forward + backward", fontsize=8)
    legend = [
        Patch(color=OURS_COLOR, label="CARAFE of carafe_d2, forward"),
        Patch(
            color=OURS_COLOR, alpha=BACKWARD_ALPHA, label="CARAFE of carafe_d2, forward + backward"
        ),
        Patch(color=PEER_COLOR, label="others, forward"),
        Patch(color=PEER_COLOR, alpha=BACKWARD_ALPHA, label="others, forward + backward"),
    ]
    figure.legend(
        handles=legend,
        loc="outside lower center",
        ncols=min(4, 2 * columns),
        frameon=False,
        fontsize=8,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_panel(axis, case: Case, names: list[str], results: list[Result]) -> None:
    groups = [name.split("/")[0] for name in names]
    # A gap between groups; the first candidate on top.
    places, place = {}, 0.0
    for i, name in enumerate(names):
        place -= 1.6 if i and groups[i] != groups[i - 1] else 1
        places[name] = place
    times = [result.milliseconds for result in results]
    low, high = min(times) / 2, max(times) * 5
    for result in results:
        ours = result.candidate in GROUPS.values()
        backward = result.pass_ == FORWARD_BACKWARD
        axis.barh(
            places[result.candidate],
            result.milliseconds - low,
            left=low,
            height=0.78,
            color=OURS_COLOR if ours else PEER_COLOR,
            alpha=BACKWARD_ALPHA if backward else 1,
            zorder=1 if backward else 2,
        )
    for name, place in places.items():
        times = [result.milliseconds for result in results if result.candidate == name]
        label = " / ".join(map(significant, times)) or "not measured"
        axis.text(1.08 * max(times, default=low), place, label, va="center", fontsize=7)
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    axis.set_yticks(list(places.values()), names, fontsize=8)
    axis.set_ylim(min(places.values()) - 0.8, -0.2)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=7)
    axis.set_title(
        f"{case.name}  {'x'.join(map(str, case.shape))}, group {case.group}, scale {case.scale}",
        fontsize=9,
    )
    axis.grid(axis="x", which="major", linewidth=0.4, color="#cccccc")
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
