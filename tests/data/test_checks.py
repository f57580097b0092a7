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
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from carafe_d2 import add_carafe_config
from carafe_d2.data.checks import _runs, check_data, complete_annotations
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
            check_data(cfg, training=bool(cfg.DATASETS.TRAIN))
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


def test_one_of_several_polygons_may_be_a_line_in_training_only(check, cfg):
    content = changed("annotations.0.segmentation", [[], [1, 1, 9, 9], *SQUARE])
    assert check(content) == []
    DatasetCatalog.remove(NAME)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), (NAME,)
    assert "three points or more, got 0" in check(content)[0]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("annotations.0.segmentation", None, "annotation 11 of 1.png: has no segmentation"),
        ("annotations.1.segmentation", [], "annotation 12 of 2.png: its segmentation is empty"),
        ("annotations.1.segmentation", RLE, "12 of 2.png: its segmentation is RLE; set INPUT.MASK"),
        ("annotations.0.segmentation", [[1, 1, 9, 9]], "three points or more, got 2"),
        ("annotations.0.segmentation", [[1, 1, 9, 9, 3, 3, 4]], "three points or more, got 3.5"),
        ("annotations.0.segmentation", {**RLE, "size": [30, 20]}, "the size of its RLE is"),
        ("annotations.0.bbox", None, "11 of 1.png: its bbox must be four numbers, got None"),
        ("annotations.0.bbox", [1, 2, 3], "its bbox must be four numbers"),
        ("annotations.0.bbox", [1, 2, 3, float("nan")], "its bbox must be four numbers"),
        ("annotations.0.bbox", ["1", "2", "3", "4"], "its bbox must be four numbers"),
        ("annotations.0.bbox", {"x": 1, "y": 2}, "its bbox must be four numbers"),
        ("annotations.0.bbox", [1, 2, 3, 4, 0], "its bbox must be four numbers"),
        ("annotations.0.bbox", [9, 9, -3, 4], r"11 of 1.png: its bbox \(9, 9, -3, 4\) has a neg"),
        ("annotations.0.bbox", [30, 0, 5, 5], "11 of 1.png: its bbox .* lies outside the image"),
        ("annotations.0.bbox", [2, 2, 12, 12], "11 of 1.png: its bbox .* seems to be x1, y1, x2"),
        ("annotations.0.segmentation", [1, 1, 9, 1, 9, 9], "must be a list of numbers x, y"),
        ("annotations.0.segmentation", [[1, 1, 9, 1, 9, float("nan")]], "must be a list of num"),
        ("annotations.0.segmentation", "none", "must be polygons or RLE, got str"),
        ("annotations.0.segmentation", {**RLE, "counts": [0, 200]}, "make 200 pixels, the image"),
        ("annotations.0.segmentation", {**RLE, "counts": [0, -1, 601]}, "no counts that pycoco"),
        ("annotations.0.segmentation", {**RLE, "counts": "0X6"}, "make 200 pixels, the image"),
        ("annotations.0.segmentation", {**RLE, "counts": "a b"}, "no counts that pycocotools"),
        ("annotations.0.iscrowd", "0", "its iscrowd must be 0 or 1, got '0'"),
        ("annotations.0.area", "100", "its area must be a positive number, got '100'"),
        ("annotations.0.ignore", 1, "does not know its key ignore"),
        ("annotations.0.image_id", "1", "annotation 11: there is no image '1'"),
        ("annotations.0.category_id", [7], "11 of 1.png: there is no category .7."),
        ("annotations", [], "it has no annotations to train with"),
        ("annotations", {}, "it has no list of annotations"),
        ("annotations.0", "x", "annotation number 0: expected names and values"),
        ("images.0.id", "1", "image 2: ids must be all numbers or all text"),
        ("images.0.width", 30.0, "image 1: its width must be a positive whole number, got 30.0"),
        ("categories.0.id", 3, "category 3: every category needs an id of its own"),
        ("categories.0.name", 5, "category 7: its name must be text, got 5"),
        ("annotations.0.image_id", 5, "annotation 11: there is no image 5"),
        ("annotations.0.category_id", 1, "11 of 1.png: there is no category 1"),
        ("annotations.0.id", 12, "annotation 12: every annotation needs an id of its own"),
        ("annotations.0.id", None, r"annotation \(without an id\): needs an id"),
        ("annotations", None, "it has no annotations to train with"),
        ("images.0.height", None, "image 1: has no height"),
        ("images.0.id", 2, "image 2: every image needs an id of its own"),
        ("images.0.height", 21, "1.png .id 1.: it has 30 x 20 pixels, but is annotated as 30 x 21"),
        ("categories", [{"id": 7, "name": "cell"}], "12 of 2.png: there is no category 3"),
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


