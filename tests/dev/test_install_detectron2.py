"""Tests of dev/install_detectron2.py."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from carafe_d2.errors import UserError
from dev import install_detectron2 as tool


@pytest.fixture(autouse=True)
def no_pip(monkeypatch):
    """Makes a test fail that would change the environment it runs in; some replace it."""

    def refuse(*arguments, **_):
        raise AssertionError(f"unexpected: pip {' '.join(arguments)}")

    monkeypatch.setattr(tool, "pip", refuse)


@pytest.fixture
def pip_runs(monkeypatch):
    """The arguments of every run of pip, none of which takes place."""
    runs = []
    monkeypatch.setattr(tool, "pip", lambda *arguments, **_: runs.append(arguments))
    monkeypatch.setattr(tool, "ensure_build_tools", lambda: None)
    return runs


REAL_PIP = tool.pip


# --- the source archive -------------------------------------------------------------------------


def write_sdist(path: Path, files: dict[str, str]) -> None:
    """Writes a source archive as setuptools makes them: everything in one top folder."""
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"pb1-detectron2-0.6/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))


FILES = {"setup.py": "import torch", "detectron2/__init__.py": "a = 1\nold = 2\n"}
PATCH = """\
# why it is changed
diff --git a/detectron2/__init__.py b/detectron2/__init__.py
--- a/detectron2/__init__.py
+++ b/detectron2/__init__.py
@@ -1,2 +1,2 @@
 a = 1
-old = 2
+new = 2

# the archive's own imports torch
diff --git a/setup.py b/setup.py
new file mode 100644
--- /dev/null
+++ b/setup.py
@@ -0,0 +1,2 @@
+from setuptools import setup
+setup(name="detectron2", version="0.6+carafe.0", packages=["detectron2"])
"""


@pytest.fixture
def sdist(tmp_path, monkeypatch):
    """A tiny source archive, and a patch that fits it."""
    write_sdist(tmp_path / tool.SDIST, FILES)
    (tmp_path / "detectron2.patch").write_text(PATCH)
    monkeypatch.setattr(tool, "PATCH", tmp_path / "detectron2.patch")
    return tmp_path / tool.SDIST


@pytest.mark.parametrize("program", ["git", "patch"])
def test_archive_is_mended_and_pip_builds_it(sdist, program, monkeypatch, tmp_path):
    if not (path := shutil.which(program)):
        pytest.skip(f"no {program}")
    monkeypatch.setattr(tool.shutil, "which", lambda name: path if name == program else None)
    if program == "git":  # which takes the paths in a patch for those of a repository around it
        subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    source = tool.unpack(sdist)
    site = str(tmp_path / "site")
    options = ["--use-pep517", "--no-deps", "--no-index", "--no-build-isolation", "--target", site]
    REAL_PIP("install", *options, str(source), doing="install it")
    (installed,) = importlib.metadata.distributions(path=[site])
    assert (installed.name, installed.version) == ("detectron2", "0.6+carafe.0")
    assert (tmp_path / "site/detectron2/__init__.py").read_text() == "a = 1\nnew = 2\n"


def test_patch_that_does_not_fit(sdist):
    tool.PATCH.write_text(PATCH.replace("a = 1", "a = 3"))
    with pytest.raises(UserError, match=r"detectron2\.patch does not fit pb1-detectron2-0\.6"):
        tool.unpack(sdist)


def test_neither_git_nor_patch(sdist, monkeypatch):
    monkeypatch.setattr(tool.shutil, "which", lambda _: None)
    with pytest.raises(UserError, match="with git or patch: install one of them"):
        tool.unpack(sdist)


def test_patch_gives_the_version_and_a_reason_for_every_file():
    before, *changes = tool.PATCH.read_text().split("\ndiff --git ")
    assert f'+    version="{tool.VERSION}",\n' in changes[0]
    for above in [before, *changes[:-1]]:
        assert above.splitlines()[-1].startswith("# ")


@pytest.mark.parametrize(
    ("there", "message"), [(True, "another sha256"), (False, "check the network")]
)
def test_archive_that_pip_does_not_hand_out(tmp_path, monkeypatch, there, message):
    """One of another hash is refused before any of its code runs."""
    monkeypatch.setattr(tool, "pip", REAL_PIP)
    index, folder = tmp_path / "index", tmp_path / "folder"
    index.mkdir()
    if there:
        write_sdist(index / tool.SDIST, {"setup.py": "raise SystemExit('this must not run')"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with pytest.raises(UserError, match=f"cannot fetch .*: .*{message}") as error:
        tool.fetch_sdist(folder)
    assert "\n" not in str(error.value)
    assert not (folder / tool.SDIST).exists()


# --- what is installed --------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that Python searches before all others, with a Detectron2 of unknown origin."""
    # A process that has imported one would find that one again.
    monkeypatch.delitem(sys.modules, "detectron2", raising=False)
    (tmp_path / "site" / "detectron2").mkdir(parents=True)
    (tmp_path / "site" / "detectron2" / "__init__.py").write_text("raise AssertionError")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tmp_path / "site"


