"""Tests of dev/install_detectron2.py."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from dev import install_detectron2 as tool

SCRIPT = Path(__file__).resolve().parents[2] / "dev" / "install_detectron2.py"


@pytest.fixture(autouse=True)
def no_pip(monkeypatch):
    """Makes a test fail that would change the environment it runs in; some replace it."""

    def refuse(*arguments, **_):
        raise AssertionError(f"unexpected: pip {' '.join(arguments)}")

    monkeypatch.setattr(tool, "pip", refuse)


REAL_PIP = tool.pip


# --- the mends ----------------------------------------------------------------------------------


def test_mend_changes_whole_words_only():
    mends = [tool.Mend("why", "np.int", "np.int64", {"a.py": 1})]
    mended = tool.mend({"a.py": "np.int, np.int32, jnp.int, np.integer", "b.py": "np.int"}, mends)
    assert mended == {"a.py": "np.int64, np.int32, jnp.int, np.integer", "b.py": "np.int"}


def test_mend_takes_its_words_literally():
    mends = [tool.Mend("why", ".warn(", r".warning(\g<0>", {"a.py": 1})]
    assert tool.mend({"a.py": "logger.warn(1)"}, mends)["a.py"] == r"logger.warning(\g<0>1)"


@pytest.mark.parametrize("text", ["", "Image.LINEAR Image.LINEAR", "Image.BILINEAR"])
def test_mend_that_does_not_fit_is_an_error(text):
    mends = [tool.Mend("Pillow renamed it", "Image.LINEAR", "Image.BILINEAR", {"a.py": 1})]
    with pytest.raises(tool.InstallError, match=r"a\.py has 'Image\.LINEAR' .*Pillow renamed it"):
        tool.mend({"a.py": text}, mends)


def test_mend_of_a_missing_file_is_an_error():
    with pytest.raises(tool.InstallError, match=r"gone\.py has 'old' 0 times where 1 were"):
        tool.mend({}, [tool.Mend("why", "old", "new", {"gone.py": 1})])


def test_every_mend_says_why_in_one_line_and_changes_something():
    for mend in tool.MENDS:
        assert mend.why and "\n" not in mend.why
        assert mend.old != mend.new
        assert mend.places and all(count > 0 for count in mend.places.values())


# --- the wheel ----------------------------------------------------------------------------------


def write_sdist(path: Path, files: dict[str, str]) -> None:
    """Writes a source archive as setuptools makes them: everything in one top folder."""
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"pb1-detectron2-0.6/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))


def test_read_sdist_takes_packages_configs_and_projects_but_nothing_else(tmp_path):
    files = {
        "LICENSE": "Apache",
        "setup.py": "import torch",
        "tools/train_net.py": "",
        "detectron2/__init__.py": "__version__ = '0.6'",
        "detectron2/model_zoo/configs/Base.yaml": "MODEL: {}",
        "projects/PointRend/point_rend/__init__.py": "rend",
        "projects/PointRend/README.md": "",
    }
    write_sdist(tmp_path / "d2.tar.gz", files)
    assert tool.read_sdist(tmp_path / "d2.tar.gz") == {
        "LICENSE": "Apache",
        "detectron2/__init__.py": "__version__ = '0.6'",
        "detectron2/model_zoo/configs/Base.yaml": "MODEL: {}",
        "detectron2/projects/point_rend/__init__.py": "rend",
    }


def test_wheel_is_deterministic_and_pip_installs_it(tmp_path):
    files = {"LICENSE": "Apache", "detectron2/__init__.py": "name = 'Grün'\n"}
    content = tool.build_wheel(files)
    assert content == tool.build_wheel(dict(files))
    wheel = tmp_path / tool.WHEEL
    wheel.write_bytes(content)

    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(tmp_path / "site"), str(wheel)], check=True)

    (installed,) = importlib.metadata.distributions(path=[str(tmp_path / "site")])
    assert (installed.name, installed.version) == ("detectron2", tool.VERSION)
    assert installed.requires == list(tool.REQUIRES)
    module = tmp_path / "site" / "detectron2" / "__init__.py"
    assert module.read_text("utf-8") == files["detectron2/__init__.py"]


def test_stand_in_for_the_compiled_module_raises_only_when_used():
    scope = {}
    exec(tool.ADDED["detectron2/layers/compiled.py"], scope)
    assert not hasattr(scope["_C"], "__wrapped__")  # introspection must not raise
    with pytest.raises(ImportError, match=r"nms_rotated is a compiled operator.* from source"):
        scope["_C"].nms_rotated(None)


# --- the cache ----------------------------------------------------------------------------------


@pytest.fixture
def tiny_sdist(tmp_path, monkeypatch):
    """Has the tool know a tiny source archive instead of Detectron2's; returns the fetches made."""
    source = tmp_path / "source.tar.gz"
    write_sdist(source, {"detectron2/__init__.py": "old"})
    fetches = []

    def fetch(folder):
        fetches.append(folder)
        (folder / tool.SDIST).write_bytes(source.read_bytes())
        return folder / tool.SDIST

    mends = [tool.Mend("why", "old", "new", {"detectron2/__init__.py": 1})]
    monkeypatch.setattr(tool, "fetch_sdist", fetch)
    monkeypatch.setattr(tool, "SDIST_SHA256", tool.sha256(source.read_bytes()))
    monkeypatch.setattr(tool.mend, "__defaults__", (mends,))
    return fetches


