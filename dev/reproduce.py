#!/usr/bin/env python3
"""Evaluates the published results on this machine and writes what it measures into docs/results.md.

Each row of docs/results.json is a result that was published, or a variant beside such: the config
and the overrides that train it, a checkpoint, if there is one, and figures, so far as they are at
hand. Every row whose data and checkpoint can be had is evaluated by train_net.py; of the others it
says why not.

Examples:
    python dev/reproduce.py
    python dev/reproduce.py --rows mask_rcnn_2020_1000 --checkpoints ~/checkpoints --num-gpus 8
    python dev/reproduce.py --weights trained
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import detectron2
import torch
from detectron2.utils.file_io import PathManager

from carafe_d2.collect_env import describe_machine, machine_sentence
from carafe_d2.config import load_config
from carafe_d2.data.build import check_datasets
from carafe_d2.errors import UserError, exit_on_user_error
from carafe_d2.files import MarkdownBlock, format_table, write_file

ROOT = Path(__file__).resolve().parents[1]
BLOCK = "dev/reproduce.py writes this from results.json"
WEIGHTS = ("published", "trained")


# --- one row ------------------------------------------------------------------------------------


def evaluate(row: dict, weights: str, output_dir: Path, num_gpus: int) -> dict:
    """Evaluates a row and returns what was measured, as results.json keeps it.

    Args:
        row: a row of results.json.
        weights: path of the checkpoint.
        output_dir: where train_net.py writes to.
        num_gpus: GPUs to use.

    Raises:
        UserError: the evaluation failed or found nothing.
    """
    command = evaluation_command(row, weights, "--num-gpus", str(num_gpus))
    command += ["OUTPUT_DIR", str(output_dir)]
    print(shlex.join(["python", *command]), flush=True)
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log = ""
    for line in process.stdout or ():
        print(line, end="", flush=True)
        log += line
    if process.wait():
        errors = re.findall("^error: (.*)", log, re.MULTILINE)
        raise UserError(errors[-1] if errors else f"exit code {process.returncode}")
    machine = describe_machine("cuda" if torch.cuda.is_available() else "cpu")
    return {
        **metrics(log),
        "machine": machine_sentence(machine),
        "devices": num_gpus,
        "detectron2": detectron2.__version__,
    }


def evaluation_command(row: dict, weights: str, *options: str) -> list[str]:
    """The arguments of Python that evaluate a row with the given weights."""
    command = ["train_net.py", "--config-file", config_of(row), *options, "--eval-only"]
    return [*command, "MODEL.WEIGHTS", weights, *overrides_of(row)]


def config_of(row: dict) -> str:
    """The config that evaluates a row, where that is another than the one that trains it."""
    return row.get("config", row["training_config"])


def overrides_of(row: dict) -> list[str]:
    """Keys and values that make the row's model and its evaluation of its config."""
    return [*training_overrides(row), *row.get("overrides", [])]


# By the name of a task in Detectron2's log the metrics that count: their names there and here, and
# how many digits are shown.
METRICS = {
    "bbox": {"AP": ("box AP", 1)},
    "segm": {"AP": ("mask AP", 1)},
    "sem_seg": {"mIoU": ("mIoU", 2), "pACC": ("pixel accuracy", 2)},
    "inpainting": {"PSNR": ("PSNR", 2), "L1": ("L1", 2)},
}


def metrics(log: str) -> dict:
    """Reads metrics in percent or dB, and images per second and device, from Detectron2's log.

    Raises:
        UserError: there is no box AP, mIoU or PSNR in the log.
    """
    found = {}
    for task, names in METRICS.items():
        # The lines that Detectron2 prints for spreadsheets: task, names of metrics, values.
        lines = re.search(rf"copypaste: Task: {task}\n.*copypaste: (.+)\n.*copypaste: (.+)", log)
        if lines:
            values = dict(zip(*(line.split(",") for line in lines.groups()), strict=True))
            for theirs, (ours, _) in names.items():
                if values[theirs] != "nan":
                    found[ours] = round(float(values[theirs]), 2)
    if not found.keys() & {"box AP", "mIoU", "PSNR"}:
        raise UserError(
            "the evaluation found nothing, so there is no AP or mIoU; of test-dev, COCO's server "
            "takes the coco_instances_results.json in the output folder"
        )
    seconds = re.search(r"pure compute time: .* \(([\d.]+) s / iter per device", log)
    if seconds:
        found["images/s"] = round(1 / float(seconds[1]), 2)
    return found


