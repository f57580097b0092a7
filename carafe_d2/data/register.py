"""Datasets of the user's own, registered alike from a config and from a command line."""

import json
from collections.abc import Iterable
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from ..errors import UserError
from .builtin import is_ours, register_images

_FORM = "NAME=ANNOTATIONS.json:IMAGES/, or for inpainting NAME=IMAGES/"


def register_datasets(descriptions: Iterable[str]) -> list[str]:
    """Registers datasets of COCO's format, or of images alone, with Detectron2; the same one may be
    registered again.

    Args:
        descriptions: of the form ``NAME=ANNOTATIONS.json:IMAGES/`` or ``NAME=IMAGES/``, as
            DATASETS.REGISTER and the option ``--dataset`` of the programs take them.

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
    if name and images and not colon and Path(images).is_dir():
        if _is_new(name, image_root=str(Path(images)), evaluator_type="inpainting"):
            register_images(name, Path(images))
        return name
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

    if not _is_new(name, json_file=annotations, image_root=images):
        return name
    keypoints = _keypoints(categories)
    register_coco_instances(name, keypoints, annotations, images)
    metadata = MetadataCatalog.get(name)
    # Detectron2 fills these in when it loads the annotations; some programs never do.
    metadata.thing_classes = classes
    metadata.thing_dataset_id_to_contiguous_id = {c["id"]: i for i, c in enumerate(categories)}
    return name


def _is_new(name: str, **paths: str) -> bool:
    """Whether a dataset is still to be registered; of this package's, the user's goes before.

    Raises:
        UserError: another one of the name is registered.
    """
    if is_ours(name):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    if name not in DatasetCatalog:
        return True
    metadata = MetadataCatalog.get(name)
    if any(metadata.get(key) != path for key, path in paths.items()):
        raise UserError(f"dataset {name!r}: another dataset of this name is registered")
    return False


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
