"""The operator under AddressSanitizer and UndefinedBehaviorSanitizer, in a process of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
INSTRUCTION_SETS = ["default", "avx2", "avx512"]
TESTS = "match_the_definition or wrong or half_conversions or extreme"


def runtime(name: str) -> str:
    """Path of a runtime of the compiler's sanitizers; it has to be loaded before Python."""
    command = [os.environ.get("CXX", "g++"), f"-print-file-name={name}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(found):
        pytest.skip(f"the compiler comes without {name}")
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of a process that finds the operator with sanitizers in it."""
    runtimes = f"{runtime('libasan.so')}:{runtime('libubsan.so')}"
    folder = tmp_path_factory.mktemp("sanitizers")
    for name in ("csrc", "carafe_d2"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("_C.so"))
    shutil.copy(ROOT / "setup.py", folder)
    flags = {"CARAFE_D2_CUDA": "0", "CXXFLAGS": f"{FLAGS} -O1", "LDFLAGS": FLAGS}
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(build, cwd=folder, env=os.environ | flags, check=True)
    # Python itself and PyTorch never free some of their memory.
    options = {"ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": runtimes}
    return os.environ | options | {"PYTHONPATH": str(folder)}


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_operator(environment, instruction_set):
    tests = [str(ROOT / "tests" / "test_ops.py"), "-k", f"({TESTS}) and not cuda"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    variables = environment | {"CARAFE_D2_CPU": instruction_set}
    run = subprocess.run(command, env=variables, capture_output=True, text=True)
    if "CARAFE_D2_CPU: expected" in run.stdout:
        pytest.skip(f"this processor has no {instruction_set}")
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
def test_the_sanitizers_are_at_work(environment):
    """A part of a map that is not there has to be noticed."""
    program = (
        "import torch, carafe_d2\n"
        "storage = torch.zeros(1, 4, 8, 8)\n"
        "missing = torch.as_strided(storage, (1, 4, 8, 8), (256, 64, 8, 1)).detach()\n"
        "storage.untyped_storage().resize_(4 * 64 * 2)\n"
        "carafe_d2.carafe(missing, torch.zeros(1, 9, 8, 8), 3, 1, 1)\n"
    )
    variables = environment | {"CARAFE_D2_CPU": "default"}
    run = subprocess.run(
        [sys.executable, "-c", program], env=variables, capture_output=True, text=True
    )
    assert run.returncode != 0
    assert "heap-buffer-overflow" in run.stderr