def find_weights(row: dict, kind: str, folder: Path | None) -> str:
    """Path of the checkpoint that a row is evaluated with; fetches it if need be.

    Args:
        row: a row of results.json.
        kind: "published", or "trained" for the one that the row's training leaves behind.
        folder: where published checkpoints are looked for before they are fetched.

    Raises:
        UserError: it is missing or cannot be fetched.
    """
    if kind == "trained":
        cfg = load_config(str(ROOT / row["training_config"]), training_overrides(row))
        path = Path(cfg.OUTPUT_DIR, "model_final.pth")
        if not (ROOT / path).is_file():
            raise UserError(f"{path} does not exist; {shlex.join(training_command(row))} writes it")
        return str(path)
    address = row.get("checkpoint")
    if not address:
        raise UserError("no checkpoint was published; with --weights trained it can be measured")
    name = address.rpartition("/")[2]
    if folder and (folder / name).is_file():
        return str((folder / name).absolute())
    try:
        return PathManager.get_local_path(address)
    except Exception as error:  # the path handlers raise whatever their protocol raises
        raise UserError(
            f"cannot fetch {address} ({error}); put {name} into a folder and name that with "
            "--checkpoints"
        ) from error


def training_overrides(row: dict) -> list[str]:
    """Keys and values that make the row's model of its config, where no config is that model."""
    return row.get("training_overrides", [])


def training_command(row: dict) -> list[str]:
    command = ["python", "train_net.py", "--config-file", row["training_config"], "--num-gpus", "8"]
    return [*command, *training_overrides(row)]


# --- the page -----------------------------------------------------------------------------------


# By the name of a table its title, what tells its rows apart, and where the figures are from. The
# one of MMDetection's checkpoints has columns of its own.
_NOTES = "from notes on the CARAFE paper (arXiv 1905.02188)"
_DEFAULT = "only the default's is at hand; MMDetection's page of 2019 gives it, too"
TABLES = {
    "test_dev": ("COCO test-dev", "CARAFE in", f"{_NOTES}."),
    "placement": (
        "Where CARAFE stands",
        "CARAFE in",
        f"{_NOTES}; MMDetection's page of 2019 gives the last, too.",
    ),
    "pyramid_upsampler": ("Upsamplers in the pyramid", "upsampler", f"{_NOTES}."),
    "mask_head_upsampler": ("Upsamplers in the mask head", "upsampler", f"{_NOTES}."),
    "kernels": (
        "Sizes of the kernels",
        "encoder, reassembly",
        f"{_DEFAULT}.\nBy the notes the paper's go from 37.3 to 38.1; which is which is not known.",
    ),
    "compressor": ("Width of the compressor", "channels", f"{_DEFAULT}."),
    "normalizer": ("Normalizers", "normalizer", f"{_DEFAULT}."),
    "upernet": ("UPerNet on ADE20K", "CARAFE in", f"{_NOTES}."),
    "inpainting": ("Inpainting on Places", "upsampler", f"{_NOTES}."),
}


def page_content(rows: list[dict]) -> str:
    """Tables with the commands that train their rows, and the origins of what was measured."""
    mmdetection = [row for row in rows if row["table"] == "mmdetection"]
    blocks = [
        "### MMDetection's checkpoints",
        _mmdetection_table(mmdetection),
        _training_commands(mmdetection),
    ]
    for table, (title, variant, source) in TABLES.items():
        if of_table := [row for row in rows if row["table"] == table]:
            blocks += [
                f"### {title}",
                f"Figures: {source}",
                _paper_table(of_table, variant),
                _training_commands(of_table),
            ]
    origins = [
        f"- `{row['name']}`, {kind}: {result['devices']} x {result['machine']}, "
        f"Detectron2 {result['detectron2']}."
        for row in rows
        for kind, result in row.get("measured", {}).items()
        if result
    ]
    if origins:
        blocks.append("\n".join(["Measured on:", "", *origins]))
    return "\n\n".join(blocks)


