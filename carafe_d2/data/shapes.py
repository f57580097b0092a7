"""Generates `shapes`: a small instance segmentation dataset in COCO format, with label images for
semantic segmentation beside it.

    python -m carafe_d2.data.shapes --train 1600 --val 200 --size 128

Textured shapes with thin, concave and hollow parts overlap on a textured background, so how well a
mask head upsamples shows at the mask borders. Image `i` of a split depends on nothing but the seed,
the split, `i`, the image size and the object limit.

A split is generated aside and put in its place when it is whole, its annotation file last.
Generation can be stopped at any time: until then, what was there before stays.
"""

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as mask_util
from tqdm import tqdm

from ..errors import UserError, exit_on_user_error
from ..files import write_file
from .builtin import (
    CATEGORIES,
    LABELS,
    SPLITS,
    annotation_file,
    datasets_root,
    image_dir,
    label_dir,
)

VERSION = 1  # raise when the same spec gives other images or annotations than before
SUPERSAMPLE = 4  # shapes are drawn this much larger, then averaged down
MIN_SIZE = 32  # below this the thin parts are thinner than a pixel
DIAMETER = (0.35, 0.75)  # of a shape, as a share of the image side
MIN_VISIBLE = 0.5  # of a shape's area; what hides more of a shape is not placed
MIN_VISIBLE_PIXELS = 16
PLACEMENTS = 10  # attempts per object


@dataclasses.dataclass(frozen=True)
class ShapesSpec:
    """All that the content of a split depends on.

    Attributes:
        split: `train` or `val`; with the seed it selects the random stream.
        images: Number of images.
        size: Height and width of an image in pixels.
        seed: Non-negative seed of the whole dataset.
        max_objects: Most objects in an image; there are 1 to `max_objects`.
        version: Version of the generator.
    """

    split: str
    images: int
    size: int = 128
    seed: int = 0
    max_objects: int = 4
    version: int = VERSION

    def __post_init__(self):
        for name, least in (("images", 1), ("size", MIN_SIZE), ("seed", 0), ("max_objects", 1)):
            if getattr(self, name) < least:
                what = f"number of {self.split} images" if name == "images" else name
                raise UserError(f"{what} must be at least {least}, got {getattr(self, name)}")


# --- Shapes: outlines in a unit circle, as (N, 2) arrays; the second one, if any, is a hole ---


def _arc(start: float, stop: float, radius: float = 1.0, points: int = 64) -> np.ndarray:
    """Returns points (points, 2) on a circle around the origin, from angle start to stop."""
    angles = np.linspace(start, stop, points)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _disc(rng: np.random.Generator) -> list[np.ndarray]:
    return [_arc(0, 2 * np.pi)]


def _ring(rng: np.random.Generator) -> list[np.ndarray]:
    return [_arc(0, 2 * np.pi), _arc(0, 2 * np.pi, radius=rng.uniform(0.5, 0.75))]


def _star(rng: np.random.Generator) -> list[np.ndarray]:
    spikes = int(rng.integers(5, 9))
    outline = _arc(0, 2 * np.pi * (1 - 0.5 / spikes), points=2 * spikes)
    outline[1::2] *= rng.uniform(0.3, 0.45)
    return [outline]


def _cross(rng: np.random.Generator) -> list[np.ndarray]:
    half = rng.uniform(0.12, 0.25)
    arm = np.array([[1, -half], [1, half], [half, half]])
    quarter_turn = np.array([[0, 1], [-1, 0]])
    return [np.concatenate([arm @ np.linalg.matrix_power(quarter_turn, i) for i in range(4)])]


def _crescent(rng: np.random.Generator) -> list[np.ndarray]:
    # The unit circle without a circle of radius `bite` around (offset, 0).
    bite, offset = rng.uniform(0.75, 0.9), rng.uniform(0.35, 0.55)
    x = (1 + offset**2 - bite**2) / (2 * offset)
    y = np.sqrt(1 - x**2)  # the circles meet at (x, +-y)
    tip, bite_tip = np.arctan2(y, x), np.arctan2(y, x - offset)
    outer = _arc(tip, 2 * np.pi - tip)
    inner = _arc(2 * np.pi - bite_tip, bite_tip, radius=bite) + np.array([offset, 0])
    return [np.concatenate([outer, inner])]


