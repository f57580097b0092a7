"""Images with holes: the holes, and the mapper that cuts them."""

import zlib
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils
from detectron2.data import transforms as T

from ..config import with_carafe_config
from ..data.checks import check_image
from ..errors import UserError

MASKS = ("rectangle", "irregular")

_SHARE = (0.05, 0.5)  # of an image, that an irregular hole takes


def rectangle(rng: np.random.Generator, size: int, sides: Sequence[int]) -> np.ndarray:
    """A hole that is a rectangle somewhere in an image, as Iizuka et al. 2017 train with.

    Args:
        rng: decides where.
        size: side of the image.
        sides: the least and the greatest side of the rectangle.

    Returns:
        Bool (size, size), True in the hole.
    """
    hole = np.zeros((size, size), bool)
    height, width = rng.integers(sides[0], sides[1] + 1, 2)
    top, left = rng.integers(0, size - height + 1), rng.integers(0, size - width + 1)
    hole[top : top + height, left : left + width] = True
    return hole


def irregular(rng: np.random.Generator, size: int) -> np.ndarray:
    """A hole of strokes of a brush, which takes 5 to about 50 percent of an image.

    Args:
        rng: decides where.
        size: side of the image.

    Returns:
        Bool (size, size), True in the hole.
    """
    hole = np.zeros((size, size), np.uint8)
    pixels = rng.uniform(*_SHARE) * size**2
    while np.count_nonzero(hole) < pixels:
        brush = max(1, round(size * rng.uniform(0.02, 0.08)))
        point = rng.uniform(0, size, 2)
        angle = rng.uniform(0, 2 * np.pi)
        for _ in range(rng.integers(1, 9)):
            angle += rng.uniform(-1, 1)
            step = size * rng.uniform(0.02, 0.15)
            end = point + step * np.array([np.cos(angle), np.sin(angle)])
            cv2.line(hole, point.astype(int).tolist(), end.astype(int).tolist(), (1,), brush)
            point = end
            if np.count_nonzero(hole) >= pixels:
                break
    return hole.astype(bool)


class InpaintMapper:
    """Makes of Detectron2's dict of an image what an inpainting model takes.

    In training the image is resized and flipped as INPUT says, and cropped at random. Otherwise it
    is resized, its middle taken, and the hole depends on nothing but its pixels, so that every
    evaluation is of the same holes.
    """

    @configurable
    def __init__(
        self,
        *,
        is_train: bool,
        augmentations: Sequence[T.Augmentation],
        image_format: str,
        size: int,
        make_hole: Callable[[np.random.Generator], np.ndarray],
    ):
        """
        Args:
            is_train: see above.
            augmentations: what is done to an image before it is cropped.
            image_format: "RGB" or "BGR".
            size: side of what is cut out of an image.
            make_hole: returns the hole of an image, bool (size, size).
        """
        self._is_train = is_train
        self._augmentations = T.AugmentationList(augmentations)
        self._format = image_format
        self._size = size
        self._make_hole = make_hole

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        options = with_carafe_config(cfg).MODEL.INPAINT
        size, kind = options.CROP_SIZE, options.MASK
        if kind not in MASKS:
            raise UserError(f"MODEL.INPAINT.MASK must be one of {', '.join(MASKS)}, got {kind!r}")
        if kind == "rectangle":  # read for these only, so that it is known to be idle for others
            sides = options.HOLE_SIZE
            if len(sides) != 2 or not 0 < sides[0] <= sides[1] <= size:
                raise UserError(
                    "MODEL.INPAINT.HOLE_SIZE must be the least and the greatest side of the hole, "
                    f"at most CROP_SIZE, {size}, got {tuple(sides)}"
                )
        return {
            "is_train": is_train,
            "augmentations": detection_utils.build_augmentation(cfg, is_train),
            "image_format": cfg.INPUT.FORMAT,
            "size": size,
            "make_hole": lambda rng: (
                rectangle(rng, size, sides) if kind == "rectangle" else irregular(rng, size)
            ),
        }

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Args:
            dataset_dict: with the file of the image.

        Returns:
            A copy with what :meth:`prepare` gives.

        Raises:
            UserError: the image cannot be read, or is smaller than what is cut out of it.
        """
        name = dataset_dict["file_name"]
        check_image(dataset_dict)
        try:
            image = detection_utils.read_image(name, format=self._format)
        except (OSError, SyntaxError) as error:  # what Pillow raises for what it cannot decode
            raise UserError(f"cannot read image {name}: {error}") from error
        return {**dataset_dict, **self.prepare(image, f"image {name}")}

    def prepare(self, image: np.ndarray, label: str) -> dict:
        """Resizes and crops an image, and makes a hole for it.

        Args:
            image: (H, W, 3), uint8, in INPUT.FORMAT.
            label: names it in a message.

        Returns:
            ``image`` (3, size, size), uint8, and ``mask`` (size, size), bool, True in the hole.

        Raises:
            UserError: the image is smaller than what is to be cut out of it.
        """
        augmented = T.AugInput(image)
        self._augmentations(augmented)
        height, width = augmented.image.shape[:2]
        size = self._size
        if min(height, width) < size:
            raise UserError(
                f"{label}: it is fed in as {width} x {height} pixels, smaller than the {size} x "
                f"{size} of MODEL.INPAINT.CROP_SIZE that hold the hole; see INPUT.MIN_SIZE_TRAIN, "
                "MIN_SIZE_TEST and the MAX_SIZE of both"
            )
        if self._is_train:
            top, left = np.random.randint(height - size + 1), np.random.randint(width - size + 1)
        else:
            top, left = (height - size) // 2, (width - size) // 2
        pixels = augmented.image[top : top + size, left : left + size]
        pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1))
        seed = np.random.randint(2**31) if self._is_train else zlib.crc32(pixels.tobytes())
        hole = self._make_hole(np.random.default_rng(seed))
        return {"image": torch.from_numpy(pixels), "mask": torch.from_numpy(hole)}
