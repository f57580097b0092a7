#!/usr/bin/env python3
"""Checks carafe_d2 on this machine's GPU, stage by stage, and writes one report.

Examples:
    python dev/gpu_check.py
    python dev/gpu_check.py --stages tests memcheck racecheck
    python dev/gpu_check.py --mmcv mmcv-2.2.0.tar.gz --write-docs

docs/gpu.md says what the stages show. A stage that fails or lacks something does not stop the
others; the exit code is 1 if one failed. This file imports nothing of carafe_d2, which may not be
built yet.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TAIL_LINES = 30  # of a stage's output that the report shows
PASSED, FAILED, SKIPPED, NOT_RUN = "passed", "failed", "skipped", "not run"
# What the quick start has to reach on a CPU: metric, middle and half width.
EXPECTED_RESULTS = "[['bbox', 'AP', 60.0, 20.0], ['segm', 'AP', 55.0, 20.0]]"
QUICK_DATASET = ["--train", "12", "--val", "4", "--size", "64"]


@dataclass(frozen=True)
class Plan:
    """What a stage runs.

    Attributes:
        commands: one after another, in the repository's root, until one fails.
        environment: variables for them.
        obstacle: why they cannot run here, if so.
    """

    commands: Sequence[Sequence[str]] = ()
    environment: dict[str, str] = field(default_factory=dict)
    obstacle: str | None = None


@dataclass
class Outcome:
    """What came of a stage."""

    stage: str
    about: str
    result: str = NOT_RUN
    reason: str = ""
    commands: list[str] = field(default_factory=list)
    seconds: float = 0.0
    output: str = ""  # its last lines

    @property
    def verdict(self) -> str:
        return f"{self.result}: {self.reason}" if self.reason else self.result


# -------------------------------------------------------------------------- what there is here


def find_nvcc() -> str | None:
    return runpy.run_path(str(ROOT / "setup.py"))["find_nvcc"]()


def find_sanitizer() -> str | None:
    """compute-sanitizer on the PATH, in the toolkit of nvcc, or in a package of pip's."""
    name = "compute-sanitizer"
    nvcc = find_nvcc()
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1]]
    homes += ["/usr/local/cuda"]
    nvidia = find_spec("nvidia")
    for folder in nvidia.submodule_search_locations if nvidia else []:
        homes += sorted(Path(folder).iterdir())
    candidates = [Path(home, part, name) for home in homes if home for part in ("bin", name)]
    found = shutil.which(name)
    return found or next((str(path) for path in candidates if path.is_file()), None)


def missing_for_training() -> str | None:
    needed = {"detectron2": "Detectron2", "pycocotools": "pycocotools", "cv2": "OpenCV"}
    missing = [name for module, name in needed.items() if not find_spec(module)]
    return f"{' and '.join(missing)} not installed" if missing else None


def describe_pytorch() -> tuple[str, str | None, list[str]]:
    """PyTorch's version, its CUDA's, and the GPUs that it can use."""
    import torch

    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    described = [
        f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, "
        f"compute capability {gpu.major}.{gpu.minor}"
        for gpu in gpus
    ]
    return torch.__version__, torch.version.cuda, described


def output_of(*command: str) -> str:
    """What a program prints, or nothing if it fails or is not there."""
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def describe_machine() -> dict[str, str]:
    """What has to be known about the machine to read a report.

    Raises:
        SystemExit: there is no GPU that PyTorch can use.
    """
    if not find_spec("torch"):
        sys.exit("error: gpu-check needs PyTorch, which is not installed")
    # In a process of its own: once used, a GPU keeps memory for the process.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        torch_version, cuda, gpus = pool.submit(describe_pytorch).result()
    if not gpus:
        sys.exit(f"error: gpu-check needs a CUDA GPU, and PyTorch {torch_version} finds none")
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    nvcc = find_nvcc()
    release = re.search(r"release ([\d.]+)", output_of(nvcc, "--version") if nvcc else "")
    commit = output_of("git", "rev-parse", "HEAD")
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": (commit or "unknown") + ", with changes" * bool(changed),
        "GPU": "; ".join(gpus),
        "driver": driver.split("\n")[0] or "unknown",
        "CUDA of PyTorch": cuda,
        "nvcc": release[1] if release else "not found",
        "PyTorch": torch_version,
        "Python": platform.python_version(),
        "Detectron2": version_of("detectron2"),
        "system": platform.platform(),
        "processors": str(os.cpu_count()),
    }


