"""Reports what a bug report needs: `python -m carafe_d2.collect_env`.

Prints versions, how the compiled operator was built, which of its backends work (each is run,
forward and backward, and compared with the definition), and then the reports of PyTorch and of
Detectron2 on themselves and the machine. Works without Detectron2, without a GPU, and where the
operator, or even PyTorch, is missing or broken. Exit code 1 says that something should work and
does not.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .errors import UserError
from .version import __version__

LIBRARY = Path(__file__).with_name("_C.so")
MODULES = ("torch", "torchvision", "detectron2", "fvcore", "pycocotools", "cv2", "numpy", "PIL")
CPU_INSTRUCTION_SETS = ("avx512", "avx2", "default")  # the operator takes the first it can
# NVIDIA's driver that a CUDA runtime needs at least, by its major version: the release notes of
# CUDA, section "CUDA minor version compatibility". csrc/cuda/error.h knows it, too.
OLDEST_DRIVERS = {"12": 525, "13": 580}
DTYPES = ("float64", "float32", "float16", "bfloat16")
TIMEOUT = 300  # seconds for a check; it takes a few
VARIABLES = re.compile(
    "(ATEN|CARAFE_D2|CUDA|DETECTRON2|FVCORE|LD|MKL|OMP|PYTORCH|TORCH)_|(CXX|CXXFLAGS|LDFLAGS|PYTHONPATH)$"
)

Rows = list[tuple[str, str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; returns the exit status: 1 where something fails."""
    parser = argparse.ArgumentParser(
        prog="python -m carafe_d2.collect_env",
        description="Print what a bug report needs, and check which backends work.",
    )
    parser.add_argument("--check", metavar="DEVICE", help="only run the operators on this device")
    args = parser.parse_args(argv)
    if args.check:
        print(check_backend(args.check))
        return 0
    works = True
    # The variables come first: importing a package may change them.
    for section in (variable_rows, version_rows, library_rows, backend_rows):
        rows = section()
        print("\n".join(f"{name:<28}{value}" for name, value in rows), end="\n\n", flush=True)
        works &= not any("FAILS" in value for _, value in rows)
    print("torch.utils.collect_env:", run_apart("-m", "torch.utils.collect_env"), sep="\n")
    if importlib.util.find_spec("detectron2"):
        print("\ndetectron2.utils.collect_env:", run_apart("-c", DETECTRON2_REPORT), sep="\n")
    return 0 if works else 1


DETECTRON2_REPORT = "from detectron2.utils import collect_env as c; print(c.collect_env_info())"


# ------------------------------------------------------------------- versions and the machine


def variable_rows() -> Rows:
    """The version of the package, and the environment variables that matter."""
    rows = [("carafe_d2", f"{__version__}, {commit() or 'installed'}, {LIBRARY.parent}")]
    names = sorted(filter(VARIABLES.match, os.environ))
    return rows + [(f"${name}", os.environ[name]) for name in names]


def commit() -> str | None:
    """The commit that is checked out, `dirty` if files differ; None if it was installed."""
    root = LIBRARY.parents[1]
    if not (root / ".git").exists():
        return None
    return output_of("git", "-C", str(root), "describe", "--always", "--dirty") or "unknown commit"


def version_rows() -> Rows:
    """Version and place of Python and of everything that takes part."""
    rows = [("Python", f"{platform.python_version()}, {sys.executable}")]
    return rows + [(module, version_of(module)) for module in MODULES]


def version_of(module: str) -> str:
    """Version and folder of a module, or why it cannot be imported."""
    if importlib.util.find_spec(module) is None:
        return "not installed"
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # whatever a broken installation raises
        return f"FAILS to import: {one_line(error)}"
    version = getattr(imported, "__version__", "unknown version")
    return f"{version}, {os.path.dirname(imported.__file__ or '')}"


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """What has to be known to read the figures of a run, for JSON.

    Args:
        device: cpu, or the GPU that runs it.

    Raises:
        UserError: PyTorch is missing or cannot use that GPU.
    """
    try:
        import torch
        from torch.utils.collect_env import get_cpu_info, get_nvidia_driver_version, run
    except ImportError as error:
        raise UserError(f"PyTorch cannot be imported: {error}") from error
    model = re.search(r"Model name: *(.*)", get_cpu_info(run) or "")
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "carafe_d2": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        # carafe_d2 takes the widest that the processor has, unless this variable says otherwise.
        "CARAFE_D2_CPU": os.environ.get("CARAFE_D2_CPU"),
        "device": torch.device(device).type,
    }
    if facts["device"] == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"there is no GPU that PyTorch {torch.__version__} can use")
        gpu = torch.cuda.get_device_properties(device)
        facts["gpu"] = gpu.name
        facts["gpu_memory"] = gpu.total_memory
        facts["compute_capability"] = f"{gpu.major}.{gpu.minor}"
        facts["cuda"] = torch.version.cuda
        facts["driver"] = get_nvidia_driver_version(run)
    return facts


def machine_sentence(machine: dict[str, Any]) -> str:
    """The same in one line, for people."""
    if machine["device"] == "cuda":
        place = f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}"
    else:
        instructions = machine["CARAFE_D2_CPU"] or machine["torch_instruction_set"]
        place = (
            f"{machine['cpu']}, {instructions}, {machine['threads']} of {machine['cores']} cores"
        )
    versions = f"PyTorch {machine['torch']}, carafe_d2 {machine['carafe_d2']}"
    return f"{place}, {versions}, {machine['date'][:10]}"


# --------------------------------------------------------------------------- compiled operator


