"""Checks of a user's data before training starts, rather than a traceback after a day of it.

What is found is reported line by line with file and id. What can be completed without guessing is
completed by :func:`complete_annotations`.
"""

import json
import logging
import math
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from ..config import is_inpainting
from ..errors import UserError
from ..model_settings import check_order_of_classes

logger = logging.getLogger(__name__)

_SHOWN = 10  # problems of a dataset; the rest are counted
_IMAGES = 200  # images of a dataset that are opened, evenly spread over it
_EXIF_ORIENTATION = 0x0112
_COCO_TYPES = ("coco", "coco_panoptic_seg")
_SEMANTIC_TYPES = ("sem_seg", "coco_panoptic_seg")


def check_data(cfg: CfgNode, *, training: bool = True) -> None:
    """Checks annotations and images of the datasets of a config against each other and the config.

    Every annotation is looked at, and every image has to be there; some hundred are decoded.

    Args:
        cfg: a config whose datasets are registered.
        training: whether DATASETS.TRAIN is used, too.

    Raises:
        UserError: names for each problem the dataset, the file and the id.
    """
    split = "TRAIN" if training else "TEST"
    if not cfg.DATASETS[split]:
        raise UserError(f"DATASETS.{split} is empty; name a registered dataset")
    trained = cfg.DATASETS.TRAIN if training else ()
    for name in dict.fromkeys((*trained, *cfg.DATASETS.TEST)):
        metadata = MetadataCatalog.get(name)
        trains, tests = name in trained, name in cfg.DATASETS.TEST
        if is_inpainting(cfg) != (metadata.get("evaluator_type") == "inpainting"):
            what = "its images alone, NAME=IMAGES/" if is_inpainting(cfg) else "annotated images"
            raise UserError(
                f"dataset {name!r}: a {cfg.MODEL.META_ARCHITECTURE} takes {what}; see "
                "DATASETS.REGISTER"
            )
        json_file = metadata.get("json_file")
        boxes = _Boxes()
        if json_file and metadata.get("evaluator_type") in _COCO_TYPES:
            content = _read_json(name, json_file)
            _report(name, json_file, list(_file_problems(content)))  # the next needs these in order
            problems = list(_content_problems(content, cfg, trains, boxes))
            _report(name, json_file, [*problems, *boxes.problems()])
            if tests and not content.get("annotations", ["unknown"]):
                logger.warning(f"Dataset {name!r} has no annotations: its AP will be nan.")
            dicts = DatasetCatalog.get(name)
        else:
            dicts = DatasetCatalog.get(name)
            problems = list(_record_problems(dicts, cfg, metadata, trains, tests, boxes))
            _report(name, "its records", [*problems, *boxes.problems()])
        boxes.log(name)
        _report(name, "its classes", list(_class_problems(cfg, metadata, tests)))
        if trained:
            classes = MetadataCatalog.get(trained[0]).get("thing_classes")
            check_order_of_classes(classes, f"dataset {trained[0]!r}", name)
        _report(name, "its images", list(_image_problems(dicts, cfg, metadata, trains)))


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
    except OSError as error:
        raise UserError(f"dataset {name!r}: cannot read {json_file}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"dataset {name!r}: {json_file} is no JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise UserError(f"dataset {name!r}: {json_file} has no list of images, as COCO's files do")
    return content


# --- annotations --------------------------------------------------------------------------------


def _file_problems(content: dict) -> Iterator[str]:
    """What is wrong with the images and categories of a COCO annotation file, and with all ids."""
    if not content["images"]:
        yield "it has no images"
    for key, kind, needed in (
        ("images", "image", ("file_name", "height", "width")),
        ("categories", "category", ("name",)),
        ("annotations", "annotation", ()),
    ):
        items = content.get(key)
        if isinstance(items, list):
            yield from _item_problems(kind, items, needed)
        elif "annotations" in content:  # which a test set, whose answers are kept back, has not
            yield f"it has no list of {key}"


def _item_problems(kind: str, items: list, needed: tuple[str, ...]) -> Iterator[str]:
    ids: set = set()
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            yield f"{kind} number {index}: expected names and values, got {item!r}"
            continue
        label = f"{kind} {item.get('id', item.get('file_name', '(without an id)'))}"
        if not isinstance(item.get("id"), int | float | str):
            yield f"{label}: needs an id that is a number or text"
        elif item["id"] in ids:
            yield f"{label}: every {kind} needs an id of its own"
        elif isinstance(item["id"], str) != isinstance(next(iter(ids), item["id"]), str):
            yield f"{label}: ids must be all numbers or all text"
        else:
            ids.add(item["id"])
        for key in needed:
            value = item.get(key)
            if key not in item:
                yield f"{label}: has no {key}"
            elif key in ("height", "width"):
                if type(value) is not int or value < 1:
                    yield f"{label}: its {key} must be a positive whole number, got {value!r}"
            elif not isinstance(value, str):
                yield f"{label}: its {key} must be text, got {value!r}"


def _content_problems(
    content: dict, cfg: CfgNode, training: bool, boxes: "_Boxes"
) -> Iterator[str]:
    """What is wrong in the annotations of a COCO file whose images and categories are in order."""
    if "annotations" not in content:  # of a test set, whose answers are kept back
        if training:
            yield "it has no annotations to train with"
        return
    images = {image["id"]: image for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    for annotation in content["annotations"]:
        label = f"annotation {annotation['id']}"
        image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
        if not isinstance(image_id, Hashable) or image_id not in images:
            yield f"{label}: there is no image {image_id!r}"
            continue
        image = images[image_id]
        label = f"{label} of {image['file_name']}"
        if not isinstance(category_id, Hashable) or category_id not in categories:
            yield f"{label}: there is no category {category_id!r}"
        if annotation.get("ignore"):
            yield f"{label}: Detectron2 does not know its key ignore; set iscrowd to 1 instead"
        size = image["height"], image["width"]
        yield from _labeled_problems(label, annotation, size, cfg, training, boxes)
    if training and all(annotation.get("iscrowd") for annotation in content["annotations"]):
        yield "it has no annotations to train with"


def _record_problems(
    dicts: Iterable[dict],
    cfg: CfgNode,
    metadata: Metadata,
    training: bool,
    testing: bool,
    boxes: "_Boxes",
) -> Iterator[str]:
    """What is wrong in the dicts that a function registered with Detectron2 returns."""
    names = metadata.get("thing_classes")
    # What Detectron2 needs beyond training, to write the records as a COCO file or to find them.
    needed = ["file_name"]
    if testing and metadata.get("evaluator_type") in _COCO_TYPES:
        needed += ["image_id", "height", "width"]
    ids: set = set()
    index = -1
    for index, record in enumerate(dicts):
        label = record.get("file_name", f"record {index}")
        for key in needed:
            if record.get(key) is None:
                yield f"{label}: has no {key}"
        if record.get("image_id") in ids:
            yield f"{label}: has the image_id {record['image_id']!r} of another image"
        elif record.get("image_id") is not None:
            ids.add(record["image_id"])
        for i, annotation in enumerate(record.get("annotations", ())):
            label_i = f"{label}, annotation {i}"
            if annotation.get("bbox_mode") not in _BOX_MODES:
                yield f"{label_i}: has no bbox_mode that Detectron2 trains with"
            category = annotation.get("category_id")
            if not isinstance(category, int | np.integer) or not (
                0 <= category < (len(names) if names else np.inf)
            ):
                classes = f"0 to {len(names) - 1}" if names else "0 on"
                yield f"{label_i}: its category_id must be from {classes}, got {category!r}"
            size = record.get("height"), record.get("width")
            yield from _labeled_problems(label_i, annotation, size, cfg, training, boxes)
    if index < 0:
        yield "there are none"


_BOX_MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS)


def _numbers(values) -> np.ndarray | None:
    """A list of finite numbers as an array, or None if it is none."""
    try:
        array = np.asarray(values)
    except ValueError:  # lists of different lengths
        return None
    plain = array.ndim == 1 and array.dtype.kind in "iuf"
    return array if plain and math.isfinite(array.sum()) else None


def _labeled_problems(
    label: str, annotation: Mapping, size: tuple, cfg: CfgNode, training: bool, boxes: "_Boxes"
) -> list[str]:
    """What is wrong in an annotation by itself; its box is added to the others if nothing is."""
    problems = list(_annotation_problems(annotation, size, cfg, training))
    if not problems:
        boxes.add(label, annotation, size)
    return [f"{label}: {problem}" for problem in problems]


def _annotation_problems(
    annotation: Mapping, size: tuple, cfg: CfgNode, training: bool
) -> Iterator[str]:
    box = _numbers(annotation.get("bbox"))
    count = 5 if annotation.get("bbox_mode") == BoxMode.XYWHA_ABS else 4
    if box is None or len(box) != count:
        yield f"its bbox must be {'four' if count == 4 else 'five'} numbers, got " + repr(
            annotation.get("bbox")
        )
    crowd = annotation.get("iscrowd")
    if crowd not in (0, 1, None):
        yield f"its iscrowd must be 0 or 1, got {crowd!r}"
    area = annotation.get("area")
    if area is not None and not (
        isinstance(area, int | float | np.number) and 0 <= area < math.inf
    ):
        yield f"its area must be a positive number, got {area!r}"
    unused = training and crowd
    segmentation = annotation.get("segmentation")
    # Detectron2 leaves an object with a broken one out, whether masks are trained or not.
    if isinstance(segmentation, np.ndarray) or segmentation or (cfg.MODEL.MASK_ON and not unused):
        is_file = "bbox_mode" not in annotation
        if problem := _segmentation_problem(segmentation, size, is_file, training):
            yield problem
        elif (
            training
            and not unused
            and cfg.MODEL.MASK_ON
            and cfg.INPUT.MASK_FORMAT == "polygon"
            and not isinstance(segmentation, list)
        ):
            yield "its segmentation is RLE; set INPUT.MASK_FORMAT bitmask"
    if cfg.MODEL.KEYPOINT_ON and not unused:
        keypoints = _numbers(annotation.get("keypoints"))
        expected = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
        if keypoints is None:
            yield (
                "its keypoints must be a list of numbers x, y, v, zeros for what is not labeled, "
                f"got {annotation.get('keypoints')!r}"
            )
        elif len(keypoints) != 3 * expected:
            yield (
                f"has {len(keypoints) / 3:g} keypoints, but "
                f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {expected}"
            )


def _segmentation_problem(segmentation, size: tuple, is_file: bool, training: bool) -> str:
    if segmentation is None:
        return "has no segmentation; with MODEL.MASK_ON every object needs one"
    if isinstance(segmentation, dict):
        return _rle_problem(segmentation, size, is_file)
    if not isinstance(segmentation, list):
        return f"its segmentation must be polygons or RLE, got {type(segmentation).__name__}"
    if not segmentation:
        return "its segmentation is empty"
    counts = []
    for polygon in segmentation:
        points = _numbers(polygon)
        if points is None:
            return f"a polygon must be a list of numbers x, y, x, y ..., got {str(polygon)[:60]}"
        counts.append(len(points) / 2)
    short = [count for count in counts if count < 3 or count % 1]
    # Detectron2 trains without such a polygon where the object has others.
    if short and not (training and len(short) < len(counts)):
        return f"a polygon needs three points or more, got {short[0]:g}"
    return ""


def _rle_problem(rle: Mapping, size: tuple, is_file: bool) -> str:
    own_size = _numbers(rle.get("size"))
    if (
        own_size is None
        or len(own_size) != 2
        or any(
            own != expected and expected is not None  # a record need not say it
            for own, expected in zip(own_size, size, strict=True)
        )
    ):
        return f"the size of its RLE is {rle.get('size')}, that of the image {size}"
    counts = rle.get("counts")
    runs = _numbers(counts) if isinstance(counts, list) and is_file else _runs(counts)
    if runs is None or not len(runs) or runs.dtype.kind == "f" or (runs < 0).any():
        return f"its RLE has no counts that pycocotools reads, but {str(counts)[:60]}"
    if runs.sum() != own_size.prod():  # of a shorter one pycocotools never finds the end
        return f"the counts of its RLE make {runs.sum()} pixels, the image has {own_size.prod()}"
    return ""


def _runs(counts) -> np.ndarray | None:
    """The lengths of runs that compressed counts stand for, or None if they are no such text.

    Each is a number of groups of five bits, lowest first; from the fourth on it is the difference
    from the one before the last (``rleFrString`` in COCO's maskApi.c).
    """
    if isinstance(counts, str):
        counts = counts.encode(errors="replace")
    if not isinstance(counts, bytes):
        return None
    digits = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    last = digits & 32 == 0
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or not last[-1]:
        return None
    first = np.flatnonzero(np.r_[True, last[:-1]])
    place = np.arange(len(digits)) - np.repeat(first, np.diff(np.r_[first, len(digits)]))
    if place.max() > 10:
        return None
    runs = np.add.reduceat((digits & 31) << 5 * place, first)
    runs -= np.where(digits[last] & 16, 1 << 5 * (place[last] + 1), 0)
    # Differences start at the fourth: the first run stands alone.
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


class _Boxes:
    """The boxes of a dataset, whose likely mistakes show when they are seen together."""

    def __init__(self):
        self._labels: list[str] = []
        self._boxes: list = []  # x, y, width, height
        self._sizes: list[tuple] = []
        self._ends: list[tuple] = []  # the largest x and y of polygons

    def add(self, label: str, annotation: Mapping, size: tuple) -> None:
        """Adds an annotation that has no problem of its own."""
        mode = annotation.get("bbox_mode", BoxMode.XYWH_ABS)
        known = mode in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
        if annotation.get("iscrowd") or not known or None in size:
            return
        x, y, width, height = annotation["bbox"]
        if mode == BoxMode.XYXY_ABS:
            width, height = width - x, height - y
        polygons = annotation.get("segmentation")
        ends = (np.nan, np.nan)
        if isinstance(polygons, list) and polygons:
            points = [p for p in polygons if len(p) >= 6]
            ends = max(max(p[::2]) for p in points), max(max(p[1::2]) for p in points)
        self._labels.append(label)
        self._boxes.append((x, y, width, height))
        self._sizes.append(size)
        self._ends.append(ends)

    def problems(self) -> list[str]:
        """What cannot be meant: boxes of another form than x, y, width, height, or nowhere."""
        if not self._labels:
            return []
        boxes, ends = np.array(self._boxes, float), np.array(self._ends, float)
        start, size = boxes[:, :2], boxes[:, 2:]
        limit = np.array(self._sizes)[:, ::-1]
        is_fraction = (boxes <= 1).all() and (boxes % 1).any()
        # Width and height where polygons end, or that lead far out of images again and again.
        far = (start + size > 1.1 * limit).any(axis=1)
        at_ends = (abs(size - ends) <= 1).all(axis=1) & (abs(start + size - ends) > 1).any(axis=1)
        is_corners = at_ends | (far & (size > start).all() & (far.mean() > 0.2))
        is_negative = (size < 0).any(axis=1)
        is_outside = ((start >= limit) | (start + size <= 0)).any(axis=1)
        tests = {
            "is in fractions of the image; it must be in pixels": np.full(len(boxes), is_fraction),
            "seems to be x1, y1, x2, y2; it must be x, y, width, height": is_corners,
            "has a negative width or height": is_negative,
            "lies outside the image": is_outside,
        }
        described = np.zeros(len(boxes), bool)
        lines = []
        for text, at_fault in tests.items():
            for i in np.flatnonzero(at_fault & ~described):
                shown = ", ".join(f"{number:g}" for number in boxes[i])
                lines.append(f"{self._labels[i]}: its bbox ({shown}) {text}")
            described |= at_fault
        return lines

    def log(self, name: str) -> None:
        """Says what may be meant, but is rarely."""
        if not self._labels:
            return
        boxes = np.array(self._boxes, float)
        start, size = boxes[:, :2], boxes[:, 2:]
        beyond = (start < -1) | (start + size > np.array(self._sizes)[:, ::-1] + 1)
        for text, found in (
            ("have no width or height; training leaves them out", (size == 0).any(axis=1)),
            ("reach out of their images; training cuts them off", beyond.any(axis=1)),
        ):
            if found.any():
                first = self._labels[found.argmax()]
                logger.warning(f"Dataset {name!r}: {found.sum()} boxes {text} (first: {first}).")


# --- classes and keypoints ----------------------------------------------------------------------


def _class_problems(cfg: CfgNode, metadata: Metadata, testing: bool) -> Iterator[str]:
    architecture = cfg.MODEL.META_ARCHITECTURE
    sections = {
        "GeneralizedRCNN": {"ROI_HEADS": "thing_classes"},
        "LegacyRCNN": {"ROI_HEADS": "thing_classes"},
        "PanopticFPN": {"ROI_HEADS": "thing_classes", "SEM_SEG_HEAD": "stuff_classes"},
        "RetinaNet": {"RETINANET": "thing_classes"},
        "SemanticSegmentor": {"SEM_SEG_HEAD": "stuff_classes"},
    }.get(architecture, {})
    for section, key in sections.items():
        names = metadata.get(key)
        if names and len(names) != cfg.MODEL[section].NUM_CLASSES:
            yield f"there are {len(names)}; set MODEL.{section}.NUM_CLASSES to that"
    if testing:
        kind = metadata.get("evaluator_type")
        needed = ["thing_classes"] if kind in _COCO_TYPES else []
        needed += ["stuff_classes", "ignore_label"] if kind in _SEMANTIC_TYPES else []
        for key in needed:
            if metadata.get(key) is None:
                yield f"to evaluate it, its metadata need {key}, as Detectron2 documents"
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


def _image_problems(
    dicts: list[dict], cfg: CfgNode, metadata: Metadata, training: bool
) -> Iterator[str]:
    there = []
    for record in dicts:
        files = [record[k] for k in ("file_name", "sem_seg_file_name") if k in record]
        if missing := [file for file in files if not PathManager.isfile(file)]:
            yield f"image {missing[0]} (id {record.get('image_id')}): there is no such file"
        else:
            there.append(record)
    yield from _unmatched(there)
    for record in there[:: max(1, len(there) // _IMAGES)]:
        try:
            size = check_image(record, decode=True)
            if "sem_seg_file_name" in record:
                _check_labels(record["sem_seg_file_name"], size, cfg, metadata, training)
        except UserError as error:
            yield str(error)


def _unmatched(dicts: list[dict]) -> Iterator[str]:
    """Images with labels of other ones, as Detectron2 pairs them where some are missing."""
    pairs = [(r["file_name"], r["sem_seg_file_name"]) for r in dicts if "sem_seg_file_name" in r]
    same = [_stem(image) == _stem(labels) for image, labels in pairs]
    if any(same):  # else their names follow a rule of their own
        for (image, labels), is_same in zip(pairs, same, strict=True):
            if not is_same:
                yield f"image {image}: its labels would be {labels}"


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _check_labels(name: str, size: tuple, cfg: CfgNode, metadata: Metadata, training: bool) -> None:
    """Checks labels of semantic segmentation against the size (height, width) of their image."""
    label = f"labels {name}"
    try:
        with PathManager.open(name, "rb") as file, Image.open(file) as image:
            mode, labels = image.mode, np.array(image)
    except (OSError, SyntaxError) as error:
        raise UserError(f"cannot read {label}: {error}") from error
    if labels.ndim != 2 or (training and mode != "L"):
        raise UserError(
            f"{label}: its pixels have mode {mode}, but Detectron2 trains with gray values of 8 "
            "bits, mode L"
        )
    if labels.shape != size:
        raise UserError(
            f"{label}: it has {labels.shape[1]} x {labels.shape[0]} pixels, but its image "
            f"{size[1]} x {size[0]}"
        )
    classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    ignored = {cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE} if training else {metadata.get("ignore_label")}
    unknown = [value for value in np.unique(labels).tolist() if value not in ignored]
    if unknown and unknown[-1] >= classes:
        raise UserError(
            f"{label}: it has the label {unknown[-1]}, but MODEL.SEM_SEG_HEAD.NUM_CLASSES is "
            f"{classes} and {', '.join(map(str, ignored))} is ignored"
        )


def check_image(record: Mapping, *, decode: bool = False) -> tuple[int, int]:
    """Checks that an image will be read as it is meant, from its header.

    Args:
        decode: whether to decode it, without which it may end early, and EXIF data of a PNG are
            unknown.
        record: one of Detectron2's dicts; its height and width are those after the rotation that
            EXIF data ask for, as Detectron2 reads it.

    Returns:
        Its height and width.

    Raises:
        UserError: it cannot be read, has more than 8 bits, or is not of the annotated size.
    """
    name = record["file_name"]
    label = f"cannot read image {name} (id {record.get('image_id')})"
    try:
        with PathManager.open(name, "rb") as file, Image.open(file) as image:
            mode, (width, height) = image.mode, image.size
            if decode:
                image.load()
            may_be_turned = decode or image.format != "PNG"
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1) if may_be_turned else 1
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{label}: {error}") from error
    if mode == "F" or mode.startswith("I"):
        raise UserError(
            f"{label}: its pixels have mode {mode}, which Detectron2 would clip to white; save it "
            "with 8 bits"
        )
    turned = orientation in (5, 6, 7, 8)
    size = (width, height) if turned else (height, width)  # as (height, width)
    expected = record.get("height", size[0]), record.get("width", size[1])
    if size != expected and may_be_turned:
        because = f" after the rotation {orientation} of its EXIF data" if turned else ""
        raise UserError(
            f"{label}: it has {size[1]} x {size[0]} pixels{because}, but is annotated as "
            f"{expected[1]} x {expected[0]}"
        )
    return size


# --- completion ---------------------------------------------------------------------------------


def complete_annotations(coco: COCO, source: str) -> None:
    """Completes annotations so that pycocotools evaluates all of them; says once what it did.

    A missing ``area``, or one of 0, is that of the mask, or else of the box; a missing ``iscrowd``
    is 0; ``num_keypoints`` counts the labeled ones. pycocotools takes the id 0 of an annotation for
    "no match" and text for an error: where there is one, all are numbered anew.

    Args:
        coco: pycocotools' annotations; changed in place.
        source: their file, for the message.
    """
    done = []
    coco.dataset.setdefault("info", {})
    annotations = coco.dataset.get("annotations", [])
    if without := [a for a in annotations if a.get("iscrowd") is None]:
        done.append(f"iscrowd of {len(without)} annotations is 0")
        for annotation in without:
            annotation["iscrowd"] = 0
    if without := [a for a in annotations if not a.get("area") and all(a["bbox"][2:])]:
        done.append(f"area of {len(without)} annotations is that of their masks or boxes")
        for annotation in without:
            annotation["area"] = _area(coco, annotation)
    for annotation in [a for a in annotations if a.get("area") is None]:
        annotation["area"] = 0
    if without := [a for a in annotations if a.get("keypoints") and "num_keypoints" not in a]:
        done.append(f"num_keypoints of {len(without)} annotations is that of the labeled ones")
        for annotation in without:
            annotation["num_keypoints"] = sum(v > 0 for v in annotation["keypoints"][2::3])
    if any(not a["id"] or isinstance(a["id"], str) for a in annotations):
        done.append("annotations are numbered from 1, as pycocotools needs it")
        for i, annotation in enumerate(annotations, start=1):
            annotation["id"] = i
    if done:
        logger.warning(f"Completed {os.path.basename(source)} in memory: {'; '.join(done)}.")
        coco.createIndex()


def _area(coco: COCO, annotation: dict) -> float:
    if annotation.get("segmentation"):
        return float(mask_util.area(coco.annToRLE(annotation)))
    return float(annotation["bbox"][2] * annotation["bbox"][3])
