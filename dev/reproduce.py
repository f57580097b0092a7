#!/usr/bin/env python3
"""Evaluates the published results on this machine and writes what it measures into docs/results.md.

Each row of docs/results.json is a published result: a config, a checkpoint and its AP. Every row
whose data and checkpoint can be had is evaluated by train_net.py; of the others it says why not.

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
    command = ["train_net.py", "--config-file", row["config"], *options, "--eval-only"]
    return [*command, "MODEL.WEIGHTS", weights, *row["overrides"]]


def metrics(log: str) -> dict:
    """Reads AP in percent and images per second and device from Detectron2's log.

    Raises:
        UserError: there is no AP in the log.
    """
    found = {}
    for task, name in (("bbox", "box AP"), ("segm", "mask AP")):
        # The lines that Detectron2 prints for spreadsheets: task, names of metrics, values.
        match = re.search(rf"copypaste: Task: {task}\n.*copypaste: AP,.*\n.*copypaste: (.+?),", log)
        if match and match[1] != "nan":
            found[name] = round(float(match[1]), 2)
    if "box AP" not in found:
        raise UserError("the evaluation found no object, so there is no AP")
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
        path = Path(load_config(str(ROOT / row["training_config"])).OUTPUT_DIR, "model_final.pth")
        if not (ROOT / path).is_file():
            raise UserError(f"{path} does not exist; {shlex.join(training_command(row))} writes it")
        return str(path)
    address = row["checkpoint"]
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


def training_command(row: dict) -> list[str]:
    return ["python", "train_net.py", "--config-file", row["training_config"], "--num-gpus", "8"]


# --- the page -----------------------------------------------------------------------------------


def page_content(rows: list[dict]) -> str:
    """Table, origins of what was measured, and the commands."""
    header = ["row", "model", "year", "test proposals", "checkpoint", "published"]
    header += ["its checkpoint, measured here", "trained here"]
    cells = [
        [
            row["name"],
            f"[{row['model']}](../{row['config']})",
            *(str(row["year"]), str(row["proposals"]), f"[file]({row['checkpoint']})"),
            figures(row["published"]) or "none",
            *(figures(row["measured"][kind]) for kind in WEIGHTS),
        ]
        for row in rows
    ]
    origins = [
        f"- `{row['name']}`, {kind}: {result['devices']} x {result['machine']}, "
        f"Detectron2 {result['detectron2']}."
        for row in rows
        for kind, result in row["measured"].items()
        if result
    ]
    commands = [
        "# measure a row: prints the command of train_net.py and runs it",
        f"python dev/reproduce.py --rows {rows[0]['name']}",
        "# train the models; rows that share a checkpoint share a training",
        *dict.fromkeys(shlex.join(training_command(row)) for row in rows),
    ]
    blocks = [
        format_table(header, cells, markdown=True, text_columns=len(header)),
        "Where a cell is empty, nobody has measured it.",
        *(["\n".join(["Measured on:", "", *origins])] if origins else []),
        "\n".join(["```sh", *commands, "```"]),
    ]
    return "\n\n".join(blocks)


def figures(result: dict | None) -> str:
    """AP and speed of a result in a table's cell; empty if there are none."""
    if not result:
        return ""
    ap = " / ".join(f"{result[k]:.1f}" for k in ("box AP", "mask AP") if k in result)
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
            cfg = load_config(str(ROOT / row["config"]), row["overrides"])
            check_datasets(cfg.DATASETS.TEST)
            weights = find_weights(row, args.weights, args.checkpoints)
            output_dir = (args.output / f"{name}_{args.weights}").absolute()
            result = evaluate(row, weights, output_dir, args.num_gpus)
        except UserError as error:
            report.append(f"{name}: not measured: {error}")
            continue
        num_measured += 1
        row["measured"][args.weights] = result
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
