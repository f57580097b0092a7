"""Reports what a bug report needs: `python -m carafe_d2.collect_env`.

Prints versions, the machine, how the compiled operator was built, and which of its backends work:
each is run, forward and backward, and compared with the definition. Works without Detectron2,
without a GPU, and where the operator, or even PyTorch, is missing or broken. Exit code 1 says that
something should work and does not.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:  # the report has to be printed without it, too
    pass

LIBRARY = Path(__file__).with_name("_C.so")
CPU_INSTRUCTION_SETS = ("avx512", "avx2", "default")  # the operator takes the first it can
DTYPES = ("float64", "float32", "float16", "bfloat16")
TIMEOUT = 300  # seconds for a check; it takes a few
VARIABLES = (  # besides those that begin with CARAFE_D2_
    "ATEN_CPU_CAPABILITY",
    "CUDA_HOME",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_PATH",
    "CUDA_VISIBLE_DEVICES",
    "CXX",
    "CXXFLAGS",
    "DETECTRON2_DATASETS",
    "FVCORE_CACHE",
    "LDFLAGS",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PYTHONPATH",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_CUDA_ARCH_LIST",
)

Rows = list[tuple[str, str]]


def main(argv: list[str] | None = None) -> int:
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
    for section in (variable_rows, software_rows, machine_rows, library_rows, backend_rows):
        rows = section()
        print("\n".join(f"{name:<28}{value}" for name, value in rows), end="\n\n", flush=True)
        works &= not any("FAILS" in value for _, value in rows)
    return 0 if works else 1


# ------------------------------------------------------------------- versions and the machine


def variable_rows() -> Rows:
    """The version of the package, and the environment variables that matter."""
    package = LIBRARY.parent
    rows = [("carafe_d2", f"{__version__}{checkout(package.parent)}, {package}")]
    names = sorted(name for name in os.environ if name.startswith("CARAFE_D2_"))
    names += [name for name in VARIABLES if name in os.environ]
    return rows + [(f"${name}", os.environ[name]) for name in names]


def checkout(root: Path) -> str:
    """Which commit is checked out; nothing where the package was installed."""
    if not (root / ".git").exists():
        return ""
    commit = output_of("git", "-C", str(root), "describe", "--always", "--dirty")
    return f" (checkout of {commit or 'an unknown commit'})"


def software_rows() -> Rows:
    """Version and place of everything that takes part."""
    modules = {
        "PyTorch": "torch",
        "torchvision": "torchvision",
        "Detectron2": "detectron2",
        "fvcore": "fvcore",
        "pycocotools": "pycocotools",
        "OpenCV": "cv2",
        "NumPy": "numpy",
        "Pillow": "PIL",
    }
    rows = [("Python", f"{platform.python_version()}, {sys.executable}")]
    return rows + [(name, version_of(module)) for name, module in modules.items()]


def version_of(module: str) -> str:
    """Version and folder of a module, or why it cannot be imported."""
    if importlib.util.find_spec(module) is None:
        return "not installed"
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # whatever a broken installation raises
        return f"FAILS to import: {one_line(error)}"
    distributions = metadata.packages_distributions().get(module, [])
    versions = [getattr(imported, "__version__", ""), *map(metadata.version, distributions)]
    version = max(versions, key=len) or "unknown version"  # the longest says most: 2.15.0+cu132
    return f"{version}, {os.path.dirname(imported.__file__ or '')}"


def machine_rows() -> Rows:
    """The operating system, the processor and the GPUs."""
    rows = [("platform", platform.platform())]
    try:
        import torch
        from torch.utils.collect_env import get_env_info

        env = get_env_info()
    except Exception:  # `software_rows` says why
        return [*rows, ("processors", str(os.cpu_count()))]
    model = re.search(r"Model name: *(.*)", env.cpu_info or "")
    cpu_capability = torch.backends.cpu.get_cpu_capability()
    return [
        *rows,
        ("operating system", str(env.os)),
        ("processors", f"{os.cpu_count()}, {model[1] if model else platform.machine()}"),
        ("CPU capability", f"{cpu_capability}, {torch.get_num_threads()} threads"),
        ("CUDA of PyTorch", torch.version.cuda or "none"),
        ("cuDNN of PyTorch", str(torch.backends.cudnn.version() or "none")),
        ("CUDA toolkit (nvcc)", env.cuda_runtime_version or "none on the PATH"),
        ("NVIDIA driver", env.nvidia_driver_version or "none"),
        *gpu_rows(),
    ]


def gpu_rows() -> Rows:
    """The GPUs, with their compute capabilities and memory."""
    import torch

    rows = []
    for index in range(gpu_count()):
        gpu = torch.cuda.get_device_properties(index)
        rows.append(
            (
                f"GPU {index}",
                f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, "
                f"{gpu.total_memory / 2**30:.0f} GiB",
            )
        )
    return rows or [("GPU", "none that PyTorch can use")]


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
        ("compiler", f"{info['compiler']}"),
        ("C++ flags", f"{info['cxxflags']}"),
        ("linker flags", f"{info['ldflags'] or 'the default ones'}"),
        ("CUDA", f"{info['cuda'] or 'built without'}"),
    ]
    if info["cuda"]:
        rows.append(("CUDA architectures", ", ".join(info["cuda_architectures"])))
        found = architectures_in(LIBRARY)
        if found and found != set(info["cuda_architectures"]):
            rows.append(("  by cuobjdump", ", ".join(sorted(found))))
    return rows


def build_info(library: Path) -> dict[str, Any] | None:
    """What setup.py wrote into the library; None where there is nothing of the kind.

    It is read from the file, so a library that cannot be loaded tells, too.
    """
    match = re.search(rb"carafe_d2 build info: (\{[^\0]*\})\0", library.read_bytes())
    return json.loads(match[1]) if match else None


def architectures_in(library: Path) -> set[str]:
    """The CUDA architectures in the library as cuobjdump sees them; empty without cuobjdump."""
    home = os.environ.get("CUDA_HOME")
    cuobjdump = shutil.which("cuobjdump", path=f"{home}/bin" if home else None)
    if cuobjdump is None:
        return set()
    machine = re.findall(r"\.(sm_\w+)\.cubin", output_of(cuobjdump, "--list-elf", str(library)))
    ptx = re.findall(r"\.sm_(\w+)\.ptx", output_of(cuobjdump, "--list-ptx", str(library)))
    return {*machine, *(f"compute_{arch} (PTX)" for arch in ptx)}


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
        The last line of its output, or the error in one line, which begins with FAILS.
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
        return process.stdout.splitlines()[-1]
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
            errors[dtype] = one_line(error)
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
