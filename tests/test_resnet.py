import copy
import pickle
from itertools import pairwise

import pytest
import torch
from detectron2.layers import CNNBlockBase
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import (
    BasicBlock,
    BottleneckBlock,
    DeformBottleneckBlock,
)
from torch import nn

from carafe_d2 import CARAFEDownsamplePack, downsample_with_carafe
from carafe_d2.config import default_config
from carafe_d2.errors import UserError

BLOCKS = {
    "basic": (BasicBlock, {}),
    "1x1": (BottleneckBlock, {"bottleneck_channels": 4, "stride_in_1x1": True}),
    "3x3": (BottleneckBlock, {"bottleneck_channels": 4, "num_groups": 2}),
    "deform": (DeformBottleneckBlock, {"bottleneck_channels": 4}),
}


def resnet(kind, strides=(1, 2, 2)):
    block, options = BLOCKS[kind]
    channels = (8, 8, 12, 16)
    stages = [
        ResNet.make_stage(
            *(block, 2),
            in_channels=before,
            out_channels=after,
            norm="BN",
            stride_per_block=[stride, 1],
            **options,
        )
        for (before, after), stride in zip(pairwise(channels), strides, strict=True)
    ]
    return ResNet(BasicStem(out_channels=8), stages, out_features=["res2", "res3", "res4"])


@pytest.mark.parametrize("kind", BLOCKS)
def test_first_blocks_work_on_what_carafe_puts_out(kind):
    torch.manual_seed(0)
    strided = resnet(kind).eval()
    ours = downsample_with_carafe(copy.deepcopy(strided), down_kernel=3, compressed_channels=4)
    packs = [name for name, m in ours.named_modules() if isinstance(m, CARAFEDownsamplePack)]
    assert packs == ["res3.0.downsample", "res4.0.downsample"]
    missing, unexpected = ours.load_state_dict(strided.state_dict(), strict=False)
    assert unexpected == [] and {name.rsplit(".", 2)[0] for name in missing} == {*packs}
    assert ours.output_shape() == strided.output_shape()

    # A convolution with a stride of 2 is one of stride 1 of which every second pixel is kept.
    unstrided = copy.deepcopy(strided.res3[0])
    for layer in unstrided.modules():
        if isinstance(getattr(layer, "stride", None), tuple):
            layer.stride = (1, 1)
    x = torch.randn(2, 3, 36, 52)
    maps = ours(x)
    expected = unstrided(ours.res3[0].downsample(maps["res2"]))
    torch.testing.assert_close(ours.res3[0](maps["res2"]), expected)
    assert {name: m.shape for name, m in maps.items()} == {
        name: m.shape for name, m in strided(x).items()
    }


def test_kernels_of_the_middle_pixel_alone_are_strides_in_1x1_convolutions():
    torch.manual_seed(0)
    strided, x = resnet("1x1").eval(), torch.randn(1, 3, 36, 52)
    ours = downsample_with_carafe(copy.deepcopy(strided), down_kernel=3)
    for pack in (ours.res3[0].downsample, ours.res4[0].downsample):
        nn.init.zeros_(pack.content_encoder.weight)
        pack.content_encoder.bias.data[4] = 1000.0
    for name, expected in strided(x).items():
        torch.testing.assert_close(ours(x)[name], expected)


def test_network_trains_and_can_be_copied_and_pickled():
    ours = downsample_with_carafe(resnet("3x3"))
    for network in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        sum(m.square().mean() for m in network(torch.randn(2, 3, 32, 32)).values()).backward()
        assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_block_without_a_strided_convolution_is_named():
    class Pooling(CNNBlockBase):
        def forward(self, x):
            return nn.functional.max_pool2d(x, 2)

    network = ResNet(BasicStem(out_channels=8), [[Pooling(8, 8, 2)]])
    with pytest.raises(ValueError, match="Pooling has no convolution with its stride"):
        downsample_with_carafe(network)


def config(*overrides):
    cfg = default_config()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_carafe_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.merge_from_list(["MODEL.RESNETS.DOWNSAMPLE", "carafe", *overrides])
    return cfg


def test_config_reaches_the_downsamplers_even_of_frozen_stages():
    keys = {"DOWN_KERNEL": 3, "DOWN_GROUP": 2, "COMPRESSED_CHANNELS": 8, "NORMALIZER": "sigmoid"}
    settings = [x for k, v in keys.items() for x in (f"MODEL.CARAFE_DOWNSAMPLE.{k}", v)]
    backbone = build_backbone(config("MODEL.BACKBONE.FREEZE_AT", 3, *settings))
    pack = backbone.res3[0].downsample
    assert (pack.down_kernel, pack.down_group, pack.normalizer) == (3, 2, "sigmoid")
    assert pack.content_encoder.weight.shape == (18, 8, 3, 3)
    assert pack.content_encoder.weight.requires_grad
    assert not backbone.res3[0].conv1.weight.requires_grad


def test_without_the_key_it_is_detectron2s():
    backbone = build_backbone(config("MODEL.RESNETS.DOWNSAMPLE", ""))
    assert backbone.res3[0].conv1.stride == (2, 2)
    assert not any(isinstance(m, CARAFEDownsamplePack) for m in backbone.modules())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.RESNETS.DOWNSAMPLE", "blur"),
        ("MODEL.CARAFE_DOWNSAMPLE.DOWN_KERNEL", 4),
        ("MODEL.CARAFE_DOWNSAMPLE.DOWN_GROUP", 3),
        ("MODEL.CARAFE_DOWNSAMPLE.NORMALIZER", "tanh"),
    ],
)
def test_wrong_config_values_are_named(key, value):
    with pytest.raises(UserError, match=f"{key}.*{value}"):
        build_backbone(config(key, value))
