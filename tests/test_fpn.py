import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone import FPN, Backbone
from torch import nn
from torch.nn import functional as F

from carafe_d2 import CARAFEDownsamplePack, CarafeFPN, CarafePAFPN, add_carafe_config
from carafe_d2.errors import UserError
from carafe_d2.upsample import UPSAMPLERS

CHANNELS = {"res2": 4, "res3": 6, "res4": 8, "res5": 10}


class PooledImage(Backbone):
    """A bottom-up network without parameters: channels of the average-pooled image."""

    def forward(self, x):
        return {
            name: F.avg_pool2d(x, 2**i, ceil_mode=True)[:, : CHANNELS[name]]
            for i, name in enumerate(CHANNELS, start=2)
        }

    def output_shape(self):
        return {
            name: ShapeSpec(channels=CHANNELS[name], stride=2**i)
            for i, name in enumerate(CHANNELS, start=2)
        }


def build(**options):
    return CarafeFPN(PooledImage(), list(CHANNELS), 12, **options)


def forward_conv(layer, x, stride=1):
    padding = layer.kernel_size[0] // 2
    return F.conv2d(x, layer.weight, layer.bias, stride=stride, padding=padding)


def published_pyramid(fpn: CarafeFPN, x: torch.Tensor) -> list[torch.Tensor]:
    """The pyramid of the published models, written out level by level."""
    c2, c3, c4, c5 = fpn.bottom_up(x).values()
    l6 = F.conv2d(c5, fpn.fpn_lateral6.weight, fpn.fpn_lateral6.bias, stride=2, padding=1)
    laterals = []
    for i, c in enumerate((c2, c3, c4, c5), start=2):
        conv = getattr(fpn, f"fpn_lateral{i}")
        laterals.append(F.conv2d(c, conv.weight, conv.bias))
    laterals.append(l6)
    for i in (3, 2, 1, 0):
        height, width = laterals[i].shape[-2:]
        upsampled = getattr(fpn, f"fpn_upsample{i + 2}")(laterals[i + 1])
        laterals[i] = laterals[i] + upsampled[:, :, :height, :width]
    outputs = []
    for i, lateral in enumerate(laterals, start=2):
        conv = getattr(fpn, f"fpn_output{i}")
        outputs.append(F.conv2d(lateral, conv.weight, conv.bias, padding=1))
    return outputs


@pytest.mark.parametrize("upsampler", UPSAMPLERS)
@pytest.mark.parametrize("size", [(64, 128), (72, 100)], ids=["divisible", "cropped"])
def test_equals_the_published_pyramid(upsampler, size):
    torch.manual_seed(0)
    fpn = build(upsampler={"name": upsampler})
    x = torch.randn(2, 10, *size)
    outputs = fpn(x)
    assert list(outputs) == ["p2", "p3", "p4", "p5", "p6"]
    for ours, published in zip(outputs.values(), published_pyramid(fpn, x), strict=True):
        torch.testing.assert_close(ours, published)