def _training_commands(rows: list[dict]) -> str:
    commands = dict.fromkeys(shlex.join(training_command(row)) for row in rows)
    return "\n".join(["```sh", *commands, "```"])


def _mmdetection_table(rows: list[dict]) -> str:
    header = ["row", "model", "year", "test proposals", "checkpoint", "published"]
    header += ["its checkpoint, measured here", "trained here"]
    cells = [
        [
            row["name"],
            f"[{row['model']}](../{config_of(row)})",
            *(str(row["year"]), str(row["proposals"]), f"[file]({row['checkpoint']})"),
            figures(row["published"]) or "none",
            *(figures(row.get("measured", {}).get(kind)) for kind in WEIGHTS),
        ]
        for row in rows
    ]
    return format_table(header, cells, markdown=True, text_columns=len(header))


def _paper_table(rows: list[dict], variant: str) -> str:
    header = ["row", "model", variant, "published", "trained here"]
    cells = [
        [
            row["name"],
            f"[{row['model']}](../{config_of(row)})",
            row["variant"],
            figures(row["published"]) or "not at hand",
            figures(row.get("measured", {}).get("trained")),
        ]
        for row in rows
    ]
    return format_table(header, cells, markdown=True, text_columns=len(header))


def figures(result: dict | None) -> str:
    """Metrics and speed of a result in a table's cell; empty if there are none."""
    if not result:
        return ""
    shown = [metric for names in METRICS.values() for metric in names.values()]
    ap = " / ".join(f"{result[name]:.{digits}f}" for name, digits in shown if name in result)
    return ap + (f" ({result['images/s']:.1f} images/s)" if "images/s" in result else "")


# --- command line -------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--rows", nargs="+", metavar="NAME", help="default: all rows")
    add("--weights", choices=WEIGHTS, default="published",
        help="the published checkpoints, or those that training here has left in output/",
    )  # fmt: skip
    add("--checkpoints", type=Path, metavar="FOLDER", help="where published ones are looked for")
    add("--num-gpus", type=int, default=1)
    add("--results", type=Path, metavar="JSON", default=ROOT / "docs" / "results.json",
        help="the rows; the page beside it has the same name and ends in .md",
    )  # fmt: skip
    add("--output", type=Path, default=ROOT / "output" / "reproduce")
    add("--page-only", action="store_true", help="write the page anew without measuring")
    return parser.parse_args(argv)


def read_rows(path: Path, names: list[str] | None) -> tuple[list[dict], list[dict]]:
    """All rows, and those that were asked for.

    Raises:
        UserError: the file is no table of results, or a name is not in it.
    """
    try:
        rows = json.loads(path.read_text())["rows"]
        known = [row["name"] for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no table of results: {error}") from error
    for name in names or []:
        if name not in known:
            raise UserError(f"there is no row {name!r}; rows are {', '.join(known)}")
    return rows, [row for row in rows if not names or row["name"] in names]


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    rows, wanted = read_rows(args.results, args.rows)
    page = args.results.with_suffix(".md")
    block = MarkdownBlock(page, BLOCK)
    block.write(page_content(rows))
    if args.page_only:
        return

    report, num_measured = [], 0
    for row in wanted:
        name = row["name"]
        try:
            cfg = load_config(str(ROOT / config_of(row)), overrides_of(row))
            check_datasets(cfg.DATASETS.TEST)
            weights = find_weights(row, args.weights, args.checkpoints)
            output_dir = (args.output / f"{name}_{args.weights}").absolute()
            result = evaluate(row, weights, output_dir, args.num_gpus)
        except UserError as error:
            report.append(f"{name}: not measured: {error}")
            continue
        num_measured += 1
        row.setdefault("measured", {})[args.weights] = result
        # After every row, so that nothing is lost when the next one is interrupted.
        write_file(args.results, json.dumps({"rows": rows}, indent=2, ensure_ascii=False) + "\n")
        block.write(page_content(rows))
        published = figures(row["published"]) or "none"
        report.append(f"{name}: {figures(result)}; published: {published}")

    print("", *report, sep="\n")
    if not num_measured:
        raise UserError("no row could be measured, for the reasons above")
    print(f"Written to {page} and {args.results}.")


if __name__ == "__main__":
    main()
