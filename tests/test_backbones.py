import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone

from carafe_d2 import CARAFEPack, add_carafe_config
from carafe_d2.errors import UserError

NETWORKS = [
    ("torchvision", "mobilenet_v2"),
    ("torchvision", "resnet18"),
    ("torchvision", "regnet_y_400mf"),
    ("timm", "mobilenetv3_small_050"),
    ("timm", "resnet18"),
]


def build(library: str, network: str, *opts):
    if library == "timm":
        pytest.importorskip("timm")
    cfg = get_cfg()
    add_carafe_config(cfg)
    cfg.merge_from_list(
        [
            *("MODEL.BACKBONE.NAME", f"build_{library}_carafe_fpn_backbone"),
            *("MODEL.BACKBONE.MODEL", network, "MODEL.FPN.OUT_CHANNELS", 16),
            *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]),
            *opts,
        ]
    )
    return build_backbone(cfg)


@pytest.mark.parametrize(("library", "network"), NETWORKS)
def test_pyramid_has_its_strides_and_trains(library, network):
    backbone = build(library, network, "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0)
    outputs = backbone(torch.randn(2, 3, 64, 128))
    shapes = {name: tuple(x.shape) for name, x in outputs.items()}
    assert shapes == {f"p{i}": (2, 16, 64 >> i, 128 >> i) for i in range(2, 7)}
    assert sum(isinstance(m, CARAFEPack) for m in backbone.modules()) == 4
    sum(x.square().sum() for x in outputs.values()).backward()
    without = [n for n, p in backbone.named_parameters() if p.grad is None]
    assert not without


def test_freezing_obeys_the_config():
    backbone = build("torchvision", "mobilenet_v2", "MODEL.BACKBONE.FREEZE_AT", 2)
    assert any(isinstance(m, FrozenBatchNorm2d) for m in backbone.modules())
    features = backbone.bottom_up.features
    frozen = {n for n, p in features.named_parameters() if not p.requires_grad}
    weights = {n for n, _ in features.named_parameters()}
    assert frozen == {n for n in weights if int(n.split(".")[1]) <= 3} | {
        n
        for n in weights
        if n.startswith("features.4.conv.0.")  # still of stride 4
    }


def test_retinanet_gets_two_levels_more():
    backbone = build(
        *("torchvision", "resnet18", "MODEL.META_ARCHITECTURE", "RetinaNet"),
        *("MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]),
    )
    assert list(backbone.output_shape()) == ["p3", "p4", "p5", "p6", "p7"]


@pytest.mark.parametrize(
    ("library", "network", "message"),
    [
        ("torchvision", "resnet19", "MODEL.BACKBONE.MODEL 'resnet19' is no network of torchvision"),
        ("torchvision", "", "MODEL.BACKBONE.MODEL is empty"),
        (
            "torchvision",
            "swin_t",
            "IN_FEATURES asks for res2, res3, res4, but swin_t has res5",
        ),
        ("timm", "resnet19", "MODEL.BACKBONE.MODEL 'resnet19'"),
    ],
)
def test_what_cannot_be_built_is_named(library, network, message):
    with pytest.raises(UserError, match=message):
        build(library, network)
