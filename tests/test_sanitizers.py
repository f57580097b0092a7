"""The operator under AddressSanitizer and UndefinedBehaviorSanitizer, in a process of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from carafe_d2.collect_env import CPU_INSTRUCTION_SETS

ROOT = Path(__file__).parents[1]
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
# Of the large maps those with whole cache lines, which alone are written past the caches.
TESTS = "(match_the_definition and not 48x121x97) or wrong or half_conversions or extreme"


@pytest.fixture(scope="module")
def run(tmp_path_factory, sanitizer_runtimes):
    """Runs Python with an instruction set and the operator that has sanitizers in it."""
    runtimes = sanitizer_runtimes(os.environ.get("CXX", "g++"))
    folder = tmp_path_factory.mktemp("sanitizers")
    for name in ("csrc", "carafe_d2"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("_C.so"))
    shutil.copy(ROOT / "setup.py", folder)
    flags = {"CARAFE_D2_CUDA": "0", "CXXFLAGS": f"{FLAGS} -O0", "LDFLAGS": FLAGS}
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(build, cwd=folder, env=os.environ | flags, check=True)
    # Python itself and PyTorch never free some of their memory.
    options = {"ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": runtimes, "PYTEST_ADDOPTS": ""}

    def run(instruction_set: str, *arguments: str) -> subprocess.CompletedProcess:
        variables = os.environ | options | {"CARAFE_D2_CPU": instruction_set}
        # Python looks for carafe_d2 in the working folder first.
        return subprocess.run(
            [sys.executable, *arguments], cwd=folder, env=variables, capture_output=True, text=True
        )

    run.library = folder / "carafe_d2" / "_C.so"
    return run


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", CPU_INSTRUCTION_SETS)
def test_operator(run, instruction_set):
    tests = [str(ROOT / "tests" / "test_ops.py"), "-k", f"({TESTS}) and not cuda"]
    options = ["-x", "-p", "no:cacheprovider", "-o", "pythonpath="]  # not this checkout's carafe_d2
    result = run(instruction_set, "-m", "pytest", *options, *tests)
    assert f"carafe_d2: {run.library}\n" in result.stdout, result.stderr
    if "CARAFE_D2_CPU: expected" in result.stdout:
        pytest.skip(f"this processor has no {instruction_set}")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_the_sanitizers_are_at_work(run):
    """A part of a map that is not there has to be noticed."""
    program = (
        "import torch, carafe_d2\n"
        "storage = torch.zeros(1, 4, 8, 8)\n"
        "missing = torch.as_strided(storage, (1, 4, 8, 8), (256, 64, 8, 1)).detach()\n"
        "storage.untyped_storage().resize_(4 * 64 * 2)\n"
        "carafe_d2.carafe(missing, torch.zeros(1, 9, 8, 8), 3, 1, 1)\n"
    )
    result = run("default", "-c", program)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
