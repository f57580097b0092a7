import cv2
import pytest

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


def test_wrong_options_are_named(capsys):
    with pytest.raises(SystemExit) as exit:
        visualize_data.main(["--config-file", CONFIG, "--images", "0"])
    assert exit.value.code == "error: --images and --columns must be at least 1"