def test_cache_is_used_while_intact(tmp_path, tiny_sdist, capsys):
    cache = tmp_path / "cache"
    wheel = tool.cached_wheel(cache)
    content = wheel.read_bytes()
    assert len(capsys.readouterr().out.splitlines()) == 2  # fetching, mending
    assert tool.cached_wheel(cache) == wheel
    assert capsys.readouterr().out == ""

    wheel.write_bytes(content[:100])
    assert tool.cached_wheel(cache).read_bytes() == content
    assert len(tiny_sdist) == 1

    wheel.unlink()
    (cache / tool.SDIST).write_bytes(b"half of i")
    assert tool.cached_wheel(cache).read_bytes() == content
    assert len(tiny_sdist) == 2
    expected = {tool.SDIST, tool.WHEEL, f"{tool.WHEEL}.sha256"}
    assert {path.name for path in cache.iterdir()} == expected


def test_fetched_archive_with_another_hash_is_refused(tmp_path, tiny_sdist, monkeypatch):
    monkeypatch.setattr(tool, "SDIST_SHA256", "0" * 64)
    with pytest.raises(tool.InstallError, match=r"another sha256 .* not used"):
        tool.cached_wheel(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_pip_refuses_an_archive_with_another_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "pip", REAL_PIP)
    write_sdist(tmp_path / tool.SDIST, {"setup.py": "raise SystemExit('this must not run')"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(tool.InstallError, match=r"cannot fetch .*: .* another sha256") as error:
        tool.cached_sdist(tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_package_index_without_the_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "pip", REAL_PIP)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(tool.InstallError, match=r"cannot fetch .* check the network") as error:
        tool.cached_sdist(tmp_path / "cache")
    assert "\n" not in str(error.value)


# --- what is installed --------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that Python searches before all others, with a Detectron2 of unknown origin."""
    # A process that has imported one would find that one again.
    monkeypatch.delitem(sys.modules, "detectron2", raising=False)
    (tmp_path / "site" / "detectron2").mkdir(parents=True)
    (tmp_path / "site" / "detectron2" / "__init__.py").write_text("raise AssertionError")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(tool, "check_environment", lambda: None)
    return tmp_path / "site"


def add_metadata(site: Path, version: str, source: dict | None = None) -> None:
    """Makes the Detectron2 in `site` one that pip installed."""
    info = site / f"detectron2-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: detectron2\nVersion: {version}\n")
    (info / "RECORD").write_text(f"detectron2/__init__.py,,\n{info.name}/METADATA,,\n")
    if source:
        (info / "direct_url.json").write_text(json.dumps(source))


def test_installed_one_is_used_as_it_is(site, capsys):
    add_metadata(site, "0.7")
    assert tool.main([]) == 0
    expected = f"install_detectron2: Detectron2 0.7 is installed in {site / 'detectron2'}\n"
    assert capsys.readouterr().out == expected


def test_installed_one_without_metadata_is_used_as_it_is(site):
    assert tool.installed_detectron2()[0] == site / "detectron2"


def test_leftover_of_an_interrupted_pip_is_not_an_installed_one(site, monkeypatch):
    monkeypatch.setattr(tool.sysconfig, "get_path", lambda _: str(site))
    monkeypatch.setattr(tool.importlib.metadata, "packages_distributions", dict)
    assert tool.installed_detectron2() == (None, None)


def test_our_own_of_another_revision_is_replaced(site, tmp_path, monkeypatch):
    add_metadata(site, "0.6+carafe.0")
    runs = []
    monkeypatch.setattr(tool, "pip", lambda *arguments, **_: runs.append(arguments))
    monkeypatch.setattr(tool, "cached_wheel", lambda _: tmp_path / tool.WHEEL)
    assert tool.main([]) == 0
    assert runs == [("install", str(tmp_path / tool.WHEEL))]


GIT = {"url": "https://host/d2", "vcs_info": {"vcs": "git", "commit_id": "abc"}}
GIT_AT = {"url": GIT["url"], "vcs_info": {**GIT["vcs_info"], "requested_revision": "v1"}}


@pytest.mark.parametrize(
    ("source", "requirement", "same"),
    [
        (GIT, "git+https://host/d2", True),
        (GIT, "detectron2 @ git+https://host/d2#egg=detectron2", True),
        (GIT, "git+https://host/d2@v1", False),
        (GIT_AT, "git+https://host/d2@v1", True),
        ({"url": "file:///some/folder", "dir_info": {}}, "/some/folder", True),
        ({"url": "file:///some/folder", "dir_info": {}}, "/other/folder", False),
        (None, "git+https://host/d2", False),
    ],
)
def test_requirement_is_recognized_when_it_is_installed(site, source, requirement, same):
    add_metadata(site, "0.6", source)
    assert tool.is_installed_from(requirement) is same


def test_requirement_is_installed_once(site, capsys):
    add_metadata(site, "0.6", GIT)
    assert tool.main(["git+https://host/d2"]) == 0  # without running pip
    assert f"is installed in {site / 'detectron2'}" in capsys.readouterr().out


def test_requirement_replaces_another_source_of_the_same_version(site, monkeypatch):
    add_metadata(site, "0.6", GIT)
    runs = []
    monkeypatch.setattr(tool, "pip", lambda *arguments, **_: runs.append(arguments))
    monkeypatch.setattr(tool, "ensure_build_tools", lambda: None)
    assert tool.main(["git+https://host/other"]) == 0
    plain = ("install", "--no-build-isolation", "git+https://host/other")
    assert runs == [plain, (*plain[:2], "--no-deps", "--force-reinstall", plain[2])]


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["torch", "torchvision"])
def test_missing_torch_is_named(missing, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        tool.importlib.util, "find_spec", lambda name: None if name == missing else find(name)
    )
    assert tool.main([]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"install_detectron2: error: {missing} is missing")
    assert error.count("\n") == 1


