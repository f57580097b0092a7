"""Measures CARAFE against other up- and downsamplers, and detectors with it against those without.

Examples:
    python -m carafe_d2.benchmark
    python -m carafe_d2.benchmark --cases base p3 --dtype float32 bfloat16 --layout channels_last
    python -m carafe_d2.benchmark --detector

docs/benchmark.md says what the columns mean. The detectors need Detectron2, all else needs only
PyTorch, tabulate and, for the plot, matplotlib.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch

from ..collect_env import describe_machine, machine_sentence
from ..errors import UserError, exit_on_user_error
from ..files import MarkdownBlock, write_file
from . import measure, report, upsampling

CPU = torch.device("cpu")
RUNTIMES = ["onnxruntime", "aotinductor"]
DTYPES = ["float32", "float64", "float16", "bfloat16"]


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; --help lists the options")


def positive(kind: type):
    def parse(text: str):
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    description = (__doc__ or "").split("\n\n")[0]
    parser = Parser(prog="python -m carafe_d2.benchmark", description=description)
    add = parser.add_argument
    add("--device", help="cpu or cuda (default: a GPU where there is one)")
    add("--threads", type=positive(int), help="CPU threads (default: all)")
    layouts = list(upsampling.LAYOUTS)
    add("--layout", nargs="+", choices=layouts, metavar="LAYOUT", default=layouts[:1],
        help="contiguous (default), channels_last")  # fmt: skip
    add("--seconds", type=positive(float), metavar="S",
        help="time for each candidate, pass and case (default: 0.5; detectors: 20)")  # fmt: skip
    add("--output", type=Path, metavar="FOLDER", default=Path("output/benchmark"),
        help="where JSON and plot go (default: output/benchmark)")  # fmt: skip
    add("--markdown", type=Path, metavar="FILE", help="put the tables into their block of a page")
    add("--block", metavar="NAME", help="of that block (default: such as 'upsampling cpu')")
    add("--quick", action="store_true", help="tiny sizes and few rounds, to see that it works")

    add = parser.add_argument_group("upsamplers").add_argument
    cases = ", ".join(upsampling.standard_cases(CPU))
    add("--cases", nargs="+", metavar="CASE", help=f"default: {cases}")
    add("--batch", type=positive(int), metavar="N",
        help="images in the cases p3 to p6 (default: 1, on a GPU 2)")  # fmt: skip
    add("--shape", nargs=4, type=positive(int), metavar=("N", "C", "H", "W"),
        help="a case of your own in place of the standard ones")  # fmt: skip
    add("--kernel", type=positive(int), default=5, help="its kernel size (default: 5)")
    add("--group", type=positive(int), default=1, help="its groups (default: 1)")
    add("--scale", type=positive(int), default=2, help="its scale factor (default: 2)")
    add("--downsampling", action="store_true", help="it is a case of downsampling, by that factor")
    add("--dtype", nargs="+", choices=DTYPES, metavar="DTYPE", default=DTYPES[:1],
        help=f"{DTYPES[0]} (default), {', '.join(DTYPES[1:])}")  # fmt: skip
    add("--candidates", nargs="+", metavar="NAME",
        help="names or patterns, e.g. carafe or 'operator/*' (default: all)")  # fmt: skip
    add("--no-peers", action="store_true", help="only what carafe_d2 offers")
    compiled = ", ".join(n for n, c in upsampling.standard_cases(CPU).items() if c.compiled)
    add("--compile", action=argparse.BooleanOptionalAction,
        help="the definitions under torch.compile in all cases or in none, a minute or two for "
             f"each (default: in {compiled}, and in a case of your own)")  # fmt: skip
    add("--skip", type=positive(float), default=5.0, metavar="S",
        help="leave out what takes more seconds a call, except CARAFE (default: 5)")  # fmt: skip
    add("--no-plot", action="store_true", help="do without matplotlib")

    add = parser.add_argument_group("detectors").add_argument
    add("--detector", nargs="*", metavar="CONFIG",
        help="measure detectors in place of upsamplers: names in configs/, or YAML files "
             "(default: Mask and Faster R-CNN, each without and with CARAFE)")  # fmt: skip
    add("--size", nargs=2, type=positive(int), metavar=("H", "W"),
        help="of the image in pixels (default: 800 1333)")  # fmt: skip
    add("--training", action="store_true", help="also a training iteration")
    add("--runtimes", nargs="+", choices=RUNTIMES, metavar="RUNTIME", default=[],
        help="also inference of the exported detectors, whose export takes minutes: "
             f"{', '.join(RUNTIMES)}")  # fmt: skip

    args = parser.parse_args(argv)
    check_combination(args)
    return args


def check_combination(args: argparse.Namespace) -> None:
    """Refuses options that the chosen benchmark would ignore."""
    of_upsamplers = {
        "--cases": args.cases,
        "--shape": args.shape,
        "--candidates": args.candidates,
        "--dtype": args.dtype != DTYPES[:1],
        "--compile": args.compile,
    }
    of_detectors = {"--size": args.size, "--training": args.training, "--runtimes": args.runtimes}
    if args.detector is None:
        for option in (name for name, value in of_detectors.items() if value):
            raise UserError(f"{option} goes with --detector only")
    else:
        for option in (name for name, value in of_upsamplers.items() if value):
            raise UserError(f"{option} does not go with --detector")
        if len(args.layout) > 1:
            raise UserError("--detector takes one --layout at a time")
    if args.downsampling and not args.shape:
        raise UserError("--downsampling goes with --shape only")
    if args.shape and (args.cases or args.batch):
        raise UserError("--shape replaces the standard cases, so --cases and --batch mean nothing")


def choose_device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: expected cpu or cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: PyTorch {torch.__version__} finds no such GPU here")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def choose_cases(args: argparse.Namespace, device: torch.device) -> dict[str, upsampling.Case]:
    if args.shape:
        n, c, h, w = args.shape
        if args.kernel % 2 == 0:
            raise UserError(f"--kernel: expected an odd number, got {args.kernel}")
        if c % args.group:
            raise UserError(f"--group: expected a divisor of the {c} channels, got {args.group}")
        sizes = (n, c, h, w), args.kernel, args.group, args.scale
        options = {"compiled": args.compile is not False, "downsampling": args.downsampling}
        return {"custom": upsampling.Case("custom", *sizes, **options)}
    cases = upsampling.QUICK_CASES if args.quick else upsampling.standard_cases(device, args.batch)
    if args.compile is not None:
        cases = {n: replace(case, compiled=args.compile) for n, case in cases.items()}
    for name in args.cases or ():
        if name not in cases:
            raise UserError(f"--cases: expected some of {', '.join(cases)}, got {name!r}")
    return {name: case for name, case in cases.items() if not args.cases or name in args.cases}


def choose_candidates(args: argparse.Namespace) -> list[upsampling.Candidate]:
    candidates = upsampling.standard_candidates(not args.no_peers)
    chosen = set()
    for pattern in args.candidates or ["*"]:
        matching = {
            name
            for name in candidates
            if fnmatch(name, pattern) or fnmatch(name.split("/")[1], pattern)
        }
        if not matching:
            known = ", ".join(candidates)
            raise UserError(f"--candidates: expected some of {known}, got {pattern!r}")
        chosen |= matching
    return [candidate for name, candidate in candidates.items() if name in chosen]


def benchmark_upsamplers(
    args: argparse.Namespace, device: torch.device, machine: dict
) -> list[report.Table]:
    cases = choose_cases(args, device)
    candidates = choose_candidates(args)
    cases = {name: case for name, case in cases.items() if any(c.suits(case) for c in candidates)}
    if not args.no_plot and not find_spec("matplotlib"):
        raise UserError("the plot needs matplotlib: pip install matplotlib, or use --no-plot")
    settings = {
        "seconds": args.seconds or (0.01 if args.quick else 0.5),
        "skip": args.skip,
        "quick": args.quick,
    }
    benchmark = upsampling.Benchmark(candidates, device, **settings)
    print(report.UPSAMPLING_NOTE)
    tables = []
    results: list[upsampling.Result] = []
    for dtype, layout in product(args.dtype, args.layout):
        rows = []
        for case in cases.values():
            of_case = list(benchmark.run(case, getattr(torch, dtype), layout))
            tables.append(report.upsampling_table(case, of_case))
            print(f"\n{tables[-1].text()}", flush=True)
            rows += of_case
            # after every case, so that a failure later on loses nothing
            content = [result.as_dict() for result in [*results, *rows]]
            write_json(args.output / "upsampling.json", machine, settings, content)
        if not args.no_plot:
            title = f"{dtype}, {layout}\n{machine_sentence(machine)}"
            path = args.output / f"upsampling_{dtype}_{layout}.png"
            report.plot(path, title, cases, rows)
        results += rows
    return tables


def benchmark_detectors(
    args: argparse.Namespace, device: torch.device, machine: dict
) -> list[report.Table]:
    if not find_spec("detectron2"):
        raise UserError("--detector needs Detectron2; python dev/install_detectron2.py installs it")
    from . import detectors

    (layout,) = args.layout
    settings = {
        "seconds": args.seconds or (0.01 if args.quick else 20),
        "size": args.size or ([64, 96] if args.quick else [800, 1333]),
        "layout": layout,
        "weights": f"random, seed {detectors.SEED}",
    }
    names = args.detector or detectors.DEFAULT_CONFIGS
    benchmark = detectors.Benchmark(names, settings["size"], layout, device, args.runtimes)
    tables, results = [], []
    for mode in detectors.MODES[: 2 if args.training else 1]:
        of_mode = list(benchmark.run(mode, settings["seconds"]))
        tables.append(report.detector_table(mode, settings["size"], of_mode))
        print(f"\n{tables[-1].text()}", flush=True)
        results += [result.as_dict() for result in of_mode]
        write_json(args.output / "detectors.json", machine, settings, results)
    return tables


def write_json(path: Path, machine: dict, settings: dict, results: list[dict]) -> None:
    content = {"machine": machine, "settings": settings, "results": results}
    write_file(path, json.dumps(content, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    device = choose_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    subject = "upsampling" if args.detector is None else "detectors"
    block = None
    if args.markdown:  # looked for first, because measuring takes minutes
        block = MarkdownBlock(args.markdown, args.block or f"{subject} {device.type}")
    machine = describe_machine(str(device))
    machine["command"] = shlex.join(["python", "-m", "carafe_d2.benchmark", *argv])
    print(machine_sentence(machine))
    benchmark = benchmark_upsamplers if args.detector is None else benchmark_detectors
    tables = benchmark(args, device, machine)
    if block:
        block.write(report.markdown(machine, tables))
    print(f"\nwritten to {args.output}" + (f" and {args.markdown}" if block else ""))


if __name__ == "__main__":
    with exit_on_user_error():
        measure.keep_freed_memory()
        main()
