"""Every mistake in a user's data is named with file and id before training starts."""

import copy
import json
import re

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from carafe_d2 import add_carafe_config
from carafe_d2.data.checks import check_data, complete_annotations
from carafe_d2.errors import UserError

NAME = "data_to_check"
SQUARE = [[2, 2, 12, 2, 12, 12, 2, 12]]
RLE = {"size": [20, 30], "counts": [0, 200, 400]}
GOOD = {
    "info": {},
    "images": [{"id": i, "file_name": f"{i}.png", "height": 20, "width": 30} for i in (1, 2)],
    "annotations": [
        {
            "id": 10 + i,
            "image_id": i,
            "category_id": category,
            "bbox": [2, 2, 10, 10],
            "area": 100,
            "iscrowd": 0,
            "segmentation": SQUARE,
        }
        for i, category in ((1, 7), (2, 3))
    ],
    "categories": [{"id": 7, "name": "cell"}, {"id": 3, "name": "debris"}],
}


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_carafe_config(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (NAME,), ()
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    return cfg


@pytest.fixture
def check(tmp_path, cfg):
    """Writes annotations and images, registers them, checks them; returns the error's lines."""

    def run(content: dict = GOOD, **images) -> list[str]:
        for image in content["images"]:
            picture = images.get(f"image{image.get('id')}", Image.new("RGB", (30, 20)))
            picture.save(tmp_path / image.get("file_name", "x.png"), **images.get("options", {}))
        (tmp_path / "a.json").write_text(json.dumps(content))
        register_coco_instances(NAME, {}, str(tmp_path / "a.json"), str(tmp_path))
        try:
            check_data(cfg)
        except UserError as error:
            return str(error).split("\n")
        return []

    yield run
    if NAME in DatasetCatalog:
        DatasetCatalog.remove(NAME)
    MetadataCatalog.pop(NAME, None)


def changed(path: str, value=None) -> dict:
    """The good annotations with one value set; None deletes it."""
    content = copy.deepcopy(GOOD)
    *nodes, key = [int(p) if p.isdigit() else p for p in path.split(".")]
    node = content
    for part in nodes:
        node = node[part]
    if value is None:
        del node[key]
    else:
        node[key] = value
    return content


@pytest.mark.parametrize("path", ["", "info", "annotations.0.area", "annotations.1.iscrowd"])
def test_good_data_pass_and_what_can_be_completed_is_no_mistake(check, path):
    assert check(changed(path) if path else GOOD) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("annotations.0.segmentation", None, "annotation 11 of 1.png: has no segmentation"),
        ("annotations.1.segmentation", [], "annotation 12 of 2.png: its segmentation is empty"),
        ("annotations.1.segmentation", RLE, "12 of 2.png: its segmentation is RLE; set INPUT.MASK"),
        ("annotations.0.segmentation", [[1, 1, 9, 9]], "three points or more, got 2"),
        ("annotations.0.segmentation", [*SQUARE, [1, 1, 9, 9]], "three points or more, got 2"),
        ("annotations.0.segmentation", [[1, 1, 9, 9, 3, 3, 4]], "three points or more, got 3.5"),
        ("annotations.0.segmentation", {**RLE, "size": [30, 20]}, "the size of its RLE is"),
        ("annotations.0.bbox", None, "11 of 1.png: its bbox must be four numbers, got None"),
        ("annotations.0.bbox", [1, 2, 3], "its bbox must be four numbers"),
        ("annotations.0.bbox", [1, 2, 3, float("nan")], "its bbox must be four numbers"),
        ("annotations.0.image_id", 5, "annotation 11: there is no image 5"),
        ("annotations.0.category_id", 1, "annotation 11: there is no category 1"),
        ("annotations.0.id", 12, "annotation 12: every annotation needs an id of its own"),
        ("annotations.0.id", None, r"annotation \(without an id\): every annotation needs an id"),
        ("annotations", None, "it has no annotations to train with"),
        ("images.0.height", None, "image 1: has no height"),
        ("images.0.id", 2, "image 2: has the id of another image"),
        ("images.0.height", 21, "1.png .id 1.: it has 30 x 20 pixels, but is annotated as 30 x 21"),
        ("categories", [{"id": 7, "name": "cell"}], "annotation 12: there is no category 3"),
    ],
)
def test_mistakes_are_named_with_file_and_id(check, path, value, message):
    lines = check(changed(path, value))
    assert lines and lines[0].startswith(f"dataset '{NAME}', ")
    assert any(re.search(message, line) for line in lines), lines


def test_every_mistake_has_its_line_and_many_are_counted(check):
    content = copy.deepcopy(GOOD)
    content["annotations"] = [
        {**GOOD["annotations"][0], "id": i, "segmentation": []} for i in range(1, 15)
    ]
    lines = check(content)
    assert [line.split(" of ")[0].split()[-1] for line in lines[1:10]] == [*map(str, range(2, 11))]
    assert lines[-1].strip() == "and 4 more"


def test_classes_are_counted(check, cfg):
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    assert "there are 2; set MODEL.ROI_HEADS.NUM_CLASSES to that" in check()[0]


def test_keypoints_are_held_to_the_config(check, cfg):
    cfg.MODEL.KEYPOINT_ON = True
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 3
    lines = check(changed("annotations.0.keypoints", [1, 1, 2, 3, 3, 2]))
    assert "annotation 11 of 1.png: has 2 keypoints, but MODEL.ROI_KEYPOINT_HEAD" in lines[0]
    DatasetCatalog.remove(NAME)
    lines = check(changed("annotations.0.keypoints", [1, 1, 2, 3, 3, 2, 5, 5, 2]))
    assert "TEST.KEYPOINT_OKS_SIGMAS must have as many numbers, got 0" in lines[0]
    assert "keypoint_flip_map" in lines[1]


def test_images_that_would_be_misread_are_named(check):
    deep = Image.fromarray(np.full((20, 30), 3000, np.uint16))
    (line,) = check(image1=deep)
    assert "1.png (id 1): its pixels have mode I;16, which Detectron2 would clip to white" in line


def test_exif_rotation_counts(check):
    exif = Image.Exif()
    exif[0x0112] = 6
    (first, _) = check(options={"exif": exif.tobytes()})
    assert "20 x 30 pixels after the rotation 6 of its EXIF data, but is annotated as 30" in first


def test_registered_functions_are_checked_too(check, cfg, tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "1.png")
    annotation = {"bbox": [2, 2, 12, 12], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    record = {"file_name": str(tmp_path / "1.png"), "image_id": 1, "height": 20, "width": 30}
    DatasetCatalog.register(NAME, lambda: [{**record, "annotations": [annotation]}])
    MetadataCatalog.get(NAME).thing_classes = ["a", "b"]
    with pytest.raises(UserError, match=r"1.png, annotation 0: has no segmentation"):
        check_data(cfg)


def test_completed_annotations_evaluate_like_whole_ones(tmp_path):
    incomplete = copy.deepcopy(GOOD)
    del incomplete["info"]
    for i, annotation in enumerate(incomplete["annotations"]):
        del annotation["area"], annotation["iscrowd"]
        annotation["id"] = i  # pycocotools takes the id 0 for no match
    (tmp_path / "a.json").write_text(json.dumps(incomplete))
    coco = COCO(str(tmp_path / "a.json"))
    complete_annotations(coco, "a.json")
    detections = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "score": 1, "bbox": a["bbox"]}
        for a in GOOD["annotations"]
    ]
    evaluation = COCOeval(coco, coco.loadRes(detections), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)
    assert [a["area"] for a in coco.dataset["annotations"]] == [100, 100]
