"""tools/show_kernels.py: the model's own kernels, accumulated as its pyramid applies them."""

from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from carafe_d2 import carafe_naive, inference
from carafe_d2.config import load_config
from carafe_d2.errors import UserError
from tools import show_kernels

CONFIG = "shapes_mask_rcnn_R18_FPN_carafe.yaml"
# Images of 48 x 96 are seen as 128 x 256: cells of 1.5 pixels at p2, 24 at p6.
IMAGE_SIZE = (48, 96)
OPTS = ["MODEL.DEVICE", "cpu", "MODEL.CARAFE.UP_GROUP", "2"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A random model whose kernels are far from uniform."""
    torch.manual_seed(0)
    model = build_model(load_config(CONFIG, OPTS))
    for name, parameter in model.named_parameters():
        if name.endswith("content_encoder.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp("kernels") / "model.pth"
    torch.save({"model": model.state_dict()}, path)
    return str(path)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 255, (*IMAGE_SIZE, 3), np.uint8)


@pytest.fixture(scope="module")
def upsamplings(weights, image):
    """The steps of the top-down path, and inputs and outputs of the model's upsamplers."""
    predictor = inference.Predictor(load_config(CONFIG, [*OPTS, "MODEL.WEIGHTS", weights]))
    passed = {}
    for level in (2, 3, 4, 5):
        predictor.model.backbone.get_submodule(f"fpn_upsample{level}").register_forward_hook(
            lambda module, inputs, output, level=level: passed.update({level: (*inputs, output)})
        )
    _, steps = show_kernels.predict_kernels(predictor, image)
    return steps, passed


# --- kernels ------------------------------------------------------------------------------------


def test_masks_are_those_the_model_reassembles_with(upsamplings):
    steps, passed = upsamplings
    assert [(s.coarse, s.fine) for s in steps] == [(f"p{i + 1}", f"p{i}") for i in (2, 3, 4, 5)]
    assert [s.stride for s in steps] == [8, 16, 32, 64]
    for step, (features, output) in zip(steps, (passed[i] for i in (2, 3, 4, 5)), strict=True):
        assert step.masks.shape == (2, 25, *output.shape[2:])
        torch.testing.assert_close(step.masks.sum(dim=1), torch.ones(2, *output.shape[2:]))
        assert step.masks.max() > 0.2
        masks = step.masks.flatten(0, 1)[None]
        torch.testing.assert_close(carafe_naive(features, masks, 5, 2, 2), output)


def test_kernel_is_the_mean_of_the_groups_with_rows_first(upsamplings):
    step = upsamplings[0][0]
    kernel = step.kernel(7, 30)
    assert kernel.shape == (5, 5)
    for u, v in ((0, 0), (1, 3), (4, 2)):
        assert kernel[u, v] == pytest.approx(float(step.masks[:, 5 * u + v, 7, 30].mean()))


def brute_force(steps, group, row, column):
    """Follows every tap of every kernel of a group by itself."""
    cells = {(row, column): 1.0}
    for step in steps:
        coarse = Counter()
        height, width = (side // 2 for side in step.masks.shape[2:])
        for (y, x), weight in cells.items():
            for u in range(-2, 3):
                for v in range(-2, 3):
                    at = y // 2 + u, x // 2 + v
                    if 0 <= at[0] < height and 0 <= at[1] < width:
                        tap = 5 * (u + 2) + v + 2
                        coarse[at] += weight * float(step.masks[group, tap, y, x])
        cells = coarse
        weights = np.zeros((height, width))
        for at, weight in cells.items():
            weights[at] = weight
        yield weights


@pytest.mark.parametrize("cell", [(16, 40), (0, 0), (31, 5)])
def test_accumulation_follows_every_tap(upsamplings, cell):
    steps, _ = upsamplings
    groups = [brute_force(steps, group, *cell) for group in (0, 1)]
    accumulated = show_kernels.accumulate(steps, *cell)
    assert [a.shape for a in accumulated] == [(16, 32), (8, 16), (4, 8), (2, 4)]
    for weights, expected in zip(accumulated, zip(*groups, strict=True), strict=True):
        np.testing.assert_allclose(weights, np.mean(expected, axis=0), atol=1e-6)


@pytest.mark.parametrize(
    "opts",
    [
        ["MODEL.FPN.UPSAMPLE", "nearest"],
        ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"],
    ],
)
def test_other_pyramids_are_refused(opts, image, tmp_path):
    path = str(tmp_path / "model.pth")
    torch.save({"model": build_model(load_config(CONFIG, [*OPTS, *opts])).state_dict()}, path)
    predictor = inference.Predictor(load_config(CONFIG, [*OPTS, *opts, "MODEL.WEIGHTS", path]))
    with pytest.raises(UserError, match="backbone does not upsample with CARAFE"):
        show_kernels.predict_kernels(predictor, image)


# --- points -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("point", "cells"),
    [
        ((0, 0), [(0, 0)] * 4),
        ((95, 47), [(31, 63), (15, 31), (7, 15), (3, 7)]),
        ((60, 20), [(13, 40), (6, 20), (3, 10), (1, 5)]),
    ],
)
def test_points_lie_in_the_cells_of_their_pixels(upsamplings, point, cells):
    position = (np.array(point) + 0.5) * 256 / 96
    assert [step.locate(position) for step in upsamplings[0]] == cells


def test_innermost_point_of_a_ring_is_in_the_ring():
    mask = np.zeros((60, 80), np.uint8)
    cv2.circle(mask, (40, 30), 20, 1, thickness=9)
    instances = Instances((60, 80))
    instances.pred_boxes = Boxes(torch.tensor([[1.0, 2, 11, 8], [16, 6, 64, 54], [0, 0, 9, 9]]))
    instances.scores = torch.tensor([0.5, 0.9, 0.1])
    points = show_kernels.innermost_points(instances, 2)
    assert points == [(40, 30), (6, 5)]
    instances.pred_masks = torch.from_numpy(np.stack([mask * 0, mask, mask])).bool()
    (x, y), center = show_kernels.innermost_points(instances, 2)
    assert abs(np.hypot(x - 40, y - 30) - 20) < 2
    assert center == (6, 5)  # no mask, hence the box


# --- picture ------------------------------------------------------------------------------------


def panel_of(figure, title, number=0):
    return [axes for axes in figure.axes if axes.get_title() == title][number]


def test_picture_shows_kernels_and_their_accumulation_in_place(upsamplings, image):
    steps, _ = upsamplings
    figure = show_kernels.draw(image, steps, [(60, 20), (3, 40)], (128, 256))
    kernel = panel_of(figure, "p3 to p2")
    below, heat = kernel.get_images()
    np.testing.assert_array_equal(heat.get_array(), steps[0].kernel(13, 40))
    # Panels count in cells, which are 3 pixels at p3; the kernel is centered on row 6, column 20.
    assert tuple(heat.get_extent()) == (18, 23, 9, 4)
    assert tuple(below.get_extent()) == (0, 32, 16, 0)
    assert (kernel.get_xlim(), kernel.get_ylim()) == ((18, 23), (9, 4))
    numbers = [text.get_text() for text in kernel.texts]
    shown = [f"{w:.2f}".removeprefix("0") for w in steps[0].kernel(13, 40).ravel() if w >= 0.005]
    assert numbers == shown

    accumulated = panel_of(figure, "p5 to p2, accumulated", number=1)
    _, heat = accumulated.get_images()
    expected = show_kernels.accumulate(steps, 27, 2)[2]
    np.testing.assert_array_equal(heat.get_array(), expected)
    assert tuple(heat.get_extent()) == (0, 8, 4, 0)
    assert (accumulated.get_xlim(), accumulated.get_ylim()) == ((0, 8), (4, 0))
    (cross,) = accumulated.lines
    np.testing.assert_allclose(cross.get_xydata(), [[3.5 / 12, 40.5 / 12]])
    # For two points an overview, four kernels, four accumulations; two scales.
    assert len(figure.axes) == 2 * 9 + 2


@pytest.fixture
def run(weights, image, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    inference.save_image("image.png", image)
    always = ["--config-file", CONFIG, "--input", "image.png", "--output", "out/kernels.png"]

    def run(*options, keys=()):
        show_kernels.main([*always, *options, *OPTS, "MODEL.WEIGHTS", weights, *keys])

    return run


def test_program_draws_given_points(run, tmp_path, capsys):
    run("--points", "60,20", "3,40")
    assert "kernels of 2 points drawn to out/kernels.png" in capsys.readouterr().out
    picture = cv2.imread(str(tmp_path / "out" / "kernels.png"))
    assert picture.std() > 10
    run("--points", "60,20")
    assert len(cv2.imread(str(tmp_path / "out" / "kernels.png"))) < 0.7 * len(picture)


@pytest.mark.parametrize(
    ("threshold", "where"),
    [("0.01", "in the best detections"), ("1.0", "points 48,24, in the middle: nothing is detect")],
)
def test_program_chooses_points_in_detections_else_the_middle(run, capsys, threshold, where):
    run(keys=["MODEL.ROI_HEADS.SCORE_THRESH_TEST", threshold])
    assert where in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--points", "3"], "--points are given as x,y in whole pixels, got '3'"),
        (["--points", "96,0"], r"--points: 96,0 is outside of image\.png, 96 x 48 pixels"),
        (["--points", "5,-1"], "--points: 5,-1 is outside"),
        (["--input", "absent.png"], r"cannot read image absent\.png: No such file"),
        (["--output", "image.png/kernels.png"], r"cannot write image\.png/kernels\.png: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_get_one_clear_line(run, tmp_path, options, message):
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        run(*options)
    assert not (tmp_path / "out").exists()