def test_boxes_that_may_be_meant_are_said_once(check, caplog):
    content = changed("annotations.0.bbox", [2, 2, 0, 10])
    content["annotations"][1]["bbox"] = [2, 2, 10, 19.5]
    assert check(content) == []
    assert "1 boxes have no width or height; training leaves them out" in caplog.text
    assert "1 boxes reach out of their images; training cuts them off" in caplog.text


@pytest.mark.parametrize("as_corners", [True, False])
def test_boxes_without_masks_show_their_form_together(check, cfg, as_corners):
    cfg.MODEL.MASK_ON = False
    content = copy.deepcopy(GOOD)
    for i, annotation in enumerate(content["annotations"]):
        del annotation["segmentation"]
        x, y, width, height = 16 + i, 2, 12, 17
        corners = [x, y, x + width, y + height]
        annotation["bbox"] = corners if as_corners else [x / 30, y / 20, width / 30, height / 20]
    problem = "seems to be x1, y1, x2, y2" if as_corners else "is in fractions of the image"
    assert [problem in line for line in check(content)] == [True, True]


@pytest.mark.parametrize("counts", [[0, 200, 400], [3, 1, 596], [600]])
def test_compressed_runs_are_read_as_pycocotools_writes_them(counts):
    rle = mask_util.frPyObjects({**RLE, "counts": counts}, 20, 30)
    assert _runs(rle["counts"]).tolist() == counts
    mask = np.random.default_rng(0).integers(0, 2, (200, 300), np.uint8)
    mask[:, :150] = 0
    assert _runs(mask_util.encode(np.asfortranarray(mask))["counts"]).sum() == 200 * 300


def test_test_set_has_the_classes_of_the_training_set_in_their_order(check, cfg, tmp_path):
    cfg.DATASETS.TEST = ("other_classes",)
    content = changed("categories.0.name", "debris")
    content["categories"][1]["name"] = "cell"
    (tmp_path / "b.json").write_text(json.dumps(content))
    register_coco_instances("other_classes", {}, str(tmp_path / "b.json"), str(tmp_path))
    try:
        (line,) = check()
    finally:
        DatasetCatalog.remove("other_classes")
        MetadataCatalog.remove("other_classes")
    assert line.startswith("dataset 'other_classes': its class 0 is 'cell', which is class 1 of ")


def test_classes_are_counted(check, cfg):
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    assert "there are 2; set MODEL.ROI_HEADS.NUM_CLASSES to that" in check()[0]


def test_keypoints_are_held_to_the_config(check, cfg):
    cfg.MODEL.KEYPOINT_ON = True
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 3
    lines = check(changed("annotations.0.keypoints", [1, 1, 2, 3, 3, 2]))
    assert "annotation 11 of 1.png: has 2 keypoints, but MODEL.ROI_KEYPOINT_HEAD" in lines[0]
    DatasetCatalog.remove(NAME)
    content = changed("annotations.0.keypoints", [1, 1, 2, 3, 3, 2, 5, 5, 2])
    lines = check(content)
    assert "annotation 12 of 2.png: its keypoints must be a list of numbers" in lines[0]
    DatasetCatalog.remove(NAME)
    content["annotations"][1]["keypoints"] = [0] * 9
    lines = check(content)
    assert "TEST.KEYPOINT_OKS_SIGMAS must have as many numbers, got 0" in lines[0]
    assert "keypoint_flip_map" in lines[1]


def test_images_that_would_be_misread_are_named(check):
    deep = Image.fromarray(np.full((20, 30), 3000, np.uint16))
    (line,) = check(image1=deep)
    assert "1.png (id 1): its pixels have mode I;16, which Detectron2 would clip to white" in line


