#!/usr/bin/env python3
r"""Draws the reassembly kernels that CARAFE predicts in a feature pyramid, for points of an image.

For each point, the upper row shows the kernel at every level of the top-down path: the k x k cells
of the coarser level that are reassembled into the point's cell of the finer one, with their
weights. The lower row accumulates them from the finest level on: the weights with which all cells
of each coarser level reach the point (figures 1 and 6 of the paper, arXiv 1905.02188).

Example:
    python tools/show_kernels.py --config-file configs/shapes_mask_rcnn_R18_FPN_carafe.yaml \
        --input datasets/shapes/val/000000.png --output kernels.png --points 40,62 90,30 \
        MODEL.WEIGHTS output/shapes_mask_rcnn_R18_FPN_carafe/model_final.pth
"""

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import torch
from detectron2.structures import Instances
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from carafe_d2 import CarafeFPN, CARAFEPack, carafe
from carafe_d2.config import load_config
from carafe_d2.errors import UserError, exit_on_user_error
from carafe_d2.files import save_figure
from carafe_d2.inference import (
    Predictor,
    named_mistakes,
    read_image,
    recorded_kernels,
    split_opts,
)

DEFAULT_POINTS = 2  # in the objects that are detected with the highest scores
MOST_NUMBERS = 7  # side of the largest kernel whose weights are written out


