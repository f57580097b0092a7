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
import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import detectron2
import torch
from detectron2.utils.file_io import PathManager

from carafe_d2 import __version__
from carafe_d2.config import load_config
from carafe_d2.data.build import check_datasets
from carafe_d2.errors import UserError, exit_on_user_error

ROOT = Path(__file__).resolve().parents[1]
# The part of the page that this program writes.
BEGIN = "<!-- begin: dev/reproduce.py writes this from results.json -->"
END = "<!-- end -->"
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
    print(shlex.join(command), flush=True)
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    if process.wait():
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        raise UserError(errors[-1].strip() if errors else f"exit code {process.returncode}")
    return {
        **metrics("".join(lines)),
        "machine": machine(num_gpus),
        "software": f"carafe-d2 {__version__}, Detectron2 {detectron2.__version__}, "
        f"PyTorch {torch.__version__}",
        "date": datetime.date.today().isoformat(),
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


def machine(num_gpus: int) -> str:
    if torch.cuda.is_available():
        return f"{num_gpus} x {torch.cuda.get_device_name()}"
    return f"CPU, {os.cpu_count()} cores, {platform.machine()}"


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
    name = file_name(address)
    if folder and (folder / name).is_file():
        return str((folder / name).absolute())
    try:
        return PathManager.get_local_path(address)
    except Exception as error:  # the path handlers raise whatever their protocol raises
        raise UserError(
            f"cannot fetch {address} ({error}); put {name} into a folder and name that with "
            "--checkpoints"
        ) from error


def file_name(address: str) -> str:
    return address.rpartition("/")[2]


def training_command(row: dict) -> list[str]:
    return ["python", "train_net.py", "--config-file", row["training_config"], "--num-gpus", "8"]


# --- the page -----------------------------------------------------------------------------------


def write_page(path: Path, rows: list[dict]) -> None:
    """Puts table and commands of all rows between the marks of a Markdown page.

    Raises:
        UserError: the page is missing or has no marks.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; it needs the lines {BEGIN!r} and {END!r}")
    text = path.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"{path} needs the lines {BEGIN!r} and {END!r}")
    blocks = [table(rows), *(section(row) for row in rows)]
    path.write_text(f"{before}{BEGIN}\n\n" + "\n\n".join(blocks) + f"\n\n{END}{after}")


def table(rows: list[dict]) -> str:
    lines = [
        "| row | model | year | test proposals | published | its checkpoint, measured here "
        "| trained here |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        measured = [figures(row["measured"][kind]) or "not measured" for kind in WEIGHTS]
        model = f"[{row['model']}](../{row['config']})"
        cells = [f"[{row['name']}](#{row['name']})", model, row["year"], row["proposals"]]
        cells += [figures(row["published"]) or "none", *measured]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def figures(result: dict | None) -> str:
    """AP and speed of a result in a table's cell; empty if there are none."""
    if not result:
        return ""
    ap = " / ".join(f"{result[k]:.1f}" for k in ("box AP", "mask AP") if k in result)
    return ap + (f" ({result['images/s']:.1f} images/s)" if "images/s" in result else "")


def section(row: dict) -> str:
    """What a person needs to reproduce a row."""
    evaluation = shlex.join(["python", *evaluation_command(row, row["checkpoint"])])
    lines = [
        f"### {row['name']}",
        "",
        "```sh",
        "# measure the published checkpoint",
        evaluation.replace(" MODEL.WEIGHTS", " \\\n    MODEL.WEIGHTS"),
        "# train the model",
        shlex.join(training_command(row)),
        "```",
    ]
    for kind, result in row["measured"].items():
        if result:
            where = f"{result['machine']}, {result['software']}, {result['date']}"
            lines += ["", f"Measured, {kind}: {where}."]
    return "\n".join(lines)


# --- command line -------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="default: all rows")
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="published",
        help="the published checkpoints, or those that training here has left in output/",
    )
    parser.add_argument(
        "--checkpoints", type=Path, metavar="FOLDER", help="where published ones are looked for"
    )
    parser.add_argument("--num-gpus", type=int, default=1)
    parser.add_argument(
        "--results",
        type=Path,
        metavar="JSON",
        default=ROOT / "docs" / "results.json",
        help="the rows; the page beside it has the same name and ends in .md",
    )
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "reproduce")
    parser.add_argument(
        "--page-only", action="store_true", help="write the page anew without measuring"
    )
    return parser.parse_args()


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
def main():
    args = parse_args()
    rows, wanted = read_rows(args.results, args.rows)
    page = args.results.with_suffix(".md")
    write_page(page, rows)
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
        args.results.write_text(json.dumps({"rows": rows}, indent=2, ensure_ascii=False) + "\n")
        write_page(page, rows)
        report.append(
            f"{name}: {figures(result)}; published: {figures(row['published']) or 'none'}"
        )

    print("", *report, sep="\n")
    if not num_measured:
        raise UserError("no row could be measured, for the reasons above")
    print(f"Written to {page} and {args.results}.")


if __name__ == "__main__":
    main()
