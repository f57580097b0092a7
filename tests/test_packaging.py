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

    def python_in_it(*arguments, cwd=environment) -> subprocess.CompletedProcess:
        return run(python, "-I", *arguments, cwd=cwd)  # without PYTHONPATH

    return python_in_it


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
    package |= {f"carafe_d2/{name}" for name in files if name.startswith("configs/")}
    assert names - information == package | {"carafe_d2/_C.so"}
    assert "carafe_d2/py.typed" in package
    assert f"carafe_d2-{__version__}.dist-info/licenses/LICENSE" in information
    assert f"\nVersion: {__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert re.findall(r"^Requires-Dist: ([^;\n]*)$", metadata, re.MULTILINE) == ["torch>=2.10"]


# What somebody does with data of their own, in a folder of their own.
OWN_DATASET = """
import json
import cv2, numpy as np
from pycocotools import mask as mask_util

images, annotations = [], []
for i in range(1, 5):
    image = np.full((64, 64, 3), 40, np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    cv2.circle(mask, (20 + 6 * i, 30), 12, 1, -1)
    image[mask > 0] = (200, 80, 40)
    deep = image[:, :, 0].astype(np.uint16) * 256
    cv2.imwrite(f"images/{i}.png", deep if i == 4 and DEEP else image)
    images.append({"id": i, "file_name": f"{i}.png", "height": 64, "width": 64})
    rle = mask_util.encode(np.asfortranarray(mask))
    rle["counts"] = rle["counts"].decode()
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    annotation = {
        "id": i - 1,
        "image_id": i,
        "category_id": 7 if i % 2 else 3,
        "bbox": mask_util.toBbox(rle).tolist(),
        "segmentation": rle if i % 2 else [contours[0].ravel().tolist()],
    }
    annotations.append(annotation)  # without area and iscrowd, and with the id 0
categories = [{"id": 7, "name": "cell"}, {"id": 3, "name": "debris"}]
content = {"images": images, "annotations": annotations, "categories": categories}
json.dump(content, open("own.json", "w"))
"""
OWN_CONFIG = """
_BASE_: "{base}"
MODEL:
  ROI_HEADS: {{NUM_CLASSES: 2}}
DATASETS:
  REGISTER: ("own=own.json:images",)
  TRAIN: ("own",)
  TEST: ("own",)
INPUT: {{MIN_SIZE_TRAIN: "(64,)", MIN_SIZE_TEST: 64}}
SOLVER: {{IMS_PER_BATCH: 2, MAX_ITER: 2}}
TEST:
  AUG: {{MIN_SIZES: "(64, 96)"}}
OUTPUT_DIR: "out"
"""
OWN_PREDICTION = """
import cv2
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.utils.visualizer import Visualizer
from carafe_d2.config import load_config

cfg = load_config("own.yaml", ["MODEL.WEIGHTS", "out/model_final.pth"])
predict = DefaultPredictor(cfg)
image = cv2.imread("images/1.png")
instances = predict(image)["instances"]
drawn = Visualizer(image[:, :, ::-1], MetadataCatalog.get("own")).draw_instance_predictions(
    instances
)
cv2.imwrite("drawn.png", drawn.get_image()[:, :, ::-1])
print(len(instances.pred_masks) == len(instances), predict.metadata.thing_classes)
"""


def test_user_works_with_data_of_their_own_on_the_installed_wheel(installed, tmp_path):
    pytest.importorskip("detectron2")

    def python(*arguments, returncode=0) -> str:
        result = installed(*arguments, cwd=tmp_path)
        assert result.returncode == returncode, (result.stdout + result.stderr)[-3000:]
        return result.stdout + result.stderr

    (tmp_path / "images").mkdir()
    base = python("-c", "from carafe_d2 import model_zoo as z; print(z.get_config_file("
                  "'shapes_mask_rcnn_R18_FPN_carafe.yaml'))").split("\n")  # fmt: skip
    (base,) = [line for line in base if line.endswith(".yaml")]
    assert "site-packages" in base
    (tmp_path / "own.yaml").write_text(OWN_CONFIG.format(base=base))
    train = ("-m", "carafe_d2.train_net", "--config-file", "own.yaml")

    python("-c", OWN_DATASET.replace("DEEP", "True"))
    refused = python(*train, returncode=1)
    assert "images/4.png (id 4): its pixels have mode I;16" in refused.splitlines()[-1]
    python("-c", OWN_DATASET.replace("DEEP", "False"))

    log = python(*train)
    assert "area of 4 annotations is that of their masks or boxes" in log
    log = python(*train, "--resume", "SOLVER.MAX_ITER", "3")
    assert "Starting training from iteration 2" in log
    evaluate = ("--eval-only", "MODEL.WEIGHTS", "out/model_final.pth", "TEST.AUG.ENABLED", "True")
    python(*train, *evaluate)
    assert (tmp_path / "out/inference_TTA/coco_instances_results.json").is_file()
    output = python("-c", OWN_PREDICTION)
    assert "True ['debris', 'cell']" in output
    assert (tmp_path / "drawn.png").stat().st_size > 0


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
        "-c",
        "import sys, torch, carafe_d2\n"
        "assert carafe_d2.__file__.startswith(sys.prefix), carafe_d2.__file__\n"
        "x = torch.rand(1, 4, 3, 5, requires_grad=True)\n"
        "masks = torch.rand(1, 9, 6, 10)\n"
        "y = carafe_d2.carafe(x, masks, 3, 1, 2)\n"
        "torch.testing.assert_close(y, carafe_d2.carafe_naive(x, masks, 3, 1, 2))\n"
        "y.sum().backward()\n",
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
def test_operator_without_cuda_says_so(installed):
    result = installed(
        "-c",
        "import torch, carafe_d2\n"
        "x = torch.rand(1, 2, 3, 3).cuda()\n"
        "carafe_d2.carafe(x, torch.ones(1, 1, 3, 3).cuda(), 1, 1, 1)\n",
    )
    assert "built without CUDA" in result.stderr
