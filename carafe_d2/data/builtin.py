"""Where the `shapes` dataset lies, what its classes are, and its registration with Detectron2."""

import os
from pathlib import Path

from ..errors import UserError

SPLITS = ("train", "val")
HOW_TO_GET = "generate it with `python -m carafe_d2.data.shapes`"
CATEGORIES = ("disc", "ring", "star", "cross", "crescent", "blob")  # COCO ids are 1-based


def datasets_root(root: str | os.PathLike | None = None) -> Path:
    """Returns `root`, or what Detectron2 takes: `$DETECTRON2_DATASETS`, else `datasets`."""
    return Path(root or os.environ.get("DETECTRON2_DATASETS") or "datasets").expanduser()


def image_dir(root: Path, split: str) -> Path:
    """Returns the folder of a split's images, below the datasets root."""
    return root / "shapes" / split


def annotation_file(root: Path, split: str) -> Path:
    """Returns the COCO JSON of a split, below the datasets root."""
    return root / "shapes" / "annotations" / f"instances_{split}.json"


def register_shapes(root: str | os.PathLike | None = None) -> None:
    """Registers `shapes_train` and `shapes_val` with Detectron2.

    Nothing is read until a dataset is used; using one that was not generated raises a
    :class:`~carafe_d2.errors.UserError`. A later call replaces the earlier registration;
    a dataset of the user's own that has one of the names is kept.

    Args:
        root: The folder that holds `shapes/`; default `$DETECTRON2_DATASETS`, else `datasets`.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog

    root = datasets_root(root)
    for split in SPLITS:
        name = f"shapes_{split}"
        if name in DatasetCatalog:
            if MetadataCatalog.get(name).get("how_to_get") != HOW_TO_GET:
                continue
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        json_file, images = annotation_file(root, split), image_dir(root, split)
        # Bound as defaults: the loop goes on before Detectron2 calls the function.
        DatasetCatalog.register(name, lambda j=json_file, i=images, n=name: _load(j, i, n))
        MetadataCatalog.get(name).set(
            json_file=str(json_file),
            image_root=str(images),
            evaluator_type="coco",
            how_to_get=HOW_TO_GET,
            thing_classes=list(CATEGORIES),
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CATEGORIES))},
        )


def _load(json_file: Path, images: Path, name: str) -> list[dict]:
    """Returns the dataset as Detectron2's list of dicts.

    Raises:
        UserError: The dataset was not generated, or not completely.
    """
    from detectron2.data.datasets import load_coco_json

    if not json_file.is_file():
        raise UserError(
            f"dataset {name!r}: {json_file.absolute()} does not exist; {HOW_TO_GET}, or set "
            "DETECTRON2_DATASETS to the folder that holds shapes/"
        )
    return load_coco_json(str(json_file), str(images), name)