# --- kernels ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Upsampling:
    """One step of the top-down path and the kernels that CARAFE predicted for it.

    Attributes:
        fine, coarse: names of the levels, e.g. "p2" and "p3".
        scale: upsampling ratio.
        stride: side of a cell of the coarse level in pixels of the model's input.
        masks: (groups, k*k, scale * H, scale * W) for a coarse level of (H, W), float32; with
            softmax they sum to one over the k*k taps.
    """

    fine: str
    coarse: str
    scale: int
    stride: int
    masks: Tensor

    @property
    def kernel_size(self) -> int:
        return round(self.masks.shape[1] ** 0.5)

    def locate(self, position: np.ndarray) -> tuple[int, int]:
        """The cell (row, column) of the fine level at (x, y) in pixels of the model's input."""
        column, row = (position * self.scale // self.stride).astype(int).tolist()
        return row, column

    def kernel(self, row: int, column: int) -> np.ndarray:
        """The kernel (k, k) of a cell of the fine level, the mean of all groups."""
        k = self.kernel_size
        return self.masks[:, :, row, column].mean(dim=0).view(k, k).numpy()


def predict_kernels(
    predictor: Predictor, image: np.ndarray
) -> tuple[Instances | Tensor, list[Upsampling]]:
    """Runs a model on an image and keeps the kernels of its feature pyramid.

    Args:
        image: RGB, (H, W, 3), uint8.

    Returns:
        What it predicts, and the steps of the top-down path from the finest on.

    Raises:
        UserError: the model's backbone is no pyramid that upsamples with CARAFE.
    """
    backbone = getattr(predictor.model, "backbone", None)
    levels = list(backbone.output_shape().items()) if isinstance(backbone, CarafeFPN) else []
    packs = [getattr(backbone, f"fpn_upsample{name.removeprefix('p')}") for name, _ in levels[:-1]]
    if not packs or not all(isinstance(pack, CARAFEPack) for pack in packs):
        raise UserError(
            "the config's backbone does not upsample with CARAFE; take a config with "
            "build_resnet_carafe_fpn_backbone and MODEL.FPN.UPSAMPLE carafe"
        )

    with recorded_kernels(packs) as recorded:
        (prediction,) = predictor([image])

    kernels = {pack: masks for pack, (masks,) in recorded}
    steps = [
        Upsampling(fine, coarse, pack.scale_factor, shape.stride, kernels[pack])
        for pack, ((fine, _), (coarse, shape)) in zip(
            packs, itertools.pairwise(levels), strict=True
        )
    ]
    return prediction, steps


def accumulate(steps: list[Upsampling], row: int, column: int) -> list[np.ndarray]:
    """Which cells of the coarser levels a cell of the finest level is made of.

    The top-down path is linear in the features that it adds up, so these are its gradients.

    Args:
        steps: the top-down path from the finest level on.
        row, column: of the cell of the finest level.

    Returns:
        For each step the weights (H, W) of the cells of its coarse level, the mean of all groups.
        They sum to one, less what kernels take from outside of the maps, where there is nothing.
    """
    levels = []
    finer = torch.zeros(1)
    for step in reversed(steps):
        groups, _, height, width = step.masks.shape
        size = (1, groups, height // step.scale, width // step.scale)
        levels.append(torch.zeros(size, requires_grad=True))
        masks = step.masks.flatten(0, 1)[None]
        finer = carafe(levels[-1] + finer, masks, step.kernel_size, groups, step.scale)
    weights = torch.autograd.grad(finer[0, :, row, column].sum(), levels)
    return [weight[0].mean(dim=0).numpy() for weight in reversed(weights)]


# --- points -------------------------------------------------------------------------------------


def parse_point(text: str) -> tuple[int, int]:
    """Reads "x,y".

    Raises:
        UserError: it is anything else.
    """
    try:
        x, y = map(int, text.split(","))
    except ValueError:
        raise UserError(f"--points are given as x,y in whole pixels, got {text!r}") from None
    return x, y


def innermost_points(instances: Instances, number: int) -> list[tuple[int, int]]:
    """For the detections of the highest scores the point of their mask farthest from its border.

    Without masks, the center of the box. Points are (x, y) in pixels.
    """
    points = []
    height, width = instances.image_size
    best = instances[instances.scores.argsort(descending=True)[:number]]
    for i in range(len(best)):
        x, y = map(int, best.pred_boxes[i].get_centers()[0])
        if best.has("pred_masks") and best.pred_masks[i].any():
            mask = np.pad(best.pred_masks[i].numpy().astype(np.uint8), 1)  # the border is outside
            distance = cv2.distanceTransform(mask, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
            x, y = cv2.minMaxLoc(distance)[3]
        points.append((min(x, width - 1), min(y, height - 1)))
    return list(dict.fromkeys(points))


# --- drawing ------------------------------------------------------------------------------------

# From transparent to red, so that the image shows where there is no weight.
COLORS = ListedColormap(
    np.c_[
        matplotlib.colormaps["YlOrRd"](np.linspace(0.15, 0.9, 256))[:, :3],
        np.linspace(0, 1, 256) ** 0.4,
    ]
)
POINT = "#008f3c"
OUTLINE = [patheffects.withStroke(linewidth=3, foreground="white")]
FONT_SIZES: Any = {"axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8}


def show_image(panel: Axes, image: np.ndarray, cell: Sequence[float] | np.ndarray = (1, 1)) -> None:
    """Draws an image in a panel that counts in cells of a size (x, y) in pixels of the image."""
    height, width = image.shape[:2]
    panel.imshow(image, extent=(0, width / cell[0], height / cell[1], 0))
    panel.set(xticks=[], yticks=[], facecolor="0.85")


def show_weights(
    panel: Axes,
    image: np.ndarray,
    weights: np.ndarray,
    first: Sequence[int],
    cell: np.ndarray,
    top: float,
) -> None:
    """Lays weights over the pale image, in a panel that counts in cells, and shows that part.

    Args:
        weights: (rows, columns) of cells of a feature map.
        first: column and row of the first one in the map.
        cell: size (x, y) of a cell in pixels of the image.
        top: the weight at the end of the color scale.
    """
    show_image(panel, 255 - (255 - image) // 3, cell)
    (left, upper), (rows, columns) = first, weights.shape
    extent = (left, left + columns, upper + rows, upper)
    panel.imshow(weights, COLORS, vmin=0, vmax=top, extent=extent, interpolation="nearest")
    panel.set(xlim=extent[:2], ylim=extent[2:])


def show_kernel(
    panel: Axes,
    image: np.ndarray,
    step: Upsampling,
    row: int,
    column: int,
    cell: np.ndarray,
    top: float,
) -> None:
    """Draws the kernel of a cell of the fine level over what it covers of the image.

    Args:
        row, column: of the cell of the fine level, which is framed.
        cell, top: see :func:`show_weights`.
    """
    kernel, k = step.kernel(row, column), step.kernel_size
    left, upper = column // step.scale - k // 2, row // step.scale - k // 2
    show_weights(panel, image, kernel, (left, upper), cell, top)
    panel.vlines(range(left, left + k), upper, upper + k, color="white", lw=0.5)
    panel.hlines(range(upper, upper + k), left, left + k, color="white", lw=0.5)
    side = 1 / step.scale
    corner = (column * side, row * side)
    frame = Rectangle(corner, side, side, fill=False, edgecolor=POINT, lw=1.4)
    frame.set_path_effects([*OUTLINE])
    panel.add_patch(frame)
    for (i, j), weight in np.ndenumerate(kernel):
        if weight >= 0.005 and k <= MOST_NUMBERS:
            text = f"{weight:.2f}".removeprefix("0")
            color = "white" if weight > 0.6 * top else "black"
            x, y = left + j + 0.5, upper + i + 0.5
            panel.text(x, y, text, ha="center", va="center", fontsize=8, color=color)


def mark(panel: Axes, at: np.ndarray, size: float) -> None:
    (line,) = panel.plot(*at, "+", color=POINT, markersize=size, markeredgewidth=1.6)
    line.set_path_effects([*OUTLINE])


@matplotlib.rc_context(FONT_SIZES)
def draw(
    image: np.ndarray,
    steps: list[Upsampling],
    points: list[tuple[int, int]],
    input_size: tuple[int, int],
) -> Figure:
    """Draws two rows for each point, kernels and their accumulation, with a column for each step.

    Args:
        image: RGB, (H, W, 3), uint8.
        steps: the top-down path from the finest level on.
        points: (x, y) in pixels of the image.
        input_size: height and width of the image as the model saw it.
    """
    height, width = image.shape[:2]
    scale = np.array([width / input_size[1], height / input_size[0]])  # pixels a pixel of the input
    centers = [np.array(point) + 0.5 for point in points]
    top = max(step.kernel(*step.locate(at / scale)).max() for at in centers for step in steps)

    side = 1.7  # inches
    heights = [side, side * min(max(height / width, 0.4), 2.5)] * len(points)
    columns = len(steps) + 1
    size = (side * columns + 0.2, sum(heights) + 0.3 * len(heights) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(len(heights) + 1, columns, height_ratios=[*heights, 0.12])
    for i, ((x, y), center) in enumerate(zip(points, centers, strict=True)):
        panel = figure.add_subplot(grid[2 * i : 2 * i + 2, 0], title=f"point {x},{y}")
        show_image(panel, image)
        mark(panel, center, 16)
        maps = accumulate(steps, *steps[0].locate(center / scale))
        for j, (step, weights) in enumerate(zip(steps, maps, strict=True), start=1):
            cell = step.stride * scale
            panel = figure.add_subplot(grid[2 * i, j], title=f"{step.coarse} to {step.fine}")
            show_kernel(panel, image, step, *step.locate(center / scale), cell, top)

            title = f"{step.coarse} to {steps[0].fine}, accumulated"
            panel = figure.add_subplot(grid[2 * i + 1, j], title=title)
            show_weights(panel, image, weights, (0, 0), cell, weights.max())
            panel.set(xlim=(0, width / cell[0]), ylim=(height / cell[1], 0))
            mark(panel, center / cell, 8)

    middle = 1 + len(steps) // 2
    for place, most, label in (
        (grid[-1, 1:middle], top, "upper rows: weight in the kernel"),
        (grid[-1, middle:], 1, "lower rows: weight, as a share of the largest"),
    ):
        panel, colors = figure.add_subplot(place), ScalarMappable(Normalize(0, most), COLORS)
        figure.colorbar(colors, panel, orientation="horizontal", label=label)
    return figure


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--input", required=True, metavar="IMAGE")
    parser.add_argument("--output", type=Path, default=Path("kernels.png"), help="the PNG to write")
    parser.add_argument(
        "--points",
        nargs="+",
        default=[],
        metavar="X,Y",
        help="pixels of the image; default: the innermost of the best detections",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    args = parser.parse_args(argv)
    args.points, args.opts = split_opts(args.points, args.opts)
    return args


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with named_mistakes(args.config_file, args.opts):
        run(args)


def run(args: argparse.Namespace) -> None:
    points = [parse_point(text) for text in args.points]
    cfg = load_config(args.config_file, args.opts)
    image = read_image(args.input)
    height, width = image.shape[:2]
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            raise UserError(
                f"--points: {x},{y} is outside of {args.input}, {width} x {height} pixels"
            )
    predictor = Predictor(cfg)
    prediction, steps = predict_kernels(predictor, image)
    if not points:
        if isinstance(prediction, Instances):
            points = innermost_points(prediction, DEFAULT_POINTS)
        where = "the best detections" if points else "the middle: nothing is detected"
        points = points or [(width // 2, height // 2)]
        print(f"points {' '.join(f'{x},{y}' for x, y in points)}, in {where}")

    input_size = predictor.resize(image).shape[:2]
    save_figure(args.output, draw(image, steps, points, input_size))
    print(f"kernels of {len(points)} points drawn to {args.output}")


if __name__ == "__main__":
    main()
