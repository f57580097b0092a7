#!/usr/bin/env python3
"""Checks carafe_d2 on this machine's GPU, stage by stage, and writes one report.

Examples:
    python dev/gpu_check.py
    python dev/gpu_check.py --stages build environment tests memcheck
    python dev/gpu_check.py --mmcv mmcv-2.2.0.tar.gz --write-docs

docs/gpu.md says what the stages show. A stage that fails or lacks something does not stop the
others; the exit code is 1 if one failed. Each stage is made to fit into ten minutes, and the report
keeps what it has of stages that are not run again, so they may be run one by one.
"""

import argparse
import json
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from carafe_d2.collect_env import run_apart
from carafe_d2.errors import UserError, exit_on_user_error
from carafe_d2.files import format_table, write_file

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
    for folder in (nvidia and nvidia.submodule_search_locations) or []:
        homes += sorted(Path(folder).iterdir())
    candidates = [Path(home, part, name) for home in homes if home for part in ("bin", name)]
    found = shutil.which(name)
    return found or next((str(path) for path in candidates if path.is_file()), None)


def describe_gpu_machine() -> dict[str, str]:
    """What has to be known about the machine to read a report.

    Raises:
        UserError: there is no GPU that PyTorch can use.
    """
    # In a process of its own: once used, a GPU keeps memory for the process.
    code = "import json, carafe_d2.collect_env as c; print(json.dumps(c.describe_machine('cuda')))"
    described = run_apart("-c", code)
    if described.startswith("FAILS"):
        raise UserError(f"gpu-check needs a CUDA GPU: {described.rpartition('Error: ')[2]}")
    return {name: str(value) for name, value in json.loads(described).items()}


# ---------------------------------------------------------------------------------- the stages

NO_NVCC = "no nvcc found; set CUDA_HOME to a CUDA toolkit"


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def build(args: argparse.Namespace) -> Plan:
    if args.no_build:
        return Plan(obstacle="--no-build")
    if find_nvcc() is None:
        return Plan(obstacle=NO_NVCC)
    return Plan([python("setup.py", "build_ext", "--inplace")], {"CARAFE_D2_CUDA": "1"})


def environment(args: argparse.Namespace) -> Plan:
    return Plan([python("-m", "carafe_d2.collect_env")])


def nvcc(args: argparse.Namespace) -> Plan:
    if args.quick:
        return Plan(obstacle="--quick")
    if find_nvcc() is None:
        return Plan(obstacle=NO_NVCC)
    return Plan([python("-m", "pytest", "-rs", "tests/test_nvcc.py")])


def tests(marker: str, args: argparse.Namespace) -> Plan:
    if args.quick and marker == "slow":
        return Plan(obstacle="--quick")
    return Plan([python("-m", "pytest", "-q", "-rs", "-m", f"gpu and {marker}", "tests")])


def grad_check(args: argparse.Namespace) -> Plan:
    return Plan([python("-m", "carafe_d2.grad_check", "--device", "cuda")])