# ---------------------------------------------------------------------------------- the stages


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def build(args: argparse.Namespace) -> Plan:
    if args.no_build:
        return Plan(obstacle="--no-build")
    if find_nvcc() is None:
        return Plan(obstacle="no nvcc found; set CUDA_HOME to a CUDA toolkit")
    return Plan([python("setup.py", "build_ext", "--inplace")], {"CARAFE_D2_CUDA": "1"})


def nvcc(args: argparse.Namespace) -> Plan:
    if args.quick:
        return Plan(obstacle="--quick")
    if find_nvcc() is None:
        return Plan(obstacle="no nvcc found; set CUDA_HOME to a CUDA toolkit")
    return Plan([python("-m", "pytest", "-rs", "tests/test_nvcc.py")])


def tests(args: argparse.Namespace) -> Plan:
    marker = "gpu and not slow" if args.quick else "gpu"
    return Plan([python("-m", "pytest", "-q", "-rs", "-m", marker, "tests")])


def grad_check(args: argparse.Namespace) -> Plan:
    return Plan([python("-m", "carafe_d2.grad_check", "--device", "cuda")])


def sanitizer(tool: str, args: argparse.Namespace) -> Plan:
    program = find_sanitizer()
    if program is None:
        return Plan(obstacle="compute-sanitizer is neither on the PATH nor in the CUDA toolkit")
    # What the driver refuses to PyTorch when it asks for optional features is none of our errors.
    options = ["--report-api-errors", "no"] if tool == "memcheck" else []
    options = [program, "--tool", tool, "--error-exitcode", "86", *options]
    program = python("-m", "pytest", "-q", "tests/test_gpu.py", "-k", "test_small_shapes")
    # Memory that PyTorch caches has no bounds that a tool could know.
    return Plan([[*options, *program]], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def mmcv(args: argparse.Namespace) -> Plan:
    if args.mmcv is None:
        benchmark = "with the one installed" if find_spec("mmcv") else "without mmcv"
        return Plan(obstacle=f"no --mmcv given; the benchmark runs {benchmark}")
    if find_nvcc() is None:
        return Plan(obstacle="no nvcc found; set CUDA_HOME to a CUDA toolkit")
    script = "dev/build_mmcv_carafe.py"
    return Plan([python(script, args.mmcv, "--output", args.output / "mmcv")])


def benchmark_command(args: argparse.Namespace, *arguments: object) -> list[str]:
    options = ["--quick"] if args.quick else []
    if args.write_docs:
        options += ["--markdown", "docs/benchmark.md"]
    output = args.output / "benchmark"
    return python(
        "python -m carafe_d2.benchmark",
        "--device",
        "cuda",
        *arguments,
        *options,
        "--output",
        output,
    )


def benchmark(args: argparse.Namespace) -> Plan:
    command = benchmark_command(
        args,
        *("--dtype", "float32", "float16", "--layout", "contiguous", "channels_last"),
        *("--seconds", "0.3"),
        *([] if find_spec("matplotlib") else ["--no-plot"]),
    )
    folder = args.output / "mmcv"
    if not (ROOT / folder / "mmcv" / "carafe.so").is_file():
        return Plan([command])
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return Plan([command], {"PYTHONPATH": os.pathsep.join(paths)})


def detectors(args: argparse.Namespace) -> Plan:
    if obstacle := missing_for_training():
        return Plan(obstacle=obstacle)
    return Plan([benchmark_command(args, "--detector", "--training")])


def training(amp: bool, args: argparse.Namespace) -> Plan:
    if obstacle := missing_for_training():
        return Plan(obstacle=obstacle)
    datasets = args.output / ("datasets_quick" if args.quick else "datasets")
    if args.quick:
        extent = ["SOLVER.MAX_ITER", "20"]
    else:
        extent = ["TEST.EXPECTED_RESULTS", EXPECTED_RESULTS]
    return Plan(
        [
            python(
                *("-m", "carafe_d2.data.shapes", "--root", datasets),
                *(QUICK_DATASET if args.quick else []),
            ),
            python(
                *("train_net.py", "--config-file", "configs/shapes_mask_rcnn_R18_FPN_carafe.yaml"),
                *("MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", amp, *extent),
                *("OUTPUT_DIR", args.output / ("training_amp" if amp else "training_float32")),
            ),
        ],
        {"DETECTRON2_DATASETS": str(datasets)},
    )


# By name: what it shows, and what plans it.
STAGES: dict[str, tuple[str, Callable[[argparse.Namespace], Plan]]] = {
    "build": ("the operator compiles for the GPUs of this machine", build),
    "nvcc": ("machine code for every supported GPU, without register spills", nvcc),
    "tests": ("the tests that need a GPU", tests),
    "grad_check": ("gradients in float64, and times", grad_check),
    "memcheck": ("no access outside a tensor", partial(sanitizer, "memcheck")),
    "racecheck": ("no race in shared memory", partial(sanitizer, "racecheck")),
    "initcheck": ("nothing read that was not written", partial(sanitizer, "initcheck")),
    "synccheck": ("no invalid barrier", partial(sanitizer, "synccheck")),
    "mmcv": ("mmcv's CARAFE compiles, as a peer for the benchmark", mmcv),
    "benchmark": ("operators and upsamplers beside their peers", benchmark),
    "detectors": ("whole detectors with and without CARAFE", detectors),
    "training": ("a small Mask R-CNN trains in float32", partial(training, False)),
    "training_amp": ("the same with automatic mixed precision", partial(training, True)),
}


# ---------------------------------------------------------------------------- running a stage


def shown(command: Sequence[str], environment: dict[str, str]) -> str:
    """A command as one types it, without this environment's path to Python."""
    words = ["python" if word == sys.executable else word for word in command]
    variables = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join([*variables, shlex.join(words)])


def run_command(
    command: Sequence[str], environment: dict[str, str], log: Path, timeout: float
) -> str | None:
    """Runs a command; its output is appended to a file.

    Returns:
        What went wrong, if anything.
    """
    with log.open("a") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            return f"took longer than {timeout / 60:g} minutes"
        finally:
            if process.poll() is None:  # with whatever it has started
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"exit code {code}" if code else None


def run_stage(outcome: Outcome, plan: Plan, folder: Path, timeout: float) -> None:
    """Runs what a stage plans and notes what came of it."""
    outcome.commands = [shown(command, plan.environment) for command in plan.commands]
    if plan.obstacle:
        outcome.result, outcome.reason = SKIPPED, plan.obstacle
        return
    log = folder / f"{outcome.stage}.log"
    log.write_text("")
    start = time.monotonic()
    outcome.result = PASSED
    for command in plan.commands:
        try:
            failure = run_command(command, plan.environment, log, timeout)
        except OSError as error:
            failure = str(error)
        if failure:
            outcome.result, outcome.reason = FAILED, failure
            break
    outcome.seconds = time.monotonic() - start
    lines = log.read_text(errors="replace").splitlines()
    outcome.output = "\n".join(lines[-TAIL_LINES:])


# ------------------------------------------------------------------------------------ report

FIGURES = """\
## Figures

`docs/benchmark.md` takes its GPU tables from these commands, which the stages `benchmark` and
`detectors` run with `--write-docs`:

```sh
{}
```

Commit them together with the first table of this report: figures without date, GPU and PyTorch
version mean nothing.
"""


def figure_commands(args: argparse.Namespace) -> list[str]:
    args = argparse.Namespace(**vars(args) | {"write_docs": True, "quick": False})
    plans = [benchmark(args), detectors(args)]
    return [shown(command, plan.environment) for plan in plans for command in plan.commands]


def markdown(machine: dict[str, str], outcomes: Sequence[Outcome], figures: list[str]) -> str:
    counts = [sum(o.result == result for o in outcomes) for result in (PASSED, FAILED, SKIPPED)]
    lines = ["# GPU check", "", "| | |", "| :-- | :-- |"]
    lines += [f"| {name} | {value} |" for name, value in machine.items()]
    lines += ["", "{} passed, {} failed, {} skipped".format(*counts), ""]
    lines += ["| stage | shows | result | seconds |", "| :-- | :-- | :-- | --: |"]
    for o in outcomes:
        lines.append(f"| {o.stage} | {o.about} | {o.verdict} | {o.seconds:.0f} |")
    lines += ["", FIGURES.format("\n".join(figures))]
    for o in outcomes:
        if o.result in (PASSED, FAILED):
            fence = "````"  # output may hold three
            lines += [f"## {o.stage}: {o.result}", "", f"{fence}sh", *o.commands, fence, ""]
            lines += [f"The last lines of its output, `{o.stage}.log`:", ""]
            lines += [f"{fence}text", o.output, fence, ""]
    return "\n".join(lines)


def write_report(
    folder: Path, machine: dict[str, str], outcomes: Sequence[Outcome], figures: list[str]
) -> None:
    (folder / "report.md").write_text(markdown(machine, outcomes, figures))
    content = {"machine": machine, "stages": [asdict(outcome) for outcome in outcomes]}
    (folder / "report.json").write_text(json.dumps(content, indent=2) + "\n")


# -------------------------------------------------------------------------------------- main


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        sys.exit(f"error: {message}; --help lists the options")


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--stages", nargs="+", choices=list(STAGES), metavar="STAGE", default=list(STAGES),
        help=f"some of {', '.join(STAGES)} (default: all)")  # fmt: skip
    add("--quick", action="store_true", help="small sizes, no slow tests: does it work at all?")
    add("--no-build", action="store_true", help="use the library that is there")
    add("--mmcv", type=Path, metavar="SOURCE",
        help="mmcv's source archive or folder, to build its CARAFE as a peer")  # fmt: skip
    add("--write-docs", action="store_true", help="put the benchmark's tables into docs/")
    add("--timeout", type=float, default=60, metavar="MINUTES",
        help="for each command (default: 60)")  # fmt: skip
    add("--output", type=Path, metavar="FOLDER", default=ROOT / "output" / "gpu_check",
        help="where report and logs go (default: output/gpu_check)")  # fmt: skip
    args = parser.parse_args(arguments)
    if args.quick and args.write_docs:
        sys.exit("error: --quick measures nothing that --write-docs could write")
    if args.mmcv:
        args.mmcv = args.mmcv.resolve()
    # as the commands see it, which run in the repository's root
    args.output = Path(os.path.relpath(args.output, ROOT))
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    machine = describe_machine()
    folder = (ROOT / args.output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = [Outcome(name, STAGES[name][0]) for name in args.stages]
    for outcome in outcomes:
        print(f"{outcome.stage}: {outcome.about} ... ", end="", flush=True)
        plan = STAGES[outcome.stage][1](args)
        run_stage(outcome, plan, folder, 60 * args.timeout)
        print(outcome.verdict, f"({outcome.seconds:.0f} s)")
        write_report(folder, machine, outcomes, figure_commands(args))
    print(f"\nwritten to {folder / 'report.md'}")
    if any(outcome.result == FAILED for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
