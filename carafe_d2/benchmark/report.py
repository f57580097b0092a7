"""What a benchmark leaves behind: tables and a plot."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from ..collect_env import machine_sentence
from ..files import format_table, save_figure
from .measure import Measurement
from .upsampling import FORWARD, FORWARD_BACKWARD, GROUPS, PASSES, Case, Result

if TYPE_CHECKING:
    from .detectors import Result as DetectorResult

# ----------------------------------------------------------------------------------- tables


def significant(value: float | None, digits: int = 3) -> str:
    """A number without an exponent; a dash where there is none."""
    if not value:
        return "-"
    decimals = digits - len(str(int(value))) if value >= 1 else digits
    return f"{value:.{max(0, decimals)}f}"


def percent(value: float | None) -> str:
    return f"{100 * value:.0f}%" if value is not None else "-"


def times(result: Measurement) -> list[str]:
    """The median in milliseconds and, beside it, the quartiles."""
    quartiles = map(significant, result.quartiles or ())
    return [significant(result.milliseconds), " to ".join(quartiles) or "-"]


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
        return "\n".join([self.title, format_table(self.header, self.rows), *self.notes])

    def markdown(self) -> str:
        table = format_table(self.header, self.rows, markdown=True)
        return "\n\n".join([f"**{self.title}**", table, *self.notes])


UPSAMPLING_NOTE = """\
quartiles: over the rounds, in ms, beside the median
speed-up: how many times faster the CARAFE of the same group is than this row
MB: the fewest that have to move; of copy: their rate relative to that of a large copy
copy, matmul: rates of a large copy and of a large matrix product, in float32, in both passes"""
UPSAMPLING_HEADER = [
    *("", "forward ms", "quartiles", "speed-up", "MB", "of copy", "GFLOP/s"),
    *("fwd+bwd ms", "quartiles", "speed-up", "MB", "of copy", "GFLOP/s"),
]


def _upsampling_cells(result: Result) -> list[str]:
    return [
        *times(result),
        significant(result.speedup) + "x" * bool(result.speedup),
        significant(result.fewest_bytes and result.fewest_bytes / 1e6),
        percent(result.copy_share),
        significant(result.gflops),
    ]


def upsampling_table(case: Case, results: Sequence[Result]) -> Table:
    """The table of one case, dtype and layout."""
    by_pass: dict[str, dict[str, Result]] = {pass_: {} for pass_ in PASSES}
    for result in results:
        by_pass[result.pass_][result.candidate] = result
    copies, matmuls = ([by_pass[p].pop(name) for p in PASSES] for name in ("copy", "matmul"))
    bandwidths = " and ".join(significant(copy.gbytes) for copy in copies)
    rates = " and ".join(significant(matmul.gflops) for matmul in matmuls)
    rows, notes = [], [f"copy: {bandwidths} GB/s, matmul: {rates} GFLOP/s"]
    notes += page_fault_note({f"{r.candidate}, {r.pass_}": r for r in results})
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
    title = f"{case}, {copies[0].dtype}, {copies[0].layout}"
    return Table(title, UPSAMPLING_HEADER, rows, notes)


DETECTOR_HEADER = ["", "ms/image", "quartiles", "images/s", "of baseline", "GFLOP/image", "objects"]


def detector_table(mode: str, size: Sequence[int], results: Sequence["DetectorResult"]) -> Table:
    """The table of one mode; its images have (height, width) = `size`."""
    rows = [
        [
            result.config,
            *times(result),
            significant(result.images_per_second),
            significant(result.speed) + "x" * bool(result.speed),
            significant(result.gflops),
            "-" if result.objects is None else str(result.objects),
        ]
        for result in results
        if not result.skipped
    ]
    title = f"{mode}, one image of {size[0]}x{size[1]}, random weights"
    notes = page_fault_note({r.config: r for r in results})
    notes += [f"{r.config}: not measured, {r.skipped}" for r in results if r.skipped]
    return Table(title, DETECTOR_HEADER, rows, notes)


def page_fault_note(results: Mapping[str, Measurement]) -> list[str]:
    """Says how many page faults a call had at most: many mean that the times are not warm."""
    faults = {name: result.page_faults or 0 for name, result in results.items()}
    worst = max(faults, key=lambda name: faults[name])
    return [f"page faults in a call: at most {faults[worst]:.0f} ({worst})"]


def markdown(machine: dict, tables: Iterable[Table]) -> str:
    origin = f"Measured on {machine_sentence(machine)}, by `{machine['command']}`."
    return "\n\n".join([origin, *(table.markdown() for table in tables)])


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

    measured = [r for r in results if "/" in r.candidate and r.milliseconds]
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
        Patch(color=color, alpha=alpha, label=f"{whose}, {pass_}")
        for color, whose in ((OURS_COLOR, "CARAFE of carafe_d2"), (PEER_COLOR, "others"))
        for alpha, pass_ in ((1, FORWARD), (BACKWARD_ALPHA, FORWARD_BACKWARD))
    ]
    figure.legend(
        handles=legend, loc="outside lower center", ncols=min(4, 2 * columns), frameon=False
    )
    save_figure(path, figure, dpi=130)
    plt.close(figure)


def _draw_panel(axis, case: Case, names: list[str], results: list[Result]) -> None:
    groups = [name.split("/")[0] for name in names]
    # A gap between groups; the first candidate on top.
    places, place = {}, 0.0
    for i, name in enumerate(names):
        place -= 1.6 if i and groups[i] != groups[i - 1] else 1
        places[name] = place
    milliseconds = {(r.candidate, r.pass_): r.milliseconds or 0 for r in results}
    low, high = min(milliseconds.values()) / 2, max(milliseconds.values()) * 5
    for (name, pass_), width in milliseconds.items():
        backward = pass_ == FORWARD_BACKWARD
        axis.barh(
            places[name],
            width - low,
            left=low,
            height=0.78,
            color=OURS_COLOR if name in GROUPS.values() else PEER_COLOR,
            alpha=BACKWARD_ALPHA if backward else 1,
            zorder=1 if backward else 2,
        )
    for name, place in places.items():
        shown = [milliseconds[name, p] for p in PASSES if (name, p) in milliseconds]
        label = " / ".join(map(significant, shown)) or "not measured"
        axis.text(1.08 * max(shown, default=low), place, label, va="center", fontsize=7)
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    axis.set_yticks(list(places.values()), names, fontsize=8)
    axis.set_ylim(min(places.values()) - 0.8, -0.2)
    axis.set_title(
        f"{case.name}  {'x'.join(map(str, case.shape))}, group {case.group}, "
        f"scale {'1/' * case.downsampling}{case.scale}",
        fontsize=9,
    )
    axis.grid(axis="x", linewidth=0.4, color="0.8")
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
