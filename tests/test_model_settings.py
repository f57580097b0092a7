"""What the weights do not show of the model that they were trained for."""

import pytest
from detectron2.data import MetadataCatalog

from carafe_d2.config import default_config
from carafe_d2.errors import UserError
from carafe_d2.model_settings import ModelSettings


@pytest.fixture
def dataset():
    name = "dataset_of_test_model_settings"
    MetadataCatalog.get(name).thing_classes = ["cat", "dog", "horse"]
    yield name
    MetadataCatalog.remove(name)


def saved(*overrides, datasets=()):
    cfg = default_config()
    cfg.merge_from_list([*overrides])
    return ModelSettings(cfg, datasets).state_dict()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.FPN.UPSAMPLE", "bilinear"),
        ("MODEL.UPERNET.PPM_UPSAMPLE", "bilinear"),
        ("MODEL.CARAFE.ENCODER_DILATION", 2),
        ("MODEL.FPN.DOWNSAMPLE", "carafe"),
        ("MODEL.CARAFE_DOWNSAMPLE.ENCODER_DILATION", 2),
        ("MODEL.PIXEL_STD", [57.375, 57.12, 58.395]),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32]]),
        ("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (1.0, 1.0, 1.0, 1.0)),
    ],
)
def test_other_settings_are_named(key, value):
    with pytest.raises(UserError, match=f"{key} is .* but the weights were trained with"):
        ModelSettings(default_config(), ()).load_state_dict(saved(key, value))


@pytest.mark.parametrize(
    "override",
    [
        ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.3),
        ("MODEL.RPN.POST_NMS_TOPK_TEST", 300),
        ("MODEL.DEVICE", "cpu"),
        ("MODEL.RESNETS.NORM", "BN"),
        ("MODEL.PIXEL_STD", (1.0, 1.0, 1.0)),  # the default, which is a list
    ],
)
def test_what_an_evaluation_may_choose_is_not_compared(override):
    ModelSettings(default_config(), ()).load_state_dict(saved(*override))


@pytest.mark.parametrize(
    ("classes", "refused"),
    [
        (["dog", "cat", "horse"], True),
        (["cat", "hound", "horse"], False),
        (["cat", "dog", "horse"], False),
        (None, False),
    ],
)
def test_order_of_classes(classes, refused, dataset):
    settings = ModelSettings(default_config(), [dataset])
    state = {**saved(), "classes": classes}
    if not refused:
        settings.load_state_dict(state)
        return
    with pytest.raises(UserError, match=r"its class 0 is 'cat', which is class 1 of the weights"):
        settings.load_state_dict(state)
