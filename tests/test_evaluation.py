import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances, register_coco_panoptic_separated
from detectron2.evaluation import COCOEvaluator, SemSegEvaluator
from PIL import Image

from carafe_d2 import evaluation
from carafe_d2.errors import UserError
from carafe_d2.evaluation import build_evaluator, check_evaluators

HEIGHT, WIDTH = 40, 60


@pytest.fixture
def dataset(tmp_path):
    """A panoptic dataset of one image: grass below sky, and a disc, the only thing.

    Yields its name; beside "_separated" there are "_stuffonly" and "_instances".
    """
    semantic = np.ones((HEIGHT, WIDTH), np.uint8)  # 0 are things, 1 sky, 2 grass
    semantic[20:] = 2
    semantic[10:30, 10:30] = 0
    ids = np.choose(semantic, [3, 1, 2])
    for folder in ("images", "stuff", "panoptic"):
        (tmp_path / folder).mkdir()
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(tmp_path / "images/1.jpg")
    Image.fromarray(semantic).save(tmp_path / "stuff/1.png")
    rgb = np.stack([ids, np.zeros_like(ids), np.zeros_like(ids)], axis=2).astype(np.uint8)
    Image.fromarray(rgb).save(tmp_path / "panoptic/1.png")

    categories = [
        {"id": 10, "name": "disc", "isthing": 1},
        {"id": 20, "name": "sky", "isthing": 0},
        {"id": 30, "name": "grass", "isthing": 0},
    ]
    images = [{"id": 1, "file_name": "1.jpg", "height": HEIGHT, "width": WIDTH}]
    box = {"bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0}
    polygon = [[10, 10, 30, 10, 30, 30, 10, 30]]
    instances = {
        "images": images,
        "categories": categories[:1],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 10, "segmentation": polygon, **box}
        ],
    }
    segments = [
        {"id": i, "category_id": category, "iscrowd": 0, "area": int((ids == i).sum())}
        for i, category in ((1, 20), (2, 30), (3, 10))
    ]
    panoptic = {
        "images": images,
        "categories": categories,
        "annotations": [{"image_id": 1, "file_name": "1.png", "segments_info": segments}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    (tmp_path / "panoptic.json").write_text(json.dumps(panoptic))
    register_coco_panoptic_separated(
        "tiny",
        {
            "thing_classes": ["disc"],
            "thing_dataset_id_to_contiguous_id": {10: 0},
            "stuff_classes": ["things", "sky", "grass"],
            "stuff_dataset_id_to_contiguous_id": {0: 0, 20: 1, 30: 2},
        },
        str(tmp_path / "images"),
        str(tmp_path / "panoptic"),
        str(tmp_path / "panoptic.json"),
        str(tmp_path / "stuff"),
        str(tmp_path / "instances.json"),
    )
    register_coco_instances(
        "tiny_instances", {}, str(tmp_path / "instances.json"), str(tmp_path / "images")
    )
    yield "tiny"
    for name in ("tiny_separated", "tiny_stuffonly", "tiny_instances"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def evaluate(name, folder, output):
    evaluator = build_evaluator(name, str(folder))
    evaluator.reset()
    (record,) = DatasetCatalog.get(name)
    evaluator.process([record], [output])
    return evaluator.evaluate()


def scores(wrong_rows):
    """Scores of the truth, but for the upper rows, which are taken for grass."""
    truth = torch.ones(HEIGHT, WIDTH, dtype=torch.int64)
    truth[20:] = 2
    truth[10:30, 10:30] = 0
    truth[:wrong_rows] = 2
    return torch.nn.functional.one_hot(truth, 3).permute(2, 0, 1).float()


def test_semantic_segmentation(dataset, tmp_path):
    perfect = evaluate(f"{dataset}_stuffonly", tmp_path, {"sem_seg": scores(wrong_rows=0)})
    assert perfect["sem_seg"]["mIoU"] == pytest.approx(100)
    flawed = evaluate(f"{dataset}_stuffonly", tmp_path, {"sem_seg": scores(wrong_rows=5)})
    assert flawed["sem_seg"]["IoU-sky"] == pytest.approx(100 * 700 / 1000)
    assert flawed["sem_seg"]["IoU-grass"] == pytest.approx(100 * 1000 / 1300)


def test_panoptic_segmentation(dataset, tmp_path):
    pytest.importorskip("panopticapi")
    from detectron2.structures import Boxes, Instances

    instances = Instances((HEIGHT, WIDTH))
    instances.pred_boxes = Boxes(torch.tensor([[10.0, 10.0, 30.0, 30.0]]))
    instances.scores, instances.pred_classes = torch.tensor([0.9]), torch.tensor([0])
    instances.pred_masks = scores(0)[:1].bool()
    segments = [
        {"id": 1, "isthing": True, "category_id": 0},
        {"id": 2, "isthing": False, "category_id": 1},
        {"id": 3, "isthing": False, "category_id": 2},
    ]
    output = {
        "sem_seg": scores(0),
        "instances": instances,
        "panoptic_seg": (scores(0).argmax(0).int() + 1, segments),
    }
    results = evaluate(f"{dataset}_separated", tmp_path, output)
    assert results["panoptic_seg"]["PQ"] == pytest.approx(100)
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["sem_seg"]["mIoU"] == pytest.approx(100)


def test_evaluator_is_chosen_by_the_metadata(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "find_spec", lambda name: True)
    panoptic = build_evaluator(f"{dataset}_separated", str(tmp_path))
    assert len(panoptic._evaluators) == 3
    assert isinstance(build_evaluator(f"{dataset}_stuffonly", str(tmp_path)), SemSegEvaluator)
    assert isinstance(build_evaluator(f"{dataset}_instances", str(tmp_path)), COCOEvaluator)


def test_what_is_missing_is_named_before_the_evaluation(dataset, monkeypatch):
    monkeypatch.setattr(evaluation, "find_spec", lambda name: None)
    check_evaluators([f"{dataset}_instances", f"{dataset}_stuffonly"])
    with pytest.raises(UserError, match=r"'tiny_separated': .* needs panopticapi; .*pip install"):
        check_evaluators([f"{dataset}_separated"])


@pytest.mark.parametrize("kind", [None, "depth"])
def test_type_without_evaluator_is_named(dataset, kind):
    metadata = MetadataCatalog.get(f"{dataset}_stuffonly")
    del metadata.evaluator_type
    if kind:
        metadata.evaluator_type = kind
    with pytest.raises(UserError, match=f"'tiny_stuffonly': .* one of coco, .*, got {kind!r}"):
        check_evaluators([f"{dataset}_stuffonly"])
