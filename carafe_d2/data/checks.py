"""Checks of a user's data before training starts, rather than a traceback after a day of it.

What is found is reported line by line with file and id. What can be completed without guessing is
completed by :func:`complete_annotations`.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.utils.file_io import PathManager
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from ..errors import UserError
from ..model_settings import check_order_of_classes

logger = logging.getLogger(__name__)

_SHOWN = 10  # problems of a dataset; the rest are counted
_IMAGES = 200  # images of a dataset that are opened, evenly spread over it
_EXIF_ORIENTATION = 0x0112
_COCO_TYPES = ("coco", "coco_panoptic_seg")


def check_data(cfg: CfgNode, *, training: bool = True) -> None:
    """Checks annotations and images of the datasets of a config against each other and the config.

    Every annotation is looked at; of the images, some hundred are opened.

    Args:
        cfg: a config whose datasets are registered.
        training: whether DATASETS.TRAIN is used, too.

    Raises:
        UserError: names for each problem the dataset, the file and the id.
    """
    split = "TRAIN" if training else "TEST"
    if not cfg.DATASETS[split]:
        raise UserError(f"DATASETS.{split} is empty; name a registered dataset")
    for name in dict.fromkeys((*(cfg.DATASETS.TRAIN if training else ()), *cfg.DATASETS.TEST)):
        metadata = MetadataCatalog.get(name)
        trains = training and name in cfg.DATASETS.TRAIN
        json_file = metadata.get("json_file")
        if json_file and metadata.get("evaluator_type") in _COCO_TYPES:
            content = _read_json(name, json_file)
            problems = list(_file_problems(content, cfg, trains))
            _report(name, json_file, problems)
            dicts = DatasetCatalog.get(name)
        else:
            dicts = DatasetCatalog.get(name)
            _report(name, "its records", list(_record_problems(dicts, cfg, trains)))
        _report(name, "its classes", list(_class_problems(cfg, metadata)))
        _report(name, "its images", list(_image_problems(dicts)))
        if training:
            trained = cfg.DATASETS.TRAIN[0]
            classes = MetadataCatalog.get(trained).get("thing_classes")
            check_order_of_classes(classes, f"dataset {trained!r}", name)


def _report(name: str, source: str, problems: list[str]) -> None:
    if not problems:
        return
    lines = problems[:_SHOWN]
    if len(problems) > _SHOWN:
        lines.append(f"and {len(problems) - _SHOWN} more")
    raise UserError(f"dataset {name!r}, {source}: " + "\n  ".join(["", *lines]).strip())


def _read_json(name: str, json_file: str) -> dict:
    try:
        with PathManager.open(json_file) as file:
            content = json.load(file)
    except ValueError as error:
        raise UserError(f"dataset {name!r}: {json_file} is no JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise UserError(f"dataset {name!r}: {json_file} has no list of images, as COCO's files do")
    return content


# --- annotations --------------------------------------------------------------------------------


def _file_problems(content: dict, cfg: CfgNode, training: bool) -> Iterator[str]:
    """What is wrong in a COCO annotation file."""
    images: dict[Any, dict] = {}
    for image in content["images"]:
        missing = [key for key in ("id", "file_name", "height", "width") if key not in image]
        if missing:
            yield f"image {image.get('id', image.get('file_name'))}: has no {missing[0]}"
        elif image["id"] in images:
            yield f"image {image['id']}: has the id of another image"
        images[image.get("id")] = image
    if "annotations" not in content:  # of a test set, whose answers are kept back
        if training:
            yield "it has no annotations to train with"
        return
    categories = {category.get("id") for category in content.get("categories", ())}
    if not categories:
        yield "it has no categories"
    ids = set()
    for annotation in content["annotations"]:
        label = f"annotation {annotation.get('id', '(without an id)')}"
        if annotation.get("id") in ids or "id" not in annotation:
            yield f"{label}: every annotation needs an id of its own"
        ids.add(annotation.get("id"))
        image = images.get(annotation.get("image_id"))
        if image is None:
            yield f"{label}: there is no image {annotation.get('image_id')}"
            continue
        if annotation.get("category_id") not in categories:
            yield f"{label}: there is no category {annotation.get('category_id')}"
        size = image.get("height"), image.get("width")
        for problem in _annotation_problems(annotation, size, cfg, training):
            yield f"{label} of {image.get('file_name')}: {problem}"


def _record_problems(dicts: list[dict], cfg: CfgNode, training: bool) -> Iterator[str]:
    """What is wrong in the dicts that a function registered with Detectron2 returns."""
    if not dicts:
        yield "there are none"
    for index, record in enumerate(dicts):
        label = record.get("file_name", f"record {index}")
        if "file_name" not in record:
            yield f"{label}: has no file_name"
        for i, annotation in enumerate(record.get("annotations", ())):
            if "bbox_mode" not in annotation:
                yield f"{label}, annotation {i}: has no bbox_mode"
            size = record.get("height"), record.get("width")
            for problem in _annotation_problems(annotation, size, cfg, training):
                yield f"{label}, annotation {i}: {problem}"


def _annotation_problems(
    annotation: Mapping, size: tuple, cfg: CfgNode, training: bool
) -> Iterator[str]:
    box = annotation.get("bbox")
    if box is None or len(box) not in (4, 5) or not np.isfinite(np.asarray(box, float)).all():
        yield f"its bbox must be four numbers, got {box}"
    if cfg.MODEL.MASK_ON and not annotation.get("iscrowd"):
        if problem := _segmentation_problem(annotation.get("segmentation"), size):
            yield problem
        elif (
            training
            and cfg.INPUT.MASK_FORMAT == "polygon"
            and not isinstance(annotation["segmentation"], list)
        ):
            yield "its segmentation is RLE; set INPUT.MASK_FORMAT bitmask"
    keypoints = annotation.get("keypoints") if cfg.MODEL.KEYPOINT_ON else None
    if keypoints is None:
        return
    expected = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if len(keypoints) != 3 * expected:
        yield (
            f"has {len(keypoints) / 3:g} keypoints, but MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is "
            f"{expected}"
        )


def _segmentation_problem(segmentation, size: tuple) -> str:
    if segmentation is None:
        return "has no segmentation; with MODEL.MASK_ON every object needs one"
    if isinstance(segmentation, dict):  # RLE
        if "counts" not in segmentation or tuple(segmentation.get("size", ())) != size:
            return f"the size of its RLE is {segmentation.get('size')}, that of the image {size}"
        return ""
    if isinstance(segmentation, np.ndarray):
        return "" if segmentation.shape == size else f"its mask has shape {segmentation.shape}"
    if not segmentation:
        return "its segmentation is empty"
    for polygon in segmentation:
        if len(polygon) < 6 or len(polygon) % 2:
            return f"a polygon needs three points or more, got {len(polygon) / 2:g}"
    return ""


# --- classes and keypoints ----------------------------------------------------------------------


def _class_problems(cfg: CfgNode, metadata: Metadata) -> Iterator[str]:
    section = {
        "GeneralizedRCNN": "ROI_HEADS",
        "LegacyRCNN": "ROI_HEADS",
        "PanopticFPN": "ROI_HEADS",
        "RetinaNet": "RETINANET",
    }.get(cfg.MODEL.META_ARCHITECTURE)
    names = metadata.get("thing_classes")
    if section and names and len(names) != cfg.MODEL[section].NUM_CLASSES:
        yield f"there are {len(names)}; set MODEL.{section}.NUM_CLASSES to that"
    if not cfg.MODEL.KEYPOINT_ON:
        return
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS)
    if sigmas not in ((keypoints, 0) if keypoints == 17 else (keypoints,)):
        yield (
            f"to evaluate {keypoints} keypoints TEST.KEYPOINT_OKS_SIGMAS must have as many "
            f"numbers, got {sigmas}"
        )
    if metadata.get("keypoint_names") is None or metadata.get("keypoint_flip_map") is None:
        yield "its metadata need keypoint_names and keypoint_flip_map, as Detectron2 documents"


# --- images -------------------------------------------------------------------------------------


def _image_problems(dicts: list[dict]) -> Iterator[str]:
    step = max(1, len(dicts) // _IMAGES)
    for record in dicts[::step]:
        try:
            check_image(record, decode=True)
        except UserError as error:
            yield str(error)


def check_image(record: Mapping, *, decode: bool = False) -> None:
    """Checks that an image will be read as it is meant, from its header.

    Args:
        decode: whether a PNG may be decoded as a whole, without which its EXIF data are unknown.
        record: one of Detectron2's dicts; its height and width are those after the rotation that
            EXIF data ask for, as Detectron2 reads it.

    Raises:
        UserError: it cannot be read, has more than 8 bits, or is not of the annotated size.
    """
    name = record["file_name"]
    label = f"cannot read image {name} (id {record.get('image_id')})"
    try:
        with PathManager.open(name, "rb") as file, Image.open(file) as image:
            mode, (width, height) = image.mode, image.size
            may_be_turned = decode or image.format != "PNG"
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1) if may_be_turned else 1
    except (OSError, SyntaxError) as error:
        raise UserError(f"{label}: {error}") from error
    if mode == "F" or mode.startswith("I"):
        raise UserError(
            f"{label}: its pixels have mode {mode}, which Detectron2 would clip to white; save it "
            "with 8 bits"
        )
    turned = orientation >= 5
    size = (width, height) if turned else (height, width)  # as (height, width)
    expected = record.get("height", size[0]), record.get("width", size[1])
    if size != expected and may_be_turned:
        because = f" after the rotation {orientation} of its EXIF data" if turned else ""
        raise UserError(
            f"{label}: it has {size[1]} x {size[0]} pixels{because}, but is annotated as "
            f"{expected[1]} x {expected[0]}"
        )


# --- completion ---------------------------------------------------------------------------------


def complete_annotations(coco: COCO, source: str) -> None:
    """Completes annotations so that pycocotools evaluates all of them; says once what it did.

    A missing ``area`` is that of the mask, or else of the box; a missing ``iscrowd`` is 0, and so
    is nothing but a crowd. pycocotools takes the id 0 of an annotation for "no match": where there
    is one, all are numbered anew.

    Args:
        coco: pycocotools' annotations; changed in place.
        source: their file, for the message.
    """
    done = []
    coco.dataset.setdefault("info", {})
    annotations = coco.dataset.get("annotations", [])
    if without := [a for a in annotations if "iscrowd" not in a]:
        done.append(f"iscrowd of {len(without)} annotations is 0")
        for annotation in without:
            annotation["iscrowd"] = 0
    if without := [a for a in annotations if "area" not in a]:
        done.append(f"area of {len(without)} annotations is that of their masks or boxes")
        for annotation in without:
            annotation["area"] = _area(coco, annotation)
    if any(not annotation["id"] for annotation in annotations):
        done.append("annotations are numbered from 1, as pycocotools ignores the id 0")
        for i, annotation in enumerate(annotations, start=1):
            annotation["id"] = i
    if done:
        logger.warning(f"Completed {os.path.basename(source)} in memory: {'; '.join(done)}.")
        coco.createIndex()


def _area(coco: COCO, annotation: dict) -> float:
    if annotation.get("segmentation"):
        return float(mask_util.area(coco.annToRLE(annotation)))
    return float(annotation["bbox"][2] * annotation["bbox"][3])
