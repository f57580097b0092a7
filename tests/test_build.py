"""The library that setup.py builds, and how it finds what to build for."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import carafe_d2.ops

ROOT = Path(__file__).parents[1]
LIBRARY = Path(carafe_d2.ops.__file__).with_name("_C.so")


setup = runpy.run_path(str(ROOT / "setup.py"))


def run(code: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_links_neither_python_nor_cuda():
    listing = subprocess.run(["readelf", "-d", LIBRARY], capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", listing)
    assert "libtorch.so" in needed
    assert not [name for name in needed if "python" in name or "cuda" in name]


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_asks_pytorch_for_its_stable_abi_only():
    """Its C interface stays from version to version; anything in C++ may change with each."""
    command = ["nm", "--dynamic", "--undefined-only", "--demangle", LIBRARY]
    listing = subprocess.run(command, capture_output=True, text=True).stdout
    symbols = re.findall(r"^ +[UwvV] (.*)$", listing, re.MULTILINE)
    of_torch = [name for name in symbols if re.search(r"torch|c10|at::|caffe2", name)]
    assert "torch_call_dispatcher" in of_torch
    assert not [name for name in of_torch if not re.fullmatch(r"(aoti_)?torch_\w+", name)]
    assert not [name for name in symbols if re.match(r"_?Py|cuda|cu[A-Z]", name)]


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_instruction_sets_do_not_leak():
    """Code for AVX-512 is local to its file: no other file may end up with a copy of it."""
    folders = [ROOT / "build" / name for name in ("operator-cuda", "operator-cpu")]
    objects = [path for folder in folders for path in folder.glob("kernels_*.o")]
    if not objects:
        pytest.skip("the library was not built in this checkout")
    for path in objects:
        listing = subprocess.run(["nm", "-C", path], capture_output=True, text=True).stdout
        # any definition that is visible to other files
        shared = re.findall(r"^[0-9a-f]+ [TWVBDRu] (.*)$", listing, re.MULTILINE)
        assert len(shared) == 1, shared
        assert re.fullmatch(r"carafe_d2::k\w+Kernels", shared[0])


def test_loads_without_the_rest_of_the_package():
    code = f"import torch; torch.ops.load_library({str(LIBRARY)!r}); torch.ops.carafe_d2.carafe"
    assert run(code).returncode == 0


def test_operator_does_not_import_detectron2():
    """The operator half has to work, and import quickly, without Detectron2."""
    code = (
        "import sys; sys.modules['detectron2'] = None\n"
        "import importlib.util; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n == 'detectron2' else find(n, *a)\n"
        "import carafe_d2.ops, carafe_d2.reference"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("contents", [None, b"not a library"])
def test_unusable_library_says_how_to_build(contents, tmp_path):
    package = tmp_path / "copied"
    package.mkdir()
    for module in ("ops.py", "reference.py", "import_hooks.py"):
        shutil.copy(LIBRARY.with_name(module), package)
    if contents:
        (package / "_C.so").write_bytes(contents)
    result = run(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import copied.ops")
    assert "ImportError: The compiled operator of carafe_d2" in result.stderr
    assert "pip install -e . --no-build-isolation" in result.stderr


@pytest.mark.parametrize("change", ["none but the time", "a header", "no library"])
def test_suite_stops_at_a_library_of_other_sources(change, tmp_path):
    for name in ("csrc", "carafe_d2"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("setup.py", "tests/conftest.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tests" / "test_it.py").write_text("def test_it():\n    pass\n")
    header = tmp_path / "csrc" / "cuda" / "device.cuh"
    if change == "none but the time":
        header.touch()
    elif change == "a header":
        header.write_text(header.read_text() + "\n")
    else:
        (tmp_path / "carafe_d2" / "_C.so").unlink()
    command = [sys.executable, "-m", "pytest", "-q", "tests"]
    suite = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if change == "none but the time":
        assert suite.returncode == 0, suite.stdout + suite.stderr
    else:
        assert suite.returncode == pytest.ExitCode.USAGE_ERROR
        assert "python setup.py build_ext --inplace" in suite.stderr
        assert len(suite.stderr.splitlines()) == 1


def fake_nvcc(folder: Path) -> Path:
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho compute_75; echo compute_80; echo compute_90\n")
    nvcc.chmod(0o755)
    return nvcc


def test_missing_compiler_is_one_line(tmp_path):
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)]
    environment = os.environ | {"CXX": "no-such-compiler", "CARAFE_D2_CUDA": "0"}
    build = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert build.returncode == 1
    expected = "carafe_d2: no C++ compiler no-such-compiler: install one or set CXX"
    assert build.stderr.splitlines()[-1] == expected


def test_finds_cuda(tmp_path, monkeypatch):
    monkeypatch.delenv("CARAFE_D2_CUDA", raising=False)
    nvcc = fake_nvcc(tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup["find_nvcc"]() == str(nvcc)
    monkeypatch.setenv("CARAFE_D2_CUDA", "0")
    assert setup["find_nvcc"]() is None


def test_architectures(tmp_path, monkeypatch):
    nvcc = str(fake_nvcc(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert setup["cuda_archs"](nvcc) == (["75", "80", "90"], ["80"])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a+PTX")
    assert setup["cuda_archs"](nvcc) == (["80", "90a"], ["90a"])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: expected a list"):
        setup["cuda_archs"](nvcc)


def test_targets_the_gpu_at_hand(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert setup["cuda_archs"](str(fake_nvcc(tmp_path))) == (["90"], ["90"])
