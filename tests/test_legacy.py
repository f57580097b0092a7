import pytest
import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from torch import nn

from carafe_d2.legacy import LegacyRCNN

ORIGINAL = (100, 150)
RESIZED = (250, 375)
BOXES = torch.tensor([[10.0, 20.0, 71.0, 92.0], [0.0, 0.0, 150.0, 100.0], [5.0, 5.0, 6.0, 6.0]])


@pytest.fixture
def model(monkeypatch):
    """A detector whose losses are its targets and whose predictions are those in its input."""
    monkeypatch.setattr(
        GeneralizedRCNN, "forward", lambda self, inputs: [x["instances"] for x in inputs]
    )
    monkeypatch.setattr(
        GeneralizedRCNN,
        "inference",
        lambda self, inputs, detected, do_postprocess: [x["instances"] for x in inputs],
    )
    model = LegacyRCNN.__new__(LegacyRCNN)
    nn.Module.__init__(model)
    return model


def image_with(instances):
    return {
        "image": torch.zeros(3, *RESIZED),
        "height": ORIGINAL[0],
        "width": ORIGINAL[1],
        "instances": instances,
    }


def targets(model, boxes):
    """The targets of the boxes (N, 4) in the original image, at the size of the network's input."""
    instances = Instances(RESIZED, gt_boxes=Boxes(boxes * 2.5), gt_classes=torch.arange(len(boxes)))
    return model([image_with(instances)])[0]


def test_targets_are_resized_by_their_first_and_last_pixel(model):
    resized = targets(model, BOXES)
    first, last = BOXES[:, :2] * 2.5, (BOXES[:, 2:] - 1) * 2.5
    torch.testing.assert_close(resized.gt_boxes.tensor, torch.cat([first, last + 1], 1))


def test_the_callers_instances_are_left_alone(model):
    instances = Instances(RESIZED, gt_boxes=Boxes(BOXES * 2.5))
    model([image_with(instances)])
    torch.testing.assert_close(instances.gt_boxes.tensor, BOXES * 2.5)


def test_boxes_far_below_a_pixel_are_no_targets(model):
    tiny = torch.tensor([[30.0, 30.0, 30.5, 40.0]])
    resized = targets(model, torch.cat([BOXES[:1], tiny, BOXES[1:2]]))
    assert resized.gt_classes.tolist() == [0, 2]


def test_predicted_targets_are_the_original_boxes(model):
    boxes = targets(model, BOXES).gt_boxes
    results = Instances(RESIZED, pred_boxes=boxes, scores=torch.ones(3))
    predicted = model.inference([image_with(results)])[0]["instances"]
    assert predicted.image_size == ORIGINAL
    torch.testing.assert_close(predicted.pred_boxes.tensor, BOXES)
    assert predicted.scores.tolist() == [1, 1, 1]


def test_masks_cover_whole_pixels(model):
    masks = torch.ones(3, 1, 28, 28)
    masks[0, 0, :14] = 0
    results = Instances(RESIZED, pred_boxes=targets(model, BOXES).gt_boxes, pred_masks=masks)
    predicted = model.inference([image_with(results)])[0]["instances"].pred_masks
    assert predicted.dtype == torch.bool
    expected = torch.zeros(3, *ORIGINAL, dtype=torch.bool)
    expected[0, 56:92, 10:71] = True
    expected[1] = True
    expected[2, 5, 5] = True
    assert torch.equal(predicted, expected)


def test_no_predictions(model):
    results = Instances(RESIZED, pred_boxes=Boxes(torch.zeros(0, 4)))
    results.pred_masks = torch.zeros(0, 1, 28, 28)
    predicted = model.inference([image_with(results)])[0]["instances"]
    assert len(predicted) == 0
    assert predicted.pred_masks.shape == (0, *ORIGINAL)


def test_without_an_output_size_the_inputs_is_kept(model):
    results = Instances(RESIZED, pred_boxes=Boxes(BOXES))
    predicted = model.inference([{"image": torch.zeros(3, *RESIZED), "instances": results}])[0]
    assert predicted["instances"].image_size == RESIZED
    torch.testing.assert_close(predicted["instances"].pred_boxes.tensor, BOXES)


def test_raw_results_stay_as_the_network_gave_them(model):
    results = Instances(RESIZED, pred_boxes=Boxes(BOXES))
    assert model.inference([image_with(results)], do_postprocess=False) == [results]