def _blob(rng: np.random.Generator) -> list[np.ndarray]:
    outline = _arc(0, 2 * np.pi, points=96)
    angles = np.linspace(0, 2 * np.pi, 96)
    radii = np.ones(96)
    for frequency in (2, 3, 4):
        radii += rng.uniform(0.1, 0.25) * np.cos(frequency * angles + rng.uniform(0, 2 * np.pi))
    return [outline * (radii / radii.max())[:, None]]


OUTLINES: dict[str, Callable[[np.random.Generator], list[np.ndarray]]] = dict(
    zip(CATEGORIES, (_disc, _ring, _star, _cross, _crescent, _blob), strict=True)
)


def _place(rng: np.random.Generator, outlines: list[np.ndarray], size: int) -> list[np.ndarray]:
    """Squeezes, scales, turns and moves unit outlines to pixel coordinates of an image."""
    radius = size * rng.uniform(*DIAMETER) / 2
    squeeze = np.array([1.0, rng.uniform(0.7, 1.0)])
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    center = size * rng.uniform(0.15, 0.85, 2)
    return [o * radius * squeeze @ [[cos, sin], [-sin, cos]] + center for o in outlines]


def _coverage(outlines: list[np.ndarray], size: int) -> np.ndarray:
    """Returns the share of each pixel that the shape covers: uint8 (size, size), 255 for all."""
    shift = 4  # fractional bits of OpenCV's fixed-point coordinates
    canvas = np.zeros((size * SUPERSAMPLE, size * SUPERSAMPLE), np.uint8)
    # OpenCV has its origin in the center of the first pixel, COCO in its corner.
    points = [np.rint((o * SUPERSAMPLE - 0.5) * 2**shift).astype(np.int32) for o in outlines]
    cv2.fillPoly(canvas, points, 255, shift=shift)
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)


# --- Colors and textures ---


def _contrasting_color(rng: np.random.Generator, colors: list[np.ndarray]) -> np.ndarray:
    """Returns the one of a few random colors that is farthest from all given ones."""
    candidates = rng.uniform(0.05, 0.95, (6, 3))
    distances = np.linalg.norm(candidates[:, None] - np.array(colors)[None], axis=2)
    return candidates[distances.min(axis=1).argmax()]