def library_rows() -> Rows:
    """The compiled operator: its size, how it was built, and the architectures in it."""
    if not LIBRARY.is_file():
        return [("compiled operator", f"FAILS: {LIBRARY} is missing")]
    rows = [("compiled operator", f"{LIBRARY.name}, {LIBRARY.stat().st_size / 2**20:.1f} MiB")]
    info = build_info(LIBRARY)
    if info is None:
        return [*rows, ("built", "unknown: the file does not say")]
    rows += [
        ("built from", f"carafe_d2 {info['version']}"),
        ("built against", f"PyTorch {info['torch']}, for {info['oldest_torch']} and newer"),
        ("compiler", info["compiler"]),
        ("C++ flags", info["cxxflags"]),
        ("linker flags", info["ldflags"] or "the default ones"),
        ("CUDA", info["cuda"] or "built without"),
    ]
    if info["cuda"]:
        rows.append(("CUDA architectures", ", ".join(info["cuda_architectures"])))
        rows.append(("NVIDIA driver", driver_outcome(info["cuda"])))
    return rows


def driver_outcome(cuda: str) -> str:
    """The version of NVIDIA's driver, beside the one that the operator's CUDA runtime needs.

    Whether it is enough is for the operator to say: packages for forward compatibility make an
    older driver do.
    """
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found = output_of(*query).partition("\n")[0] or "none found"
    oldest = OLDEST_DRIVERS.get(cuda.partition(".")[0], "an unknown version")
    return f"{found}; the CUDA {cuda} in the operator needs {oldest} or newer"


def build_info(library: Path) -> dict[str, Any] | None:
    """What setup.py wrote into the library; None where there is nothing of the kind.

    It is read from the file, so a library that cannot be loaded tells, too.
    """
    match = re.search(rb"carafe_d2 build info: (\{[^\0]*\})\0", library.read_bytes())
    return json.loads(match[1]) if match else None


# ------------------------------------------------------------------------------------- backends


def backend_rows() -> Rows:
    """Runs every backend, each in a process of its own: a crash there is a line here."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        load = f"import torch; torch.ops.load_library({str(LIBRARY)!r}); print('works')"
        loaded = pool.submit(run_apart, "-c", load)
        imported = pool.submit(run_apart, "-c", "import carafe_d2.ops; print('works')")
        rows = [("load the operator", loaded.result()), ("import carafe_d2.ops", imported.result())]
        if loaded.result() != "works":
            return rows
        sets = CPU_INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") else ["default"]
        cpu = {name: pool.submit(check_apart, "cpu", CARAFE_D2_CPU=name) for name in sets}
        gpus = [pool.submit(check_apart, f"cuda:{index}") for index in range(gpu_count())]
    possible = [name for name in sets if cpu[name].result() != NOT_ON_THIS_PROCESSOR]
    chosen = os.environ.get("CARAFE_D2_CPU") or possible[0]
    rows += [(f"CPU, {n}{' (chosen)' * (n == chosen)}", cpu[n].result()) for n in sets]
    rows += [(f"CUDA, GPU {index}", check.result()) for index, check in enumerate(gpus)]
    return rows if gpus else [*rows, ("CUDA", "not run: no GPU")]


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check_apart(device: str, **variables: str) -> str:
    """What `check_backend` has to say, run in another process."""
    return run_apart("-m", "carafe_d2.collect_env", "--check", device, **variables)


def run_apart(*arguments: str, **variables: str) -> str:
    """Runs Python in another process.

    Returns:
        Its output, or the error in one line, which begins with FAILS.
    """
    try:
        process = subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return f"FAILS: no answer within {TIMEOUT} s"
    if process.returncode == 0:
        return process.stdout.strip()
    if process.returncode < 0:
        return f"FAILS: killed by {signal.Signals(-process.returncode).name}"
    errors = re.findall(r"^[\w.]+(?:Error|Exception)\b.*", process.stderr, re.MULTILINE)
    return f"FAILS: {errors[-1] if errors else f'exit code {process.returncode}'}"


NOT_ON_THIS_PROCESSOR = "not on this processor"


def check_backend(device: str) -> str:
    """Runs both operators on a device, forward and backward, against their definition.

    Args:
        device: such as cpu or cuda:0.

    Returns:
        The outcome in one line: which dtypes work, and after FAILS the errors of the others.
    """
    import torch

    from . import ops
    from .testing import Case, check_operator

    errors = {}
    for dtype in DTYPES:
        try:
            for operator, definition in ops.DECOMPOSITIONS.items():
                for layout in ("contiguous", "channels_last"):
                    case = Case((2, 32, 6, 9), 5, 2, dtype=getattr(torch, dtype), layout=layout)
                    check_operator(operator, definition, case, device)
        except (RuntimeError, AssertionError) as error:
            if "CARAFE_D2_CPU: expected" in str(error):
                return NOT_ON_THIS_PROCESSOR
            if "built without CUDA" in str(error):
                return "not in this library, which was built without CUDA"
            errors[dtype] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    outcome = []
    if len(errors) < len(DTYPES):
        outcome.append(f"works: {', '.join(dtype for dtype in DTYPES if dtype not in errors)}")
    if errors:
        outcome.append(f"FAILS: {'; '.join(f'{name}: {error}' for name, error in errors.items())}")
    return "; ".join(outcome)


# ---------------------------------------------------------------------------------------- small


def output_of(*command: str) -> str:
    """What a program prints; nothing where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def one_line(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


if __name__ == "__main__":
    sys.exit(main())
