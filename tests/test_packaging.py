"""The source archive and the wheel that `make dist` builds, and what installing the wheel gives."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from carafe_d2.collect_env import build_info
from carafe_d2.version import __version__

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def files() -> set[str]:
    """The files of a clean checkout."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    if listed.returncode:
        pytest.skip(f"not a checkout: {listed.stderr}")
    return {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(files, tmp_path_factory) -> tuple[Path, str]:
    """The folder dist/ of a clean checkout after a build for the CPU, and the build's output."""
    checkout = tmp_path_factory.mktemp("packaging") / "checkout"
    for name in files:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    flags = {"CARAFE_D2_CUDA": "0", "CXXFLAGS": "-O0"}  # -O0 compiles quickly
    # Builds the archive from the checkout and the wheel from the archive alone.
    build = [sys.executable, "-m", "build", "--no-isolation"]
    result = run(*build, cwd=checkout, env=os.environ | flags)
    assert result.returncode == 0, result.stdout + result.stderr
    return checkout / "dist", result.stdout


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (wheel,) = built[0].glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs Python where the wheel is installed, and of this environment only what it needs."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment, check=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    result = run(*pip, "--no-deps", "--no-index", wheel)
    assert result.returncode == 0, result.stderr
    (site_packages,) = environment.glob("lib/python*/site-packages")
    # Comes after the wheel's folder, and an editable installation in it has no effect.
    (site_packages / "others.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return lambda code: run(python, "-I", "-c", code, cwd=environment)  # without PYTHONPATH


def test_archive_has_every_file(built, files):
    (archive,) = built[0].glob("*.tar.gz")
    assert archive.name == f"carafe_d2-{__version__}.tar.gz"
    with tarfile.open(archive) as content:
        names = {member.name.partition("/")[2] for member in content if member.isfile()}
    generated = {name for name in names if name.startswith("carafe_d2.egg-info/")}
    assert names - generated - {"PKG-INFO", "setup.cfg"} == files


def test_build_says_what_it_builds_for(built):
    assert "carafe_d2: building for CPU only: CARAFE_D2_CUDA=0\n" in built[1]


def test_wheel_is_for_any_python_on_this_platform(wheel):
    platform = re.sub(r"\W", "_", sysconfig.get_platform())
    assert wheel.name == f"carafe_d2-{__version__}-py3-none-{platform}.whl"
    with zipfile.ZipFile(wheel) as content:
        text = content.read(f"carafe_d2-{__version__}.dist-info/WHEEL").decode()
    assert "Root-Is-Purelib: false" in text
    assert re.findall("Tag: (.*)", text) == [f"py3-none-{platform}"]


def test_wheel_has_the_package_and_nothing_else(wheel, files):
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
        metadata = content.read(f"carafe_d2-{__version__}.dist-info/METADATA").decode()
    information = {name for name in names if ".dist-info/" in name}
    package = {name for name in files if name.startswith("carafe_d2/")}
    assert names - information == package | {"carafe_d2/_C.so"}
    assert "carafe_d2/py.typed" in package
    assert f"carafe_d2-{__version__}.dist-info/licenses/LICENSE" in information
    assert f"\nVersion: {__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert re.findall(r"^Requires-Dist: ([^;\n]*)$", metadata, re.MULTILINE) == ["torch>=2.10"]


def test_changelog_knows_the_version():
    assert re.search(rf"^## {re.escape(__version__)} - ", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_library_tells_how_it_was_built(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as content:
        info = build_info(Path(content.extract("carafe_d2/_C.so", tmp_path)))
    assert info["version"] == __version__
    assert info["torch"] == torch.__version__
    assert info["cxxflags"].endswith(" -O0")
    assert info["cuda"] is None and info["cuda_architectures"] == []
    assert str(ROOT) not in str(info) and sys.prefix not in str(info)


def test_operator_runs_where_the_wheel_is_installed(installed):
    result = installed(
        "import sys, torch, carafe_d2\n"
        "assert carafe_d2.__file__.startswith(sys.prefix), carafe_d2.__file__\n"
        "x = torch.rand(1, 4, 3, 5, requires_grad=True)\n"
        "masks = torch.rand(1, 9, 6, 10)\n"
        "y = carafe_d2.carafe(x, masks, 3, 1, 2)\n"
        "torch.testing.assert_close(y, carafe_d2.carafe_naive(x, masks, 3, 1, 2))\n"
        "y.sum().backward()\n"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
def test_operator_without_cuda_says_so(installed):
    result = installed(
        "import torch, carafe_d2\n"
        "x = torch.rand(1, 2, 3, 3).cuda()\n"
        "carafe_d2.carafe(x, torch.ones(1, 1, 3, 3).cuda(), 1, 1, 1)\n"
    )
    assert "built without CUDA" in result.stderr
