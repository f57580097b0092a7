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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
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


@dataclass
class Stage:
    """What is run, and what came of it.

    Attributes:
        about: what it shows.
        commands: one after another, in the repository's root, until one fails.
        obstacle: why they cannot run here, if so.
        environment: variables for them.
        output: its last lines.
    """

    name: str
    about: str
    commands: Sequence[Sequence[str]]
    obstacle: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    result: str = NOT_RUN
    seconds: float = 0.0
    output: str = ""

    def shown(self) -> str:
        """The commands as one types them, without this environment's path to Python."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        lines = []
        for command in self.commands:
            words = ["python" if word == sys.executable else word for word in command]
            lines.append(" ".join([*variables, shlex.join(words)]))
        return "\n".join(lines)


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


def missing_for_training() -> str | None:
    needed = {"detectron2": "Detectron2", "pycocotools": "pycocotools", "cv2": "OpenCV"}
    missing = [name for module, name in needed.items() if not find_spec(module)]
    return f"{' and '.join(missing)} not installed" if missing else None


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


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def make_stages(args: argparse.Namespace) -> dict[str, Stage]:
    """All stages by name, in their order."""
    quick = "--quick" if args.quick else None
    no_nvcc = None if find_nvcc() else "no nvcc found; set CUDA_HOME to a CUDA toolkit"
    no_mmcv = f"no --mmcv given; the benchmark runs with{'' if find_spec('mmcv') else 'out'} mmcv"
    pytest = python("-m", "pytest", "-q", "-rs")
    stages = [
        Stage(
            *("build", "the operator compiles for the GPUs of this machine"),
            [python("setup.py", "build_ext", "--inplace")],
            "--no-build" if args.no_build else no_nvcc,
            {"CARAFE_D2_CUDA": "1"},
        ),
        Stage(
            *("environment", "versions, and every backend against the definition"),
            [python("-m", "carafe_d2.collect_env")],
        ),
        Stage(
            *("nvcc", "machine code for every supported GPU, without register spills"),
            [[*pytest, "tests/test_nvcc.py"]],
            quick or no_nvcc,
        ),
        Stage(
            *("tests", "the tests that need a GPU"),
            [[*pytest, "-m", "gpu and not slow", "tests"]],
        ),
        Stage(
            *("slow_tests", "those of them that take long"),
            [[*pytest, "-m", "gpu and slow", "tests"]],
            quick,
        ),
        Stage(
            *("grad_check", "gradients in float64, and times"),
            [python("-m", "carafe_d2.grad_check", "--device", "cuda")],
        ),
        *sanitizer_stages(),
        Stage(
            *("mmcv", "mmcv's CARAFE compiles, as a peer for the benchmark"),
            [python("dev/build_mmcv_carafe.py", args.mmcv, "--output", args.output / "mmcv")],
            no_nvcc if args.mmcv else no_mmcv,
        ),
        *benchmark_stages(args),
        *training_stages(args),
    ]
    return {stage.name: stage for stage in stages}


def sanitizer_stages() -> Iterator[Stage]:
    program = find_sanitizer()
    missing = "compute-sanitizer is neither on the PATH nor in the CUDA toolkit"
    for tool, about in (
        ("memcheck", "no access outside a tensor"),
        ("racecheck", "no race in shared memory"),
        ("initcheck", "nothing read that was not written"),
        ("synccheck", "no invalid barrier"),
    ):
        # What the driver refuses to PyTorch when it asks for optional features is no error of ours.
        options = ["--report-api-errors", "no"] if tool == "memcheck" else []
        tests = python("-m", "pytest", "-q", "tests/test_gpu.py", "-k", "test_small_shapes")
        command = [program or "", "--tool", tool, "--error-exitcode", "86", *options, *tests]
        # Memory that PyTorch caches has no bounds that a tool could know.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        yield Stage(tool, about, [command], None if program else missing, environment)


def benchmark_stages(args: argparse.Namespace) -> Iterator[Stage]:
    """Runs of carafe_d2.benchmark, with the mmcv that its stage has built or will build."""
    upsamplers = ["--layout", "contiguous", "channels_last", "--seconds", "0.2"]
    upsamplers += [] if find_spec("matplotlib") else ["--no-plot"]
    half = ["--dtype", "float16", "bfloat16", "--no-compile"]
    mmcv = args.output / "mmcv"
    paths = [str(mmcv), *filter(None, [os.environ.get("PYTHONPATH")])]
    has_mmcv = args.mmcv or (ROOT / mmcv / "mmcv" / "carafe.so").is_file()
    for name, about, block, options in (
        ("benchmark", "times beside those of peers, float32", "upsampling cuda", upsamplers),
        ("benchmark_half", "float16, bfloat16", "upsampling cuda half", [*upsamplers, *half]),
        ("detectors", "with and without CARAFE", "detectors cuda", ["--detector", "--training"]),
    ):
        command = python("-m", "carafe_d2.benchmark", "--device", "cuda", *options)
        command += ["--output", str(args.output / name)]
        command += ["--quick"] if args.quick else []
        command += ["--markdown", "docs/benchmark.md", "--block", block] if args.write_docs else []
        environment = {"PYTHONPATH": os.pathsep.join(paths)} if has_mmcv else {}
        obstacle = missing_for_training() if name == "detectors" else None
        yield Stage(name, about, [command], obstacle, environment)


def training_stages(args: argparse.Namespace) -> Iterator[Stage]:
    datasets = args.output / ("datasets_quick" if args.quick else "datasets")
    extent = ["TEST.EXPECTED_RESULTS", EXPECTED_RESULTS]
    make_dataset = python("-m", "carafe_d2.data.shapes", "--root", datasets)
    if args.quick:
        extent = ["SOLVER.MAX_ITER", "20"]
        make_dataset += ["--train", "12", "--val", "4", "--size", "64"]
    for name, about, amp in (
        ("training", "a small Mask R-CNN trains in float32", False),
        ("training_amp", "the same with automatic mixed precision", True),
    ):
        train = python(
            *("train_net.py", "--config-file", "configs/shapes_mask_rcnn_R18_FPN_carafe.yaml"),
            *("MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", amp, *extent),
            *("OUTPUT_DIR", args.output / name),
        )
        environment = {"DETECTRON2_DATASETS": str(datasets)}
        yield Stage(name, about, [make_dataset, train], missing_for_training(), environment)


# ---------------------------------------------------------------------------- running a stage


def run_command(
    command: Sequence[str], environment: dict[str, str], log: Path, timeout: float
) -> str | None:
    """Runs a command, with its output appended to a file; returns what went wrong, if anything."""
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


def run_stage(stage: Stage, folder: Path, timeout: float) -> None:
    """Runs a stage, `timeout` seconds for each command, and notes what came of it."""
    if stage.obstacle:
        stage.result = f"{SKIPPED}: {stage.obstacle}"
        return
    log = folder / f"{stage.name}.log"
    log.write_text("")
    start = time.monotonic()
    stage.result = PASSED
    for command in stage.commands:
        if failure := run_command(command, stage.environment, log, timeout):
            stage.result = f"{FAILED}: {failure}"
            break
    stage.seconds = time.monotonic() - start
    lines = log.read_text(errors="replace").splitlines()
    stage.output = "\n".join(lines[-TAIL_LINES:])


# ------------------------------------------------------------------------------------ report


def read_report(folder: Path) -> dict[str, Stage]:
    """The stages of an earlier call with the same folder."""
    try:
        stages = json.loads((folder / "report.json").read_text())["stages"]
    except FileNotFoundError:
        return {}
    return {stage["name"]: Stage(**stage) for stage in stages}


def write_report(folder: Path, machine: dict[str, str], stages: Sequence[Stage]) -> None:
    results = [stage.result.split(":")[0] for stage in stages]
    facts = [[name, value] for name, value in machine.items()]
    rows = [[s.name, s.about, s.result, f"{s.seconds:.0f}"] for s in stages]
    header = ["stage", "shows", "result", "seconds"]
    blocks = [
        "# GPU check",
        format_table(["", ""], facts, markdown=True, text_columns=2),
        ", ".join(f"{results.count(r)} {r}" for r in (PASSED, FAILED, SKIPPED)),
        format_table(header, rows, markdown=True, text_columns=3),
    ]
    for stage, result in zip(stages, results, strict=True):
        if result in (PASSED, FAILED):
            blocks += [
                f"## {stage.name}: {result}",
                f"````sh\n{stage.shown()}\n````",  # output may hold a fence of three
                f"The last lines of its output, `{stage.name}.log`:",
                f"````text\n{stage.output}\n````",
            ]
    write_file(folder / "report.md", "\n\n".join(blocks) + "\n")
    content = {"machine": machine, "stages": [asdict(stage) for stage in stages]}
    write_file(folder / "report.json", json.dumps(content, indent=2) + "\n")


# -------------------------------------------------------------------------------------- main


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--stages", nargs="+", metavar="STAGE", help="of those in docs/gpu.md (default: all)")
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
        raise UserError("--quick measures nothing that --write-docs could write")
    if args.mmcv:
        args.mmcv = args.mmcv.resolve()
    # as the commands see it, which run in the repository's root
    args.output = Path(os.path.relpath(args.output, ROOT))
    return args


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    stages = make_stages(args)
    for name in args.stages or ():
        if name not in stages:
            raise UserError(f"--stages: expected some of {', '.join(stages)}, got {name!r}")
    chosen = [stage for name, stage in stages.items() if name in (args.stages or stages)]
    machine = describe_gpu_machine()
    folder = (ROOT / args.output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    known = read_report(folder) | {stage.name: stage for stage in chosen}
    for stage in chosen:
        print(f"{stage.name}: {stage.about} ... ", end="", flush=True)
        run_stage(stage, folder, 60 * args.timeout)
        print(stage.result, f"({stage.seconds:.0f} s)")
        write_report(folder, machine, [known[name] for name in stages if name in known])
    print(f"\nwritten to {folder / 'report.md'}")
    if any(stage.result.startswith(FAILED) for stage in chosen):
        sys.exit(1)


if __name__ == "__main__":
    main()
