"""dev/build_mmcv_carafe.py, with sources and a compiler that only pretend."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from carafe_d2.errors import UserError
from dev import build_mmcv_carafe

ROOT = Path(__file__).resolve().parents[2]

OPERATOR = """\
from mmengine.model import normal_init, xavier_init
from mmengine.registry import MODELS

from ..utils.ext_loader import HERE


@MODELS.register_module(name="carafe")
class CARAFEPack:
    where = HERE


CARAFE = carafe = normal_init
"""


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "mmcv-2.2.0"
    texts = {build_mmcv_carafe.KERNELS: "kernels"}
    texts |= dict(zip(build_mmcv_carafe.PYTHON, (OPERATOR, "HERE = 'loader'\n"), strict=True))
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """A compiler that notes what it is asked for; returns where."""
    path, note = tmp_path / "cuda" / "bin" / "nvcc", tmp_path / "arguments"
    path.parent.mkdir(parents=True)
    path.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {note}\n')
    path.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    monkeypatch.delenv("CARAFE_D2_CUDA", raising=False)
    monkeypatch.setattr(build_mmcv_carafe.torch.version, "cuda", "13.0")
    return note


def test_package_holds_carafe_and_nothing_else(sources, nvcc, tmp_path):
    source = tmp_path / "mmcv.tar.gz"
    with tarfile.open(source, "w:gz") as archive:
        archive.add(sources, "mmcv-2.2.0")
    output = tmp_path / "output"
    build_mmcv_carafe.main([str(source), "--output", str(output)])

    arguments = nvcc.read_text().splitlines()
    assert [a for a in arguments if a.endswith(build_mmcv_carafe.KERNELS)]
    assert str(output / "mmcv" / "carafe.cpp") in arguments
    assert arguments[arguments.index("-o") + 1] == str(output / "mmcv" / "carafe.so")
    codes = [a.split(",code=")[1] for a in arguments if a.startswith("-gencode")]
    assert codes == ["sm_80", "sm_90", "compute_90"]
    code = "from mmcv import ops; print(ops.CARAFEPack.where, ops.carafe.__module__)"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env={"PYTHONPATH": output}, capture_output=True, text=True)
    assert run.stdout == "loader mmengine.model\n", run.stderr


def test_nothing_is_left_to_import_where_it_does_not_compile(sources, nvcc, tmp_path):
    (tmp_path / "cuda" / "bin" / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(UserError, match="did not compile"):
        build_mmcv_carafe.main([str(sources), "--output", str(tmp_path / "output")])
    assert not list((tmp_path / "output").glob("**/*.py"))


def test_wrong_sources_are_refused(nvcc, tmp_path):
    not_an_archive = tmp_path / "mmcv.zip"
    not_an_archive.write_text("no")
    with pytest.raises(UserError, match=r"mmcv\.zip: not a tar archive"):
        build_mmcv_carafe.main([str(not_an_archive)])
    with pytest.raises(UserError, match="expected mmcv's source archive or folder"):
        build_mmcv_carafe.main([str(tmp_path)])


def test_needs_nvcc(sources, monkeypatch):
    monkeypatch.setenv("CARAFE_D2_CUDA", "0")
    with pytest.raises(UserError, match="need nvcc"):
        build_mmcv_carafe.main([str(sources)])
