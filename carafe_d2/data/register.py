"""Datasets of the user's own, registered alike from a config and from a command line."""

import json
from collections.abc import Iterable
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from ..errors import UserError
from .builtin import HOW_TO_GET

_FORM = "NAME=ANNOTATIONS.json:IMAGES/"


def register_datasets(descriptions: Iterable[str]) -> list[str]:
    """Registers COCO-format datasets with Detectron2; the same one may be registered again.

    Args:
        descriptions: of the form ``NAME=ANNOTATIONS.json:IMAGES/``, as DATASETS.REGISTER and the
            option ``--dataset`` of the programs take them.

    Returns:
        The names.

    Raises:
        UserError: a description is of another form, a file is missing or not COCO's, or the name
            belongs to another dataset.
    """
    return [_register(description) for description in descriptions]


def dataset_name(option: str) -> str:
    """The name that an option ``--dataset`` gives, or describes for :func:`register_datasets`."""
    return _register(option) if "=" in option else option


def _register(description: str) -> str:
    name, equals, paths = description.partition("=")
    annotations, colon, images = paths.rpartition(":")
    if not (name and equals and colon and annotations):
        raise UserError(f"dataset {description!r}: expected {_FORM}")
    try:
        categories = json.loads(Path(annotations).read_bytes())["categories"]
        categories = sorted(categories, key=lambda category: category["id"])
        classes = [category["name"] for category in categories]
    except OSError as error:
        raise UserError(f"dataset {name!r}: cannot read {annotations}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"dataset {name!r}: {annotations} is no COCO annotation file with categories"
        ) from error
    if not Path(images).is_dir():
        raise UserError(f"dataset {name!r}: {images} is no folder of images")

    metadata = MetadataCatalog.get(name)
    if metadata.get("how_to_get") == HOW_TO_GET:  # the user's dataset goes before ours
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
        metadata = MetadataCatalog.get(name)
    if name in DatasetCatalog:
        if (metadata.get("json_file"), metadata.get("image_root")) != (annotations, images):
            raise UserError(f"dataset {name!r}: another dataset of this name is registered")
        return name
    keypoints = _keypoints(categories)
    register_coco_instances(name, keypoints, annotations, images)
    # Detectron2 fills these in when it loads the annotations; some programs never do.
    metadata.thing_classes = classes
    metadata.thing_dataset_id_to_contiguous_id = {c["id"]: i for i, c in enumerate(categories)}
    return name


def _keypoints(categories: list[dict]) -> dict:
    """Metadata of keypoints; names with "left" and "right" tell which a flip exchanges."""
    names = next((c["keypoints"] for c in categories if c.get("keypoints")), None)
    if names is None:
        return {}
    pairs = [(n, n.replace("left", "right")) for n in names if "left" in n]
    return {
        "keypoint_names": names,
        "keypoint_flip_map": [pair for pair in pairs if pair[1] in names],
    }