def sanitizer(tool: str, args: argparse.Namespace) -> Plan:
    program = find_sanitizer()
    if program is None:
        return Plan(obstacle="compute-sanitizer is neither on the PATH nor in the CUDA toolkit")
    # What the driver refuses to PyTorch when it asks for optional features is none of our errors.
    options = ["--report-api-errors", "no"] if tool == "memcheck" else []
    options = [program, "--tool", tool, "--error-exitcode", "86", *options]
    tests = python("-m", "pytest", "-q", "tests/test_gpu.py", "-k", "test_small_shapes")
    # Memory that PyTorch caches has no bounds that a tool could know.
    return Plan([[*options, *tests]], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def mmcv(args: argparse.Namespace) -> Plan:
    if args.mmcv is None:
        benchmark = "with the one installed" if find_spec("mmcv") else "without mmcv"
        return Plan(obstacle=f"no --mmcv given; the benchmark runs {benchmark}")
    if find_nvcc() is None:
        return Plan(obstacle=NO_NVCC)
    script = "dev/build_mmcv_carafe.py"
    return Plan([python(script, args.mmcv, "--output", args.output / "mmcv")])


def benchmark(*arguments: str, args: argparse.Namespace, block: str) -> Plan:
    """A run of carafe_d2.benchmark, with the mmcv that an earlier stage has built."""
    command = python("-m", "carafe_d2.benchmark", "--device", "cuda", *arguments)
    command += ["--output", str(args.output / block.replace(" ", "_"))]
    command += ["--quick"] if args.quick else []
    command += ["--markdown", "docs/benchmark.md", "--block", block] if args.write_docs else []
    folder = args.output / "mmcv"
    if not (ROOT / folder / "mmcv" / "carafe.so").is_file():
        return Plan([command])
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return Plan([command], {"PYTHONPATH": os.pathsep.join(paths)})


def upsamplers(args: argparse.Namespace, block: str, *arguments: str) -> Plan:
    plot = [] if find_spec("matplotlib") else ["--no-plot"]
    layouts = ["--layout", "contiguous", "channels_last", "--seconds", "0.2"]
    return benchmark(*arguments, *layouts, *plot, args=args, block=block)


def float32(args: argparse.Namespace) -> Plan:
    return upsamplers(args, "upsampling cuda", "--dtype", "float32")


def half(args: argparse.Namespace) -> Plan:
    types = ["--dtype", "float16", "bfloat16", "--no-compile"]
    return upsamplers(args, "upsampling cuda half", *types)


def missing_for_training() -> str | None:
    needed = {"detectron2": "Detectron2", "pycocotools": "pycocotools", "cv2": "OpenCV"}
    missing = [name for module, name in needed.items() if not find_spec(module)]
    return f"{' and '.join(missing)} not installed" if missing else None


def detectors(args: argparse.Namespace) -> Plan:
    if obstacle := missing_for_training():
        return Plan(obstacle=obstacle)
    return benchmark("--detector", "--training", args=args, block="detectors cuda")


def training(amp: bool, args: argparse.Namespace) -> Plan:
    if obstacle := missing_for_training():
        return Plan(obstacle=obstacle)
    datasets = args.output / ("datasets_quick" if args.quick else "datasets")
    extent = ["TEST.EXPECTED_RESULTS", EXPECTED_RESULTS]
    make_dataset = python("-m", "carafe_d2.data.shapes", "--root", datasets)
    if args.quick:
        extent = ["SOLVER.MAX_ITER", "20"]
        make_dataset += QUICK_DATASET
    train = python(
        *("train_net.py", "--config-file", "configs/shapes_mask_rcnn_R18_FPN_carafe.yaml"),
        *("MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", amp, *extent),
        *("OUTPUT_DIR", args.output / ("training_amp" if amp else "training_float32")),
    )
    return Plan([make_dataset, train], {"DETECTRON2_DATASETS": str(datasets)})


# By name: what it shows, and what plans it.
STAGES: dict[str, tuple[str, Callable[[argparse.Namespace], Plan]]] = {
    "build": ("the operator compiles for the GPUs of this machine", build),
    "environment": ("versions, and every backend against the definition", environment),
    "nvcc": ("machine code for every supported GPU, without register spills", nvcc),
    "tests": ("the tests that need a GPU", partial(tests, "not slow")),
    "slow_tests": ("those of them with more than 2^31 elements", partial(tests, "slow")),
    "grad_check": ("gradients in float64, and times", grad_check),
    "memcheck": ("no access outside a tensor", partial(sanitizer, "memcheck")),
    "racecheck": ("no race in shared memory", partial(sanitizer, "racecheck")),
    "initcheck": ("nothing read that was not written", partial(sanitizer, "initcheck")),
    "synccheck": ("no invalid barrier", partial(sanitizer, "synccheck")),
    "mmcv": ("mmcv's CARAFE compiles, as a peer for the benchmark", mmcv),
    "benchmark": ("operators and upsamplers beside their peers, float32", float32),
    "benchmark_half": ("the same in float16 and bfloat16", half),
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
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return str(error)
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
        if failure := run_command(command, plan.environment, log, timeout):
            outcome.result, outcome.reason = FAILED, failure
            break
    outcome.seconds = time.monotonic() - start
    lines = log.read_text(errors="replace").splitlines()
    outcome.output = "\n".join(lines[-TAIL_LINES:])


# ------------------------------------------------------------------------------------ report


def read_report(folder: Path) -> dict[str, Outcome]:
    """What an earlier call has left there, by stage."""
    try:
        stages = json.loads((folder / "report.json").read_text())["stages"]
    except FileNotFoundError:
        return {}
    return {stage["stage"]: Outcome(**stage) for stage in stages}


def write_report(folder: Path, machine: dict[str, str], outcomes: Sequence[Outcome]) -> None:
    results = [outcome.result for outcome in outcomes]
    counts = ", ".join(f"{results.count(r)} {r}" for r in (PASSED, FAILED, SKIPPED))
    rows = [[o.stage, o.about, o.verdict, f"{o.seconds:.0f}"] for o in outcomes]
    header = ["stage", "shows", "result", "seconds"]
    blocks = [
        "# GPU check",
        format_table(["", ""], [*map(list, machine.items())], markdown=True, text_columns=2),
        counts,
        format_table(header, rows, markdown=True, text_columns=3),
    ]
    for o in outcomes:
        if o.result in (PASSED, FAILED):
            fence = "````"  # output may hold three
            blocks += [
                f"## {o.stage}: {o.result}",
                "\n".join([f"{fence}sh", *o.commands, fence]),
                f"The last lines of its output, `{o.stage}.log`:",
                f"{fence}text\n{o.output}\n{fence}",
            ]
    write_file(folder / "report.md", "\n\n".join(blocks) + "\n")
    content = {"machine": machine, "stages": [asdict(outcome) for outcome in outcomes]}
    write_file(folder / "report.json", json.dumps(content, indent=2) + "\n")


# -------------------------------------------------------------------------------------- main


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--stages", nargs="+", choices=list(STAGES), metavar="STAGE", default=list(STAGES),
        help=f"some of {', '.join(STAGES)} (default: all)")  # fmt: skip
    add("--quick", action="store_true", help="small sizes, no slow tests: does it work at all?")
    add("--no-build", action="store_true", help="use the library that is there")
    add("--mmcv", type=Path, metavar="SOURCE",
        help="mmcv's source archive or folder, to build its CARAFE as a peer")  # fmt: skip
    add("--write-docs", action="store_true", help="put the benchmark's tables into docs/")
    add("--timeout", type=float, default=10, metavar="MINUTES",
        help="for each command (default: 10)")  # fmt: skip
    add("--output", type=Path, metavar="FOLDER", default=ROOT / "output" / "gpu_check",
        help="where report and logs go (default: output/gpu_check)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.quick and args.write_docs:
        parser.error("--quick measures nothing that --write-docs could write")
    if args.mmcv:
        args.mmcv = args.mmcv.resolve()
    # as the commands see it, which run in the repository's root
    args.output = Path(os.path.relpath(args.output, ROOT))
    return args


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    machine = describe_gpu_machine()
    folder = (ROOT / args.output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = {name: Outcome(name, STAGES[name][0]) for name in args.stages}
    known = read_report(folder) | outcomes
    for outcome in outcomes.values():
        print(f"{outcome.stage}: {outcome.about} ... ", end="", flush=True)
        run_stage(outcome, STAGES[outcome.stage][1](args), folder, 60 * args.timeout)
        print(outcome.verdict, f"({outcome.seconds:.0f} s)")
        write_report(folder, machine, [known[name] for name in STAGES if name in known])
    print(f"\nwritten to {folder / 'report.md'}")
    if any(outcome.result == FAILED for outcome in outcomes.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