def _pattern(rng: np.random.Generator, height: int, width: int, size: int) -> np.ndarray:
    """Returns a random pattern: float (height, width) in 0..1, made for images of side `size`."""
    kind = rng.choice(["gradient", "stripes", "checker", "noise"])
    if kind == "noise":
        cell = size * rng.uniform(0.02, 0.08)
        grid = rng.random((2 + round(height / cell), 2 + round(width / cell)), np.float32)
        return np.clip(cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    u, v = x * cos + y * sin, y * cos - x * sin
    if kind == "gradient":
        return (u - u.min()) / max(np.ptp(u), 1)
    frequency = np.float32(2 * np.pi / (size * rng.uniform(0.05, 0.15)))
    wave = np.sin(u * frequency)
    if kind == "checker":
        wave = wave * np.sin(v * frequency)
    return np.clip(0.5 + 1.5 * wave, 0, 1)


def _texture(
    rng: np.random.Generator, color: np.ndarray, height: int, width: int, size: int
) -> np.ndarray:
    """Returns a pattern between `color` and a similar one: float (height, width, 3)."""
    toward = rng.normal(size=3)
    other = color + rng.uniform(0.05, 0.25) * toward / np.linalg.norm(toward)
    pattern = _pattern(rng, height, width, size)[..., None]
    return (color + pattern * (other - color)).astype(np.float32)


# --- One image ---


def render(spec: ShapesSpec, index: int) -> tuple[np.ndarray, list[tuple[str, np.ndarray]]]:
    """Draws one image.

    Every shape in the image is annotated: a shape is placed only where it and all the shapes that
    it covers keep at least `MIN_VISIBLE` of their area in sight.

    Args:
        spec: The split that the image belongs to.
        index: Number of the image in the split.

    Returns:
        The image, uint8 (size, size, 3) in BGR, and for each object from back to front its category
        and its visible mask, bool (size, size). The masks do not overlap.
    """
    rng = np.random.default_rng([spec.seed, SPLITS.index(spec.split), index])
    size = spec.size
    colors = [rng.uniform(0.05, 0.95, 3)]
    image = _texture(rng, colors[0], size, size, size)
    categories: list[str] = []
    masks: list[np.ndarray] = []
    needed: list[float] = []  # pixels that must stay visible
    for _ in range(rng.integers(1, spec.max_objects + 1)):
        category = CATEGORIES[rng.integers(len(CATEGORIES))]
        shape = OUTLINES[category](rng)
        for _ in range(PLACEMENTS):
            outlines = _place(rng, shape, size)
            coverage = _coverage(outlines, size)
            mask = coverage >= 128
            # The whole shape's area, with what lies outside the image.
            areas = [cv2.contourArea(o.astype(np.float32)) for o in outlines]
            need = max(MIN_VISIBLE * (areas[0] - sum(areas[1:])), MIN_VISIBLE_PIXELS)
            remaining = [m & ~mask for m in masks]
            if all(m.sum() >= n for m, n in zip([*remaining, mask], [*needed, need], strict=True)):
                break
        else:
            continue
        categories.append(category)
        masks = [*remaining, mask]
        needed.append(need)
        colors.append(_contrasting_color(rng, colors))
        x, y, w, h = cv2.boundingRect(coverage)
        alpha = coverage[y : y + h, x : x + w, None] / np.float32(255)
        patch = image[y : y + h, x : x + w]
        patch += alpha * (_texture(rng, colors[-1], h, w, size) - patch)
    grain = rng.uniform(0, 0.03) * rng.standard_normal(image.shape, np.float32)
    pixels = np.rint(255 * np.clip(image + grain, 0, 1)).astype(np.uint8)
    return pixels, list(zip(categories, masks, strict=True))


def mask_to_coco(mask: np.ndarray) -> list[list[int]] | dict:
    """Describes a mask exactly: as COCO polygons, or as RLE where the mask has holes.

    Args:
        mask: Bool (height, width) with at least one pixel set.

    Returns:
        A list of polygons [x0, y0, x1, y1, ...] along the pixels' outer edges, or a dict with
        `size` and compressed `counts`.
    """
    # OpenCV's contours run through the centers of border pixels, which would cut half a pixel off.
    # At twice the size pixel i is the pair 2i, 2i+1, and (c + 1) // 2 puts each on its outer edge.
    doubled = mask.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, hierarchy = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if (hierarchy[0, :, 3] >= 0).any():  # a contour with a parent is a hole
        rle = mask_util.encode(np.asfortranarray(mask, np.uint8))
        return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
    polygons = []
    for contour in contours:
        corners = (contour[:, 0] + 1) // 2
        repeated = (corners == np.roll(corners, 1, axis=0)).all(axis=1)
        polygons.append(corners[~repeated].ravel().tolist())
    return polygons


# --- Files ---


def _file_name(index: int) -> str:
    return f"{index:06d}.png"


def _is_complete(root: Path, spec: ShapesSpec) -> bool:
    """Tells whether the split is there, was made from the same spec and lacks no file."""
    try:
        found = json.loads(annotation_file(root, spec.split).read_bytes())["info"]["spec"]
        files = set(os.listdir(image_dir(root, spec.split)))
        files &= set(os.listdir(label_dir(root, spec.split)))  # which have the images' names
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
    return found == dataclasses.asdict(spec) and files.issuperset(
        _file_name(i) for i in range(spec.images)
    )


def generate_split(root: str | os.PathLike, spec: ShapesSpec) -> bool:
    """Generates a split, unless it is there, and prints what it does.

    Args:
        root: The datasets root; files go below its folder `shapes`.
        spec: What to generate. A split of another spec is replaced.

    Returns:
        False if the split was complete already.

    Raises:
        UserError: A file cannot be written.
    """
    root = Path(root)
    images, annotations = image_dir(root, spec.split), annotation_file(root, spec.split)
    labels = label_dir(root, spec.split)
    try:
        if _is_complete(root, spec):
            print(f"complete already: {spec.images} images in {images}")
            return False
        if annotations.exists():
            print(f"not what is asked for, or images are missing: generating {images} anew")
        images.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{spec.split}.", dir=images.parent) as aside:
            unfinished = {folder: Path(aside) / folder.name for folder in (images, labels)}
            for folder in unfinished.values():
                folder.mkdir()
            coco = _generate(unfinished[images], unfinished[labels], spec)
            # Annotations of one spec must never lie beside images of another.
            annotations.unlink(missing_ok=True)
            for folder, whole in unfinished.items():
                if folder.exists():
                    shutil.rmtree(folder)
                whole.rename(folder)
    except OSError as error:
        path = error.filename or images
        raise UserError(f"cannot generate shapes: {path}: {error.strerror}") from error
    write_file(annotations, json.dumps(coco, separators=(",", ":")) + "\n")
    print(f"generated {spec.images} images in {images}")
    return True


def _generate(image_folder: Path, label_folder: Path, spec: ShapesSpec) -> dict:
    """Writes images and label images of a split into two folders; returns its COCO JSON."""
    images: list[dict] = []
    annotations: list[dict] = []
    for index in tqdm(range(spec.images), desc=f"shapes/{spec.split}", unit="image"):
        image, objects = render(spec, index)
        name, side = _file_name(index), spec.size
        labels = np.zeros((side, side), np.uint8)
        for category, mask in objects:
            labels[mask] = LABELS.index(category)
        for folder, pixels in ((image_folder, image), (label_folder, labels)):
            # Compression 1: hardly larger with grain in the image, and much quicker.
            png = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]
            (folder / name).write_bytes(png.tobytes())
        images.append({"id": index + 1, "file_name": name, "height": side, "width": side})
        for category, mask in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": CATEGORIES.index(category) + 1,
                    "iscrowd": 0,
                    "area": int(mask.sum()),
                    "bbox": list(cv2.boundingRect(mask.astype(np.uint8))),
                    "segmentation": mask_to_coco(mask),
                }
            )
    return {
        "info": {"description": "carafe_d2 shapes", "spec": dataclasses.asdict(spec)},
        "categories": [
            {"id": i, "name": name, "supercategory": "shape"}
            for i, name in enumerate(CATEGORIES, start=1)
        ],
        "images": images,
        "annotations": annotations,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the generator."""
    parser = argparse.ArgumentParser(
        prog="python -m carafe_d2.data.shapes",
        description="Generate the shapes dataset; a split that is complete already is kept.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--train", type=int, default=1600, help="number of training images")
    parser.add_argument("--val", type=int, default=200, help="number of validation images")
    parser.add_argument("--size", type=int, default=128, help="image side in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-objects", type=int, default=4, help="most objects in an image")
    parser.add_argument(
        "--root", default=datasets_root(), help="folder to put shapes/ in ($DETECTRON2_DATASETS)"
    )
    args = parser.parse_args(argv)
    root = datasets_root(args.root)
    of_both = (args.size, args.seed, args.max_objects)
    for spec in [ShapesSpec("train", args.train, *of_both), ShapesSpec("val", args.val, *of_both)]:
        generate_split(root, spec)


if __name__ == "__main__":
    with exit_on_user_error():
        try:
            main()
        except KeyboardInterrupt:
            print("\ninterrupted: nothing is kept of an unfinished split", file=sys.stderr)
            sys.exit(130)
