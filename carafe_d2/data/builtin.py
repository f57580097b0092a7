"""Where the `shapes` dataset lies, what its classes are, and its registration with Detectron2."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..errors import UserError

SPLITS = ("train", "val")
HOW_TO_GET = "generate it with `python -m carafe_d2.data.shapes`"
PLACES_HOW_TO_GET = "unpack Places365-Standard's images of 256 x 256 pixels there"
# Of what lies in an image folder, what is taken for an image.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
CATEGORIES = ("disc", "ring", "star", "cross", "crescent", "blob")  # COCO ids are 1-based
LABELS = ("background", *CATEGORIES)  # of pixels, by the value in the label images


def datasets_root(root: str | os.PathLike | None = None) -> Path:
    """Returns `root`, or what Detectron2 takes: `$DETECTRON2_DATASETS`, else `datasets`."""
    return Path(root or os.environ.get("DETECTRON2_DATASETS") or "datasets").expanduser()


def image_dir(root: Path, split: str) -> Path:
    """Returns the folder of a split's images, below the datasets root."""
    return root / "shapes" / split


def label_dir(root: Path, split: str) -> Path:
    """Returns the folder of a split's label images, below the datasets root."""
    return root / "shapes" / f"{split}_labels"


def annotation_file(root: Path, split: str) -> Path:
    """Returns the COCO JSON of a split, below the datasets root."""
    return root / "shapes" / "annotations" / f"instances_{split}.json"


def register_shapes(root: str | os.PathLike | None = None) -> None:
    """Registers `shapes_train` and `shapes_val` with Detectron2, with the prefix
    `shapes_sem_seg_` the same images with the class of every pixel, for semantic segmentation, and
    with `shapes_images_` the images alone, for inpainting; also `places365_train` and `_val`.

    Nothing is read until a dataset is used; using one that was not generated raises a
    :class:`~carafe_d2.errors.UserError`. A later call replaces the earlier registration;
    a dataset of the user's own that has one of the names is kept.

    Args:
        root: The folder that holds `shapes/`; default `$DETECTRON2_DATASETS`, else `datasets`.
    """
    root = datasets_root(root)
    for split in SPLITS:
        json_file, images = annotation_file(root, split), image_dir(root, split)
        labels, name = label_dir(root, split), f"shapes_{split}"
        _register(
            name,
            partial(_load, json_file, images, name),
            json_file=str(json_file),
            image_root=str(images),
            evaluator_type="coco",
            thing_classes=list(CATEGORIES),
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CATEGORIES))},
        )
        name = f"shapes_sem_seg_{split}"
        _register(
            name,
            partial(_load_labels, labels, images, name),
            image_root=str(images),
            sem_seg_root=str(labels),
            evaluator_type="sem_seg",
            stuff_classes=list(LABELS),
            ignore_label=255,
        )
        register_images(f"shapes_images_{split}", images, HOW_TO_GET)
    for split, folder in (("train", "data_256"), ("val", "val_256")):
        path = root / "places365" / folder
        register_images(f"places365_{split}", path, PLACES_HOW_TO_GET)


def register_images(name: str, folder: Path, how_to_get: str = "put it there") -> None:
    """Registers the images of a folder and its subfolders, for inpainting.

    Args:
        name: of the dataset.
        folder: the images'.
        how_to_get: what to do where it is missing.
    """
    load = partial(load_images, folder, name)
    _register(name, load, how_to_get, image_root=str(folder), evaluator_type="inpainting")


def load_images(folder: Path, name: str) -> list[dict]:
    """Returns the images of a folder and its subfolders as Detectron2's list of dicts.

    Raises:
        UserError: There are none.
    """
    paths = sorted(
        os.path.join(parent, file)
        for parent, _, files in os.walk(folder)
        for file in files
        if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES
    )
    if not paths:
        raise UserError(f"dataset {name!r}: there are no images in {os.path.abspath(folder)}")
    return [{"file_name": path, "image_id": i} for i, path in enumerate(paths)]


def _register(
    name: str, load: Callable[[], list[dict]], how_to_get: str = HOW_TO_GET, **metadata
) -> None:
    from detectron2.data import DatasetCatalog, MetadataCatalog

    if name in DatasetCatalog:
        if not is_ours(name):
            return
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(how_to_get=how_to_get, **metadata)


def is_ours(name: str) -> bool:
    """Whether the registered dataset of a name, if there is one, comes with this package."""
    from detectron2.data import MetadataCatalog

    return MetadataCatalog.get(name).get("how_to_get") in (HOW_TO_GET, PLACES_HOW_TO_GET)


def _load(json_file: Path, images: Path, name: str) -> list[dict]:
    """Returns the dataset as Detectron2's list of dicts.

    Raises:
        UserError: The dataset was not generated, or not completely.
    """
    from detectron2.data.datasets import load_coco_json

    _check_exists(json_file, name)
    return load_coco_json(str(json_file), str(images), name)


def _load_labels(labels: Path, images: Path, name: str) -> list[dict]:
    """As :func:`_load`, of the dataset for semantic segmentation."""
    from detectron2.data.datasets import load_sem_seg

    _check_exists(labels, name)
    return load_sem_seg(str(labels), str(images), image_ext="png")


def _check_exists(path: Path, name: str) -> None:
    if not path.exists():
        raise UserError(
            f"dataset {name!r}: {path.absolute()} does not exist; {HOW_TO_GET}, or set "
            "DETECTRON2_DATASETS to the folder that holds shapes/"
        )
