r"""Measures what CARAFE attends to: statistics of the kernels that a model predicts for a dataset.

For each of its CARAFE upsamplers, in the feature pyramid and in heads, and for the cells of the
upsampled maps at borders of the ground truth, inside of its regions and outside of them:

- entropy of the kernels in bits: 0 where one tap has all the weight, log2(k * k) of a plain mean;
- mass outside the center: the share of the weight that other taps have than the middle one.

The first of DATASETS.TEST needs masks of objects, or label images; in the latter, every class has
an inside, and outside is what has no label.

Example:
    python -m carafe_d2.kernel_statistics \
        --config-file configs/shapes_mask_rcnn_R18_FPN_carafe.yaml --output kernel_statistics.png \
        MODEL.WEIGHTS output/shapes_mask_rcnn_R18_FPN_carafe/model_final.pth
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import annotations_to_instances
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from .config import load_config
from .data.build import build_mapper, check_datasets
from .errors import UserError, exit_on_user_error
from .files import format_table, save_figure
from .inference import Predictor, named_mistakes, recorded_kernels
from .upsample import CARAFEPack

REGIONS = ("border", "inside", "outside")
MEASURES = ("entropy in bits", "mass outside the center")
COLORS = dict(zip(REGIONS, ("tab:red", "tab:blue", "0.6"), strict=True))

Statistics = dict[str, dict[str, np.ndarray]]


# --- ground truth -------------------------------------------------------------------------------


def labels_of(record: dict) -> np.ndarray:
    """The ground truth of an image as a map of regions.

    Args:
        record: Detectron2's dict of the image.

    Returns:
        uint16 (height, width): a number for each object or class, 0 where there is none.

    Raises:
        UserError: there are neither masks nor label images.
    """
    objects = [a for a in record.get("annotations", ()) if not a.get("iscrowd")]
    if "annotations" in record and all("segmentation" in a for a in objects):
        size = (record["height"], record["width"])
        labels = np.zeros(size, np.uint16)
        if objects:
            masks = annotations_to_instances(objects, size, mask_format="bitmask").gt_masks
            for number, mask in enumerate(masks, start=1):
                labels[mask.numpy()] = number
        return labels
    if "sem_seg_file_name" in record:
        classes = np.asarray(Image.open(record["sem_seg_file_name"]))
        return np.where(classes == 255, 0, classes.astype(np.uint16) + 1)
    raise UserError(f"{record['file_name']} has no ground truth of masks or label images")


def border_distance(labels: np.ndarray) -> np.ndarray:
    """How far each pixel is from the nearest one where regions meet, along the longer axis.

    Args:
        labels: uint16 (height, width).

    Returns:
        float32 (height, width), 0 to either side of a border.
    """
    window = np.ones((3, 3), np.uint8)
    same = cv2.dilate(labels, window) == cv2.erode(labels, window)
    return cv2.distanceTransform(same.astype(np.uint8), cv2.DIST_C, 3)


def regions_of_cells(labels: np.ndarray, boxes: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Where in the ground truth the cells of maps lie.

    Args:
        labels: uint16 (height, width).
        boxes: (N, 4), what each map covers, as x0, y0, x1, y1 in pixels of ``labels``.
        size: of the maps, rows and columns.

    Returns:
        (N, rows, columns) of indices into ``REGIONS``; -1 for cells outside of the image. A border
        is where it passes through the cell.
    """
    (height, width), (rows, columns) = labels.shape, size
    side = (boxes[:, 2:] - boxes[:, :2]) / (columns, rows)
    x = boxes[:, :1] + side[:, :1] * (np.arange(columns) + 0.5)
    y = boxes[:, 1:2] + side[:, 1:] * (np.arange(rows) + 0.5)
    valid = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None]
    at = (
        y.astype(int).clip(0, height - 1)[:, :, None],
        x.astype(int).clip(0, width - 1)[:, None],
    )
    borders = border_distance(labels)[at] <= side.max(axis=1)[:, None, None] / 2
    regions = np.where(borders, 0, np.where(labels[at] > 0, 1, 2))
    return np.where(valid, regions, -1)


# --- kernels ------------------------------------------------------------------------------------