def test_every_image_has_to_be_there_and_sampled_ones_to_decode(check, tmp_path, monkeypatch):
    monkeypatch.setattr("carafe_d2.data.checks._IMAGES", 1)

    class Truncated:
        def save(self, path):
            noise = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
            Image.fromarray(noise).save(path, "JPEG")
            path.write_bytes(path.read_bytes()[:-300])

    class Missing:
        def save(self, path):
            pass

    lines = check(image1=Truncated(), image2=Missing())
    assert "2.png (id 2): there is no such file" in lines[0]
    assert "1.png (id 1): image file is truncated" in lines[1]


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 2}, "annotation 0: its category_id must be from 0 to 1, got 2"),
        ({"bbox_mode": BoxMode.XYXY_REL}, "annotation 0: has no bbox_mode that Detectron2 trains"),
        ({"bbox": [12, 2, 2, 12]}, r"annotation 0: its bbox \(12, 2, -10, 10\) has a negative"),
        ({"segmentation": np.ones((20, 30))}, "must be polygons or RLE, got ndarray"),
        ({"segmentation": RLE}, "no counts that pycocotools reads"),
    ],
)
def test_records_of_functions_are_checked_for_what_the_end_needs(change, message, cfg, tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "1.png")
    annotation = {
        "bbox": [2, 2, 12, 12],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": 0,
        "segmentation": SQUARE,
    }
    good = {"file_name": str(tmp_path / "1.png"), "image_id": 1, "height": 20, "width": 30}
    cfg.DATASETS.TEST = (NAME,)
    cfg.INPUT.MASK_FORMAT = "bitmask"
    records = [{**good, "annotations": [annotation]}]
    DatasetCatalog.register(NAME, lambda: records)
    try:
        with pytest.raises(UserError, match="its metadata need thing_classes"):
            MetadataCatalog.get(NAME).evaluator_type = "coco"
            check_data(cfg)
        MetadataCatalog.get(NAME).thing_classes = ["a", "b"]
        check_data(cfg)
        records[0]["annotations"] = [annotation | change]
        with pytest.raises(UserError, match=f"1.png, {message}" if "ann" in message else message):
            check_data(cfg)
        del records[0]["image_id"]
        with pytest.raises(UserError, match="has no image_id"):
            check_data(cfg)
    finally:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.pop(NAME, None)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full((20, 30), 2, np.uint8), "it has the label 2, but MODEL.SEM_SEG_HEAD.NUM_CLASSES"),
        (np.zeros((30, 20), np.uint8), "it has 20 x 30 pixels, but its image 30 x 20"),
        (np.zeros((20, 30, 3), np.uint8), "its pixels have mode RGB"),
        (np.full((20, 30), 255, np.uint8), None),
    ],
)
def test_labels_of_semantic_segmentation_are_checked(labels, message, cfg, tmp_path):
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = "SemanticSegmentor", 2
    cfg.MODEL.MASK_ON, cfg.DATASETS.TEST = False, (NAME,)
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg")
    Image.fromarray(labels).save(tmp_path / "a.png")
    record = {"file_name": str(tmp_path / "a.jpg"), "sem_seg_file_name": str(tmp_path / "a.png")}
    records = [record]
    DatasetCatalog.register(NAME, lambda: records)
    meta = {"evaluator_type": "sem_seg", "stuff_classes": ["a", "b"], "ignore_label": 255}
    MetadataCatalog.get(NAME).set(**meta)
    try:
        if message:
            with pytest.raises(UserError, match=f"labels .*a.png: {message}"):
                check_data(cfg)
        else:
            check_data(cfg)
            (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes())
            records.append({**record, "file_name": str(tmp_path / "b.jpg")})
            with pytest.raises(UserError, match=r"b.jpg: its labels would be .*a.png"):
                check_data(cfg)
    finally:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.pop(NAME, None)


def test_completed_annotations_evaluate_like_whole_ones(tmp_path):
    incomplete = copy.deepcopy(GOOD)
    del incomplete["info"]
    for i, annotation in enumerate(incomplete["annotations"]):
        del annotation["area"], annotation["iscrowd"]
        annotation["id"] = i  # pycocotools takes the id 0 for no match
    incomplete["annotations"][0] |= {"area": 0, "iscrowd": None, "keypoints": [1, 1, 2, 0, 0, 0]}
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
    assert coco.dataset["annotations"][0]["num_keypoints"] == 1


def test_ids_that_are_text_become_numbers(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(changed("annotations.0.id", "first")))
    coco = COCO(str(tmp_path / "a.json"))
    complete_annotations(coco, "a.json")
    assert sorted(coco.anns) == [1, 2]
