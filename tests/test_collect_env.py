"""Tests of `python -m carafe_d2.collect_env`."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from carafe_d2 import __version__, carafe_naive, collect_env, ops

ALL = "float64, float32, float16, bfloat16"


def report(folder: Path, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "carafe_d2.collect_env"]
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_report():
    result = report(collect_env.LIBRARY.parents[1])
    assert result.returncode == 0, result.stdout + result.stderr
    own, of_torch, of_detectron2 = re.split(r"\w+\.utils\.collect_env:\n", result.stdout)
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in own.splitlines() if line)
    assert rows["carafe_d2"].startswith(__version__)
    assert rows["torch"].startswith(f"{torch.__version__}, ")
    assert f"works: {ALL}" in [rows.get("CPU, default"), rows.get("CPU, default (chosen)")]
    assert own.count("(chosen)") == 1
    assert ("CUDA, GPU 0" if torch.cuda.is_available() else "CUDA") in rows
    assert f"PyTorch version: {torch.__version__}" in of_torch
    assert "DETECTRON2_ENV_MODULE" in of_detectron2


def test_report_without_a_pytorch_that_works(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no libtorch here')")
    result = report(collect_env.LIBRARY.parents[1], PYTHONPATH=str(tmp_path))
    assert result.returncode == 1, result.stderr
    failure = "FAILS to import: ImportError: no libtorch here"
    assert re.search(f"^torch +{failure}$", result.stdout, re.MULTILINE)
    failure = "FAILS: ImportError: no libtorch here"
    assert re.search(f"^load the operator +{failure}$", result.stdout, re.MULTILINE)


@pytest.mark.slow
def test_report_without_the_operator(tmp_path):
    """Nothing of the package can be imported then, and this is when the report is needed."""
    package = collect_env.LIBRARY.parent
    shutil.copytree(package, tmp_path / "carafe_d2", ignore=shutil.ignore_patterns("*.so"))
    result = report(tmp_path)
    assert result.returncode == 1, result.stderr
    assert re.search(f"^torch +{re.escape(torch.__version__)}, ", result.stdout, re.MULTILINE)
    assert f"FAILS: {tmp_path / 'carafe_d2' / '_C.so'} is missing" in result.stdout
    assert "FAILS: ImportError: The compiled operator of carafe_d2 is missing" in result.stdout
    assert "pip install -e . --no-build-isolation" in result.stdout


def test_broken_library(tmp_path, monkeypatch):
    library = tmp_path / "_C.so"
    library.write_bytes(b"not a library")
    monkeypatch.setattr(collect_env, "LIBRARY", library)
    assert dict(collect_env.library_rows())["built"] == "unknown: the file does not say"
    rows = dict(collect_env.backend_rows())
    assert rows["load the operator"].startswith("FAILS: OSError: ")
    assert not [name for name in rows if name.startswith("CPU")]


def test_library_rows(tmp_path, monkeypatch):
    library = tmp_path / "_C.so"
    library.write_bytes(
        b'\0carafe_d2 build info: {"version": "9.9", "torch": "2.99+cu1", "oldest_torch": "2.10", '
        b'"compiler": "g++ 12", "cxxflags": "-O3", "ldflags": "", "cuda": "13.0", '
        b'"cuda_architectures": ["sm_80", "sm_90", "compute_90 (PTX)"]}\0 more'
    )
    monkeypatch.setattr(collect_env, "LIBRARY", library)
    rows = dict(collect_env.library_rows())
    assert rows["built from"] == "carafe_d2 9.9"
    assert rows["built against"] == "PyTorch 2.99+cu1, for 2.10 and newer"
    assert rows["CUDA"] == "13.0"
    assert rows["CUDA architectures"] == "sm_80, sm_90, compute_90 (PTX)"


@pytest.mark.parametrize(
    ("program", "cuda", "outcome"),
    [
        ("echo 535.1.2; echo 535.1.2", "13.0", "535.1.2; the CUDA 13.0 in the operator needs 580"),
        ("exit 9", "12.8", "none found; the CUDA 12.8 in the operator needs 525"),
    ],
)
def test_driver_stands_beside_the_one_that_is_needed(program, cuda, outcome, tmp_path, monkeypatch):
    nvidia_smi = tmp_path / "nvidia-smi"
    nvidia_smi.write_text(f"#!/bin/sh\n{program}\n")
    nvidia_smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert collect_env.driver_outcome(cuda) == f"{outcome} or newer"


def test_versions(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('ABI mismatch\\nmore')")
    (tmp_path / "no_version.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert collect_env.version_of("torch").startswith(f"{torch.__version__}, ")
    assert collect_env.version_of("no_such_package") == "not installed"
    assert collect_env.version_of("no_version") == f"unknown version, {tmp_path}"
    failure = "FAILS to import: RuntimeError: ABI mismatch"
    assert collect_env.version_of("broken_package") == failure


def test_variables(monkeypatch):
    monkeypatch.setenv("CARAFE_D2_CPU", "avx2")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    rows = dict(collect_env.variable_rows())
    assert rows["$CARAFE_D2_CPU"] == "avx2"
    assert rows["$OMP_NUM_THREADS"] == "3"


def test_machine():
    machine = json.loads(json.dumps(collect_env.describe_machine()))
    assert machine["torch"] == torch.__version__
    assert machine["device"] == "cpu"
    sentence = collect_env.machine_sentence(machine)
    assert (
        f"{machine['threads']} of {machine['cores']} cores, PyTorch {torch.__version__}" in sentence
    )
    assert sentence.endswith(f"carafe_d2 {__version__}, {machine['date'][:10]}")


def test_working_backend():
    assert collect_env.check_backend("cpu") == f"works: {ALL}"


def test_wrong_results_are_seen(monkeypatch):
    def half_wrong(features, *arguments):
        out = carafe_naive(features, *arguments)
        return out + 1e-3 if features.dtype == torch.float32 else out

    operators = {half_wrong: carafe_naive}
    monkeypatch.setattr(ops, "DECOMPOSITIONS", operators)
    outcome = collect_env.check_backend("cpu")
    assert outcome.startswith("works: float64, float16, bfloat16; FAILS: float32: AssertionError: ")
    assert "Greatest absolute difference: 0.00" in outcome


def test_library_without_cuda(monkeypatch):
    def refuse(*_):
        raise RuntimeError("features: on cuda:0, but carafe_d2 was built without CUDA. Rebuild it")

    monkeypatch.setattr(ops, "DECOMPOSITIONS", {refuse: carafe_naive})
    assert "built without CUDA" in collect_env.check_backend("cpu")


def test_instruction_set_that_does_not_exist(monkeypatch):
    assert collect_env.check_apart("cpu", CARAFE_D2_CPU="mmx") == "not on this processor"


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("print('works')", "works"),
        ("raise ValueError('this\\nand that')", "FAILS: ValueError: this"),
        ("raise SystemExit(7)", "FAILS: exit code 7"),
        ("import os; os.abort()", "FAILS: killed by SIGABRT"),
    ],
)
def test_outcome_of_a_process(code, outcome):
    assert collect_env.run_apart("-c", code) == outcome


def test_process_that_hangs(monkeypatch):
    monkeypatch.setattr(collect_env, "TIMEOUT", 1)
    hanging = collect_env.run_apart("-c", "import time; time.sleep(60)")
    assert hanging == "FAILS: no answer within 1 s"