def test_shapes_and_size_divisibility():
    fpn = build()
    assert fpn.size_divisibility == 64
    shapes = fpn.output_shape()
    assert [(name, s.stride, s.channels) for name, s in shapes.items()] == [
        (f"p{i}", 2**i, 12) for i in (2, 3, 4, 5, 6)
    ]
    for name, p in fpn(torch.zeros(1, 10, 64, 128)).items():
        assert p.shape == (1, 12, 64 // shapes[name].stride, 128 // shapes[name].stride)


def test_every_parameter_gets_a_gradient():
    fpn = build(num_extra_levels=2)
    sum(p.square().sum() for p in fpn(torch.randn(1, 10, 128, 128)).values()).backward()
    assert [name for name, p in fpn.named_parameters() if p.grad is None] == []


def test_initialization_is_xavier_uniform_with_zero_biases():
    weight = CarafeFPN(PooledImage(), list(CHANNELS), 256).fpn_output3.weight
    bound = (6 / (2 * 256 * 9)) ** 0.5
    assert 0.99 * bound < weight.abs().max() <= bound
    assert not build().fpn_lateral6.bias.any()


@pytest.mark.parametrize("size", [(64, 128), (72, 100)], ids=["divisible", "cropped"])
def test_extra_levels_with_carafe_are_reassembled_then_convolved(size):
    torch.manual_seed(0)
    fpn = build(num_extra_levels=2, downsampler={"down_kernel": 3})
    x = torch.randn(2, 10, *size)
    l6 = forward_conv(fpn.fpn_lateral6, fpn.fpn_downsample6(fpn.bottom_up(x)["res5"]))
    l7 = forward_conv(fpn.fpn_lateral7, fpn.fpn_downsample7(l6))
    outputs, strided = fpn(x), build(num_extra_levels=2)
    torch.testing.assert_close(outputs["p7"], forward_conv(fpn.fpn_output7, l7))
    assert [p.shape for p in outputs.values()] == [p.shape for p in strided(x).values()]
    missing, unexpected = fpn.load_state_dict(strided.state_dict(), strict=False)
    assert unexpected == []
    assert {name.split(".")[0] for name in missing} == {"fpn_downsample6", "fpn_downsample7"}


@pytest.mark.parametrize("downsampler", [None, {"compressed_channels": 4}], ids=["conv", "carafe"])
@pytest.mark.parametrize("size", [(64, 128), (72, 100)], ids=["divisible", "cropped"])
def test_bottom_up_path_adds_what_is_downsampled(size, downsampler):
    torch.manual_seed(0)
    fpn = CarafePAFPN(PooledImage(), list(CHANNELS), 12, downsampler=downsampler)
    x = torch.randn(2, 10, *size)
    top_down = CarafeFPN.forward(fpn, x)
    levels = [path := top_down["p2"]]
    for i in (3, 4, 5, 6):
        down = fpn.get_submodule(f"pafpn_downsample{i}")
        smaller = forward_conv(down, path, stride=2) if downsampler is None else down(path)
        path = top_down[f"p{i}"] + smaller
        levels.append(forward_conv(fpn.get_submodule(f"pafpn_output{i}"), path))
    outputs = fpn(x)
    assert list(outputs) == ["p2", "p3", "p4", "p5", "p6"]
    for ours, expected in zip(outputs.values(), levels, strict=True):
        torch.testing.assert_close(ours, expected)
    sum(p.square().sum() for p in outputs.values()).backward()
    assert [name for name, p in fpn.named_parameters() if p.grad is None] == []


def test_average_fusion():
    fpn = build(upsampler={"name": "nearest"}, num_extra_levels=0, fuse_type="avg")
    x = torch.randn(1, 10, 32, 32)
    c4, c5 = list(fpn.bottom_up(x).values())[2:]
    merged = (fpn.fpn_lateral4(c4) + F.interpolate(fpn.fpn_lateral5(c5), scale_factor=2)) / 2
    torch.testing.assert_close(fpn(x)["p4"], fpn.fpn_output4(merged))


def test_weights_of_detectron2s_pyramid_load():
    stock = FPN(PooledImage(), list(CHANNELS), 12)
    missing, unexpected = build().load_state_dict(stock.state_dict(), strict=False)
    assert unexpected == []
    upsamplers = {f"fpn_upsample{level}" for level in (2, 3, 4, 5)}
    assert {n.split(".")[0] for n in missing} == {"fpn_lateral6", "fpn_output6", *upsamplers}


@pytest.mark.parametrize(("norm", "layer"), [("BN", nn.BatchNorm2d), ("GN", nn.GroupNorm)])
def test_normalization_replaces_biases(norm, layer):
    fpn = CarafeFPN(PooledImage(), list(CHANNELS), 32, norm=norm)
    assert isinstance(fpn.fpn_lateral6.norm, layer)
    assert fpn.fpn_lateral6.bias is None


def test_wrong_arguments():
    with pytest.raises(ValueError, match="halve the resolution"):
        CarafeFPN(PooledImage(), ["res2", "res4"], 12)
    with pytest.raises(ValueError, match="fuse_type"):
        build(fuse_type="max")


def resnet_config():
    cfg = get_cfg()
    add_carafe_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_resnet_carafe_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    return cfg


def test_config_reaches_the_upsamplers():
    cfg = resnet_config()
    cfg.MODEL.CARAFE.UP_KERNEL = 7
    cfg.MODEL.CARAFE.UP_GROUP = 2
    cfg.MODEL.CARAFE.ENCODER_KERNEL = 1
    cfg.MODEL.CARAFE.COMPRESSED_CHANNELS = 8
    cfg.MODEL.CARAFE.NORMALIZER = "sigmoid"
    pack = build_backbone(cfg).fpn_upsample5
    assert pack.normalizer == "sigmoid"
    assert pack.content_encoder.weight.shape == (7 * 7 * 2 * 4, 8, 1, 1)


def test_config_reaches_the_downsamplers():
    cfg = resnet_config()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_carafe_pafpn_backbone"
    cfg.MODEL.FPN.DOWNSAMPLE = cfg.MODEL.RESNETS.DOWNSAMPLE = "carafe"
    cfg.MODEL.CARAFE_DOWNSAMPLE.DOWN_KERNEL = 3
    cfg.MODEL.CARAFE_DOWNSAMPLE.COMPRESSED_CHANNELS = 8
    backbone = build_backbone(cfg)
    packs = {n: m for n, m in backbone.named_modules() if isinstance(m, CARAFEDownsamplePack)}
    assert [*packs] == [
        *(f"bottom_up.res{i}.0.downsample" for i in (3, 4, 5)),
        "fpn_downsample6",
        *(f"pafpn_downsample{i}" for i in (3, 4, 5, 6)),
    ]
    assert {(m.down_kernel, m.compressed_channels) for m in packs.values()} == {(3, 8)}


def test_retinanet_backbone_has_two_extra_levels():
    cfg = resnet_config()
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_carafe_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    backbone = build_backbone(cfg)
    assert backbone.size_divisibility == 128
    outputs = backbone(torch.zeros(1, 3, 128, 256))
    assert {name: p.shape[-2:] for name, p in outputs.items()} == {
        f"p{i}": (128 // 2**i, 256 // 2**i) for i in (3, 4, 5, 6, 7)
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.FPN.UPSAMPLE", "lanczos"),
        ("MODEL.CARAFE.UP_KERNEL", 4),
        ("MODEL.CARAFE.ENCODER_KERNEL", -1),
        ("MODEL.CARAFE.COMPRESSED_CHANNELS", -1),
        ("MODEL.CARAFE.NORMALIZER", "tanh"),
        ("MODEL.CARAFE.UP_GROUP", 3),
        ("MODEL.FPN.DOWNSAMPLE", "max"),
    ],
)
def test_wrong_config_values_are_named(key, value):
    cfg = resnet_config()
    cfg.merge_from_list([key, value])
    with pytest.raises(UserError, match=f"{key}.*{value}"):
        build_backbone(cfg)
