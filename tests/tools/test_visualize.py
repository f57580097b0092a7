"""tools/visualize.py: ground truth and predictions of a small `shapes` dataset side by side."""

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.visualizer import Visualizer

from carafe_d2 import inference
from carafe_d2.config import load_config
from carafe_d2.data import register_shapes, shapes
from tools import visualize

CONFIG = "shapes_mask_rcnn_R18_FPN_carafe.yaml"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:pycocotools")
OPTS = ["MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", "64"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights beside a small dataset, which is registered as `shapes_val` for the time."""
    folder = tmp_path_factory.mktemp("visualize")
    shapes.main(["--root", str(folder), "--train", "1", "--val", "3", "--size", "64"])
    torch.manual_seed(0)
    path = folder / "model.pth"
    torch.save({"model": build_model(load_config(CONFIG, OPTS)).state_dict()}, path)
    register_shapes(folder)
    yield str(path)
    register_shapes()


@pytest.fixture
def run(weights, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*options, keys=()):
        always = ["--config-file", CONFIG, "--width", "100"]
        visualize.main([*always, *options, *OPTS, "MODEL.WEIGHTS", weights, *keys])

    return run


def test_ground_truth_is_left_and_predictions_are_right(weights):
    cfg = load_config(CONFIG, [*OPTS, "MODEL.WEIGHTS", weights])
    predictor = inference.Predictor(cfg)
    record = DatasetCatalog.get("shapes_val")[0]

    def draw(threshold):
        np.random.seed(0)  # of the visualizer's colors
        return visualize.draw_pair(predictor, record, threshold, width=100)

    image = inference.read_image(record["file_name"])
    np.random.seed(0)
    predictor([image])  # takes random numbers, too
    metadata = MetadataCatalog.get("shapes_val")
    truth = Visualizer(image, metadata, scale=100 / 64).draw_dataset_dict(record).get_image()
    nothing, everything = draw(threshold=1.0), draw(threshold=0.0)
    for pair in (nothing, everything):
        assert pair.shape == (128, 208, 3)
        np.testing.assert_array_equal(pair[28:, :100], truth)
    plain = cv2.resize(image, (100, 100)).astype(int)
    # Labels are black and white; without any, there is but the image.
    assert np.abs(nothing[28:, 108:] - plain).mean() < 3
    assert np.abs(everything[28:, 108:] - plain).mean() > 10


def test_program_draws_a_sheet_of_pairs(run, tmp_path, capsys):
    run("--images", "3", "--columns", "2", "--output", "new/sheet.png")
    assert capsys.readouterr().out.endswith("3 images drawn to new/sheet.png\n")
    sheet = cv2.imread(str(tmp_path / "new" / "sheet.png"))
    assert sheet.shape == (2 * (128 + 8), 2 * (208 + 24) - 24, 3)
    filled = [sheet[y : y + 128, x : x + 208].std() > 10 for y in (0, 136) for x in (0, 232)]
    assert filled == [True, True, True, False]


@pytest.mark.parametrize(
    ("arguments", "keys", "message"),
    [
        (["--images", "0"], [], "--images must be at least 1, got 0"),
        (["--dataset", "nonsense"], [], "dataset 'nonsense' .* is not registered"),
        (["--output", "model.nonsense"], [], r"cannot write model\.nonsense: name it \.png"),
        ([], ["DATASETS.TEST", "()"], "DATASETS.TEST is empty; name a dataset with --dataset"),
        ([], ["MODEL.WEIGHTS", ""], "MODEL.WEIGHTS is empty"),
    ],
)
def test_mistakes_get_one_clear_line(run, tmp_path, arguments, keys, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run(*arguments, keys=keys)
    assert list(tmp_path.iterdir()) == []