def measures_of(kernels: Tensor) -> Tensor:
    """The ``MEASURES`` of kernels, means over their groups.

    Args:
        kernels: (N, groups, k*k, H, W), the taps of each sum to one.

    Returns:
        (2, N, H, W).
    """
    entropy = torch.special.entr(kernels).sum(dim=2) / math.log(2)
    outside = 1 - kernels[:, :, kernels.shape[2] // 2]
    return torch.stack((entropy.mean(dim=1), outside.mean(dim=1)))


def carafe_upsamplers(model: nn.Module) -> dict[CARAFEPack, str]:
    """The CARAFE upsamplers of a model, with their names.

    Raises:
        UserError: there are none, or their kernels do not sum to one.
    """
    packs = {m: name for name, m in model.named_modules() if isinstance(m, CARAFEPack)}
    if not packs:
        raise UserError("the config's model has no CARAFE upsampler")
    if any(pack.normalizer in ("sigmoid", "none") for pack in packs):
        raise UserError("only kernels that sum to one have an entropy: MODEL.CARAFE.NORMALIZER")
    return packs


@torch.no_grad()
def kernel_statistics(cfg: CfgNode, count: int | None = None) -> Statistics:
    """Means over the cells of all images.

    Args:
        cfg: a config with its weights in MODEL.WEIGHTS; of DATASETS.TEST the first one counts.
        count: the first images of the dataset; default is all.

    Returns:
        For each upsampler, by its name in the model, and each of ``REGIONS`` that has cells the
        number of cells and the ``MEASURES``.

    Raises:
        UserError: no dataset, no ground truth, or no CARAFE.
    """
    if not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty; name a dataset with masks or label images")
    check_datasets(cfg.DATASETS.TEST[:1])
    model = Predictor(cfg).model
    packs = carafe_upsamplers(model)
    mapper = build_mapper(cfg, is_train=False)
    sums = {name: np.zeros((len(REGIONS), 1 + len(MEASURES))) for name in packs.values()}
    covered: dict[str, np.ndarray] = {}  # by a map of the whole image, and by those of RoIs

    def keep_size(_, inputs: tuple) -> None:
        covered["image"] = np.array([[0, 0, *inputs[0].shape[:1:-1]]], float)

    def keep_boxes(_, inputs: tuple) -> None:
        covered["rois"] = inputs[1][0].tensor.double().cpu().numpy()

    model.backbone.register_forward_pre_hook(keep_size)
    if hasattr(getattr(model, "roi_heads", None), "mask_pooler"):
        model.roi_heads.mask_pooler.register_forward_pre_hook(keep_boxes)
    for record in DatasetCatalog.get(cfg.DATASETS.TEST[0])[:count]:
        labels = labels_of(record)
        inputs = mapper(record)
        with recorded_kernels(packs) as recorded:
            model([inputs])
        scale = labels.shape[1] / inputs["image"].shape[2]
        for pack, kernels in recorded:
            boxes = covered["rois" if packs[pack].startswith("roi_heads.") else "image"]
            regions = regions_of_cells(labels, boxes * scale, kernels.shape[-2:])
            values = measures_of(kernels).double().numpy()
            for region in range(len(REGIONS)):
                cells = values[:, regions == region]
                sums[packs[pack]][region] += [cells.shape[1], *cells.sum(axis=1)]
    return {
        name: {
            region: np.array([row[0], *(row[1:] / row[0])])
            for region, row in zip(REGIONS, rows, strict=True)
            if row[0]
        }
        for name, rows in sums.items()
    }


# --- report -------------------------------------------------------------------------------------


def table(statistics: Statistics, markdown: bool = False) -> str:
    """A row for each upsampler and region."""
    rows = [
        [name, region, f"{cells:.0f}", f"{entropy:.2f}", f"{outside:.3f}"]
        for name, regions in statistics.items()
        for region, (cells, entropy, outside) in regions.items()
    ]
    return format_table(["upsampler", "region", "cells", *MEASURES], rows, markdown, 2)


def plot(statistics: Statistics) -> Figure:
    """A panel for each measure: a row for each upsampler, a dot for each region."""
    figure = Figure(figsize=(8, 1.2 + 0.35 * len(statistics)), layout="constrained")
    panels = figure.subplots(1, len(MEASURES), sharey=True)
    for i, (panel, measure) in enumerate(zip(panels, MEASURES, strict=True), start=1):
        for region, color in COLORS.items():
            rows = [row for row, name in enumerate(statistics) if region in statistics[name]]
            values = [[*statistics.values()][row][region][i] for row in rows]
            panel.plot(values, rows, "o", color=color, label=region)
        panel.set_title(measure, fontsize=9)
        panel.set_yticks(range(len(statistics)), [*statistics])
        panel.tick_params(labelsize=8)
        panel.grid(color="0.9")
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE")
    add("--output", type=Path, default=Path("kernel_statistics.png"), help="the PNG to write")
    add("-n", "--num-images", type=int, metavar="N", help="the first ones; default: all")
    add("opts", nargs=argparse.REMAINDER, help="config keys and values")
    args = parser.parse_args(argv)
    if args.num_images is not None and args.num_images < 1:
        raise UserError(f"--num-images must be at least 1, got {args.num_images}")
    return args


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with named_mistakes(args.config_file, args.opts):
        statistics = kernel_statistics(load_config(args.config_file, args.opts), args.num_images)
    print(table(statistics))
    save_figure(args.output, plot(statistics))
    print(f"drawn to {args.output}")


if __name__ == "__main__":
    main()
