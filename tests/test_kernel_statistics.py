"""carafe_d2.kernel_statistics: regions of the ground truth, and the measures of kernels in them."""

import math
import re

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from carafe_d2 import CARAFEPack, kernel_statistics
from carafe_d2.config import load_config
from carafe_d2.errors import UserError

CONFIG = "shapes_mask_rcnn_R18_FPN_carafe.yaml"
OPTS = ["MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", "64"]
BORDER, INSIDE, OUTSIDE = range(3)


# --- ground truth -------------------------------------------------------------------------------


def rectangle(x, y, width, height):
    return {
        "bbox": [x, y, width, height],
        "bbox_mode": 1,
        "category_id": 0,
        "segmentation": [[x, y, x + width, y, x + width, y + height, x, y + height]],
    }


def test_objects_are_numbered_and_crowds_left_out():
    crowd = {**rectangle(0, 0, 30, 4), "iscrowd": 1}
    objects = [rectangle(2, 8, 6, 5), crowd, rectangle(20, 8, 4, 4)]
    labels = kernel_statistics.labels_of({"height": 20, "width": 30, "annotations": objects})
    expected = np.zeros((20, 30))
    expected[8:13, 2:8], expected[8:12, 20:24] = 1, 2
    np.testing.assert_array_equal(labels, expected)
    empty = kernel_statistics.labels_of({"height": 20, "width": 30, "annotations": []})
    assert empty.shape == (20, 30) and not empty.any()


def test_classes_of_label_images_are_inside_but_for_what_has_no_label(tmp_path):
    path = str(tmp_path / "labels.png")
    cv2.imwrite(path, np.array([[0, 3, 255]], np.uint8))
    np.testing.assert_array_equal(
        kernel_statistics.labels_of({"sem_seg_file_name": path}), [[1, 4, 0]]
    )


@pytest.mark.parametrize(
    "record", [{}, {"annotations": [{"bbox": [0, 0, 1, 1]}], "height": 9, "width": 9}]
)
def test_images_without_masks_are_refused(record):
    with pytest.raises(UserError, match=r"a\.png has no ground truth of masks or label images"):
        kernel_statistics.labels_of({"file_name": "a.png", **record})


def test_regions_of_a_map_of_the_image():
    labels = np.zeros((16, 24), np.uint16)
    labels[:, 10:] = 1  # the border passes through the third column of cells of four pixels
    regions = kernel_statistics.regions_of_cells(labels, np.array([[0, 0, 32.0, 16]]), (4, 8))
    assert regions.shape == (1, 4, 8)
    assert regions[0, 1].tolist() == [OUTSIDE] * 2 + [BORDER] + [INSIDE] * 3 + [-1] * 2


def test_regions_of_maps_of_boxes():
    labels = np.zeros((20, 20), np.uint16)
    labels[5:15, 5:15] = 1
    boxes = np.array([[7, 7, 13, 13], [4, 4, 16, 16], [0, 0, 2, 2], [-2, 0, 2, 2.0]])
    regions = kernel_statistics.regions_of_cells(labels, boxes, (2, 2))
    assert regions.tolist() == [
        [[INSIDE, INSIDE], [INSIDE, INSIDE]],
        [[BORDER, BORDER], [BORDER, BORDER]],
        [[OUTSIDE, OUTSIDE], [OUTSIDE, OUTSIDE]],
        [[-1, OUTSIDE], [-1, OUTSIDE]],
    ]
    box = np.array([[3, 3, 17, 17.0]])
    fine = kernel_statistics.regions_of_cells(labels, box, (14, 14))[0]
    expected = np.full((14, 14), OUTSIDE)
    expected[1:13, 1:13], expected[3:11, 3:11] = BORDER, INSIDE
    np.testing.assert_array_equal(fine, expected)


# --- kernels ------------------------------------------------------------------------------------


def test_measures_of_known_kernels():
    kernels = torch.zeros(1, 2, 9, 1, 3)
    kernels[:, :, 4, 0, 0] = 1  # the center alone
    kernels[:, :, :, 0, 1] = 1 / 9  # a plain mean
    kernels[:, 0, [0, 4], 0, 2] = 0.5  # two taps in one group, the center alone in the other
    kernels[:, 1, 4, 0, 2] = 1
    entropy, outside = kernel_statistics.measures_of(kernels)
    torch.testing.assert_close(entropy, torch.tensor([[[0, math.log2(9), 0.5]]]))
    torch.testing.assert_close(outside, torch.tensor([[[0, 8 / 9, 0.25]]]))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (torch.nn.Conv2d(1, 1, 1), "has no CARAFE upsampler"),
        (CARAFEPack(4, 2, normalizer="sigmoid"), "sum to one .*MODEL.CARAFE.NORMALIZER"),
    ],
    ids=["none", "sigmoid"],
)
def test_other_models_are_refused(model, message):
    with pytest.raises(UserError, match=message):
        kernel_statistics.carafe_upsamplers(model)


# --- the program --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(register_shapes, tmp_path_factory):
    """A model whose kernels are all plain means, but for those of the mask head: their centers."""
    register_shapes(train=1, val=2)
    model = build_model(load_config(CONFIG, OPTS))
    for name, parameter in model.named_parameters():
        if "content_encoder" in name:
            torch.nn.init.zeros_(parameter)
        if name == "roi_heads.mask_head.upsample.content_encoder.bias":
            parameter.data.unflatten(0, (25, 4))[12] = 100
    path = tmp_path_factory.mktemp("kernels") / "model.pth"
    torch.save({"model": model.state_dict()}, path)
    return str(path)


def test_program_measures_every_upsampler_of_the_dataset(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    opts = [*OPTS, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "MODEL.WEIGHTS", weights]
    kernel_statistics.main(["--config-file", CONFIG, "--output", "out/kernels.png", *opts])
    output = capsys.readouterr().out
    cells = {}
    for line in output.splitlines():
        name, *row = re.split(r"\s{2,}", line.strip())
        if name.startswith(("backbone", "roi_heads")):
            cells.setdefault(name, {})[row[0]] = int(row[1])
            mean = ["4.64", "0.960"] if name.startswith("backbone") else ["0.00", "0.000"]
            assert row[2:] == mean
    assert list(cells) == [
        *(f"backbone.fpn_upsample{level}" for level in (2, 3, 4, 5)),
        "roi_heads.mask_head.upsample",
    ]
    assert set(cells["backbone.fpn_upsample2"]) == {*kernel_statistics.REGIONS}
    # Two images of 64 pixels have 16 x 16 cells at p2; 2 x 2 at p5.
    totals = [sum(regions.values()) for regions in cells.values()]
    assert totals[:4] == [2 * 16**2, 2 * 8**2, 2 * 4**2, 2 * 2**2]
    assert cv2.imread("out/kernels.png").std() > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-images", "0"], "--num-images must be at least 1, got 0"),
        (["DATASETS.TEST", "()"], "DATASETS.TEST is empty"),
        (["DATASETS.TEST", "('nonsense',)"], "dataset 'nonsense' .* is not registered"),
        (["DATASETS.TEST", "('boxes_only',)"], "has no ground truth of masks or label images"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_get_one_clear_line(weights, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    if "boxes_only" not in DatasetCatalog:
        records = DatasetCatalog.get("shapes_val")
        DatasetCatalog.register(
            "boxes_only",
            lambda: [{k: v for k, v in r.items() if k != "annotations"} for r in records],
        )
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        kernel_statistics.main(["--config-file", CONFIG, *options, *OPTS, "MODEL.WEIGHTS", weights])
    assert list(tmp_path.iterdir()) == []
