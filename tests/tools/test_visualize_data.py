import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from carafe_d2.data import register_shapes
from tools import visualize_data

CONFIG = "shapes_mask_rcnn_R18_FPN_carafe.yaml"


@pytest.mark.parametrize(("options", "side"), [([], 64), (["--augmented"], 96)])
def test_draws_the_dataset(options, side, make_shapes, monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(make_shapes(train=4, val=2)))
    register_shapes()
    picture = tmp_path / "data.png"
    keys = ["INPUT.MIN_SIZE_TRAIN", "(96,)", "SOLVER.IMS_PER_BATCH", "2"]
    options = ["--images", "3", "--columns", "2", "--output", str(picture), *options]
    visualize_data.main(["--config-file", CONFIG, *options, *keys])
    assert cv2.imread(str(picture)).shape == (2 * (side + 8), 2 * side + 24, 3)
    monkeypatch.undo()
    register_shapes()


@pytest.mark.parametrize("options", [[], ["--augmented"]])
def test_draws_labels_of_semantic_segmentation(options, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    record = {"file_name": "image.png", "sem_seg_file_name": "labels.png"}
    image = np.full((64, 64, 3), 200, np.uint8)
    cv2.imwrite("image.png", image)
    cv2.imwrite("labels.png", np.eye(64, dtype=np.uint8))
    DatasetCatalog.register("labels_to_draw", lambda: [record])
    MetadataCatalog.get("labels_to_draw").set(evaluator_type="sem_seg", stuff_classes=["a", "b"])
    train = ["DATASETS.TRAIN", "('labels_to_draw',)", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "2"]
    size = [
        "INPUT.MIN_SIZE_TRAIN",
        "(64,)",
        "SOLVER.IMS_PER_BATCH",
        "1",
        "DATALOADER.NUM_WORKERS",
        "0",
    ]
    test = ["DATASETS.TEST", "('not_there_yet',)"]
    config = ["--config-file", "semantic_R50_FPN_carafe_1x.yaml", "--images", "1"]
    try:
        visualize_data.main([*config, *options, *train, *size, *test])
    finally:
        DatasetCatalog.remove("labels_to_draw")
        MetadataCatalog.remove("labels_to_draw")
    assert (cv2.imread("data.png")[:64, :64] != image).any()


def test_wrong_options_are_named(capsys):
    with pytest.raises(SystemExit) as exit:
        visualize_data.main(["--config-file", CONFIG, "--images", "0"])
    assert exit.value.code == "error: --images and --columns must be at least 1"