GIT = {"url": "https://host/d2", "vcs_info": {"vcs": "git", "commit_id": "abc"}}
GIT_AT = {"url": GIT["url"], "vcs_info": {**GIT["vcs_info"], "requested_revision": "v1"}}


def add_metadata(site: Path, version: str, source: dict | None = None) -> None:
    """Makes the Detectron2 in `site` one that pip installed."""
    info = site / f"detectron2-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: detectron2\nVersion: {version}\n")
    (info / "RECORD").write_text(f"detectron2/__init__.py,,\n{info.name}/METADATA,,\n")
    if source:
        (info / "direct_url.json").write_text(json.dumps(source))


@pytest.mark.parametrize("requirement", [[], ["git+https://host/d2"]])
def test_installed_one_is_used_as_it_is(site, capsys, requirement):
    """Without running pip."""
    add_metadata(site, "0.7", GIT)
    tool.main(requirement)
    assert f" is installed in {site / 'detectron2'}\n" in capsys.readouterr().out


def test_installed_one_without_metadata_is_used_as_it_is(site):
    assert tool.installed_detectron2()[0] == site / "detectron2"


def test_leftover_of_an_interrupted_pip_is_not_an_installed_one(site, monkeypatch):
    monkeypatch.setattr(tool.sysconfig, "get_path", lambda _: str(site))
    monkeypatch.setattr(tool.importlib.metadata, "packages_distributions", dict)
    assert tool.installed_detectron2() == (None, None)


def test_our_own_of_another_revision_is_replaced(site, tmp_path, pip_runs, monkeypatch):
    add_metadata(site, "0.6+carafe.0")
    monkeypatch.setattr(tool, "fetch_sdist", lambda _: tmp_path / tool.SDIST)
    monkeypatch.setattr(tool, "unpack", lambda sdist: sdist.with_name("source"))
    tool.main([])
    assert pip_runs == [("install", "--use-pep517", str(tmp_path / "source"))]


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


def test_requirement_replaces_another_source_of_the_same_version(site, pip_runs):
    add_metadata(site, "0.6", GIT)
    tool.main(["git+https://host/other"])
    plain = ("install", "--no-build-isolation", "git+https://host/other")
    assert pip_runs == [plain, (*plain[:2], "--no-deps", "--force-reinstall", plain[2])]


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["torch", "torchvision"])
def test_missing_torch_is_named(missing, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        tool.importlib.util, "find_spec", lambda name: None if name == missing else find(name)
    )
    with pytest.raises(UserError, match=f"^{missing} is missing in this environment"):
        tool.main([])


def test_requirement_that_cannot_be_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "pip", REAL_PIP)
    monkeypatch.setattr(tool, "ensure_build_tools", lambda: None)
    with pytest.raises(UserError, match=f"cannot install {tmp_path / 'nowhere'}: pip failed"):
        tool.main([str(tmp_path / "nowhere")])


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


def test_installed_one_works():
    installed = [d.version for d in importlib.metadata.distributions(name="detectron2")]
    if installed[:1] != [tool.VERSION]:
        pytest.skip(f"the installed Detectron2 is {installed}, not the one that this tool builds")
    subprocess.run([sys.executable, "-W", "ignore", "-c", USE_IT], check=True)
