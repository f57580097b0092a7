"""Datasets of the user's own, registered alike from a config and from a command line."""

import json
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from ..errors import UserError
from .builtin import is_ours, load_images, register_images

_FORM = (
    "NAME=ANNOTATIONS.json:IMAGES/, for semantic segmentation NAME=LABELS/:IMAGES/, "
    "or for inpainting NAME=IMAGES/"
)
_CLASSES = "classes.txt"  # among the label images, a name a line


def register_datasets(descriptions: Iterable[str]) -> list[str]:
    """Registers datasets of COCO's format, of images and label images, or of images alone, with
    Detectron2; the same one may be registered again.

    Args:
        descriptions: of the form ``NAME=ANNOTATIONS.json:IMAGES/``, ``NAME=LABELS/:IMAGES/`` or
            ``NAME=IMAGES/``, as DATASETS.REGISTER and the option ``--dataset`` of the programs
            take them. In LABELS are PNG files named as the images, whose pixels are classes, 255
            for none, and the names of the classes, from 0 on, line by line in ``classes.txt``.

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
    if not Path(images).is_dir():
        raise UserError(f"dataset {name!r}: {images} is no folder of images")
    if Path(annotations).is_dir():
        return _register_labels(name, annotations, images)
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
    if not _is_new(name, json_file=annotations, image_root=images):
        return name
    keypoints = _keypoints(categories)
    register_coco_instances(name, keypoints, annotations, images)
    metadata = MetadataCatalog.get(name)
    # Detectron2 fills these in when it loads the annotations; some programs never do.
    metadata.thing_classes = classes
    metadata.thing_dataset_id_to_contiguous_id = {c["id"]: i for i, c in enumerate(categories)}
    return name


def _register_labels(name: str, labels: str, images: str) -> str:
    try:
        classes = (Path(labels) / _CLASSES).read_text().split("\n")
    except OSError as error:
        raise UserError(
            f"dataset {name!r}: cannot read {labels}/{_CLASSES}, which names the classes, one a "
            f"line: {error.strerror}"
        ) from error
    if _is_new(name, sem_seg_root=labels, image_root=images):
        DatasetCatalog.register(name, partial(_load_labels, name, labels, images))
        MetadataCatalog.get(name).set(
            image_root=images,
            sem_seg_root=labels,
            evaluator_type="sem_seg",
            stuff_classes=[line.strip() for line in classes if line.strip()],
            ignore_label=255,
        )
    return name


def _load_labels(name: str, labels: str, images: str) -> list[dict]:
    """Detectron2's list of dicts.

    Raises:
        UserError: there are no images, or some without labels.
    """
    records = load_images(Path(images), name)
    for record in records:
        stem = os.path.splitext(os.path.relpath(record["file_name"], images))[0]
        record["sem_seg_file_name"] = os.path.join(labels, f"{stem}.png")
    missing = [file for r in records if not os.path.isfile(file := r["sem_seg_file_name"])]
    if missing:
        raise UserError(
            f"dataset {name!r}: labels of {len(missing)} of {len(records)} images are missing, "
            f"such as {missing[0]}"
        )
    return records


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