def test_old_python_is_named(monkeypatch, capsys):
    monkeypatch.setattr(tool.sys, "version_info", (3, 9, 1))
    assert tool.main([]) == 1
    assert "3.10 or newer" in capsys.readouterr().err


def test_requirement_that_cannot_be_installed(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tool, "pip", REAL_PIP)
    monkeypatch.setattr(tool, "check_environment", lambda: None)
    monkeypatch.setattr(tool, "ensure_build_tools", lambda: None)
    assert tool.main([str(tmp_path / "nowhere")]) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(f"install_detectron2: error: cannot install {tmp_path / 'nowhere'}")


# --- the real one -------------------------------------------------------------------------------

USE_IT = """
import sys
import detectron2.evaluation, detectron2.layers, detectron2.engine, detectron2.utils.analysis
import numpy as np
import torch
from detectron2 import model_zoo
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.layers import nms_rotated
from detectron2.layers.mask_ops import paste_mask_in_image_old
from detectron2.layers.rotated_boxes import pairwise_iou_rotated
from detectron2.projects import deeplab, point_rend
from detectron2.structures.masks import polygons_to_bitmask

assert model_zoo.get_config_file("Base-RCNN-FPN.yaml").endswith("Base-RCNN-FPN.yaml")
assert model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml").MODEL.MASK_ON
assert "pkg_resources" not in sys.modules
assert convert_image_to_rgb(np.zeros((4, 4, 1), np.uint8), "L").shape == (4, 4, 3)
assert polygons_to_bitmask([np.array([0.0, 0, 4, 0, 4, 4])], 5, 5).dtype == bool
assert paste_mask_in_image_old(torch.ones(28, 28), torch.tensor([0, 0, 3, 3]), 5, 5, 0.5).any()
for operator in (pairwise_iou_rotated, lambda a, b: nms_rotated(a, a[:, 0], 0.5)):
    try:
        operator(torch.ones(1, 5), torch.ones(1, 5))
    except ImportError as error:
        assert "compiled operator" in str(error)
    else:
        raise AssertionError("a compiled operator without the compiled module")
"""


def test_installed_wheel_works():
    try:
        version = importlib.metadata.version("detectron2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("no Detectron2 is installed")
    if version != tool.VERSION:
        pytest.skip(f"the installed Detectron2 is {version}, not the one that this tool builds")
    subprocess.run([sys.executable, "-W", "ignore", "-c", USE_IT], check=True)
