import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import build_mask_head
from torch.nn import functional as F

from carafe_d2 import add_carafe_config
from carafe_d2.errors import UserError
from carafe_d2.upsample import UPSAMPLERS


def config(**keys):
    cfg = get_cfg()
    add_carafe_config(cfg)
    head = cfg.MODEL.ROI_MASK_HEAD
    head.NAME = "MaskRCNNCarafeUpsampleHead"
    head.NUM_CONV = 2
    head.CONV_DIM = 16
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    for key, value in keys.items():
        setattr(head, key, value)
    return cfg


def build(channels=16, **keys):
    return build_mask_head(config(**keys), ShapeSpec(channels=channels, height=14, width=14))


@pytest.mark.parametrize("upsample", UPSAMPLERS)
@pytest.mark.parametrize("rois", [0, 3])
def test_every_choice_puts_out_masks_of_twice_the_size(upsample, rois):
    head = build(UPSAMPLE=upsample)
    masks = head.layers(torch.randn(rois, 16, 14, 14))
    assert masks.shape == (rois, 5, 28, 28)
    masks.sum().backward()
    assert [name for name, p in head.named_parameters() if p.grad is None] == []


def test_carafe_head_has_no_relu_after_the_upsampler():
    """Convolutions with ReLU, CARAFE, 1x1 convolution, as in the published head."""
    head = build()
    x = expected = torch.randn(2, 16, 14, 14)
    for conv in (head.mask_fcn1, head.mask_fcn2):
        expected = F.relu(F.conv2d(expected, conv.weight, conv.bias, padding=1))
    expected = head.upsample(expected)
    expected = F.conv2d(expected, head.predictor.weight, head.predictor.bias)
    torch.testing.assert_close(head.layers(x), expected)


def test_deconv_is_the_stock_head():
    stock = build(NAME="MaskRCNNConvUpsampleHead")
    ours = build(UPSAMPLE="deconv")
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(2, 16, 14, 14)
    assert torch.equal(ours.layers(x), stock.layers(x))


def test_class_agnostic():
    cfg = config()
    cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK = True
    head = build_mask_head(cfg, ShapeSpec(channels=16, height=14, width=14))
    assert head.layers(torch.zeros(1, 16, 14, 14)).shape == (1, 1, 28, 28)


def test_head_without_convolutions():
    assert build(NUM_CONV=0).layers(torch.zeros(1, 16, 14, 14)).shape == (1, 5, 28, 28)
    with pytest.raises(UserError, match=r"MODEL.ROI_MASK_HEAD.CONV_DIM = 16 .* 24 channels"):
        build(channels=24, NUM_CONV=0)


def test_unknown_upsampler_is_named():
    with pytest.raises(UserError, match=r"MODEL.ROI_MASK_HEAD.UPSAMPLE .*'lanczos'"):
        build(UPSAMPLE="lanczos")
