import contextlib
import copy
import functools
import pickle
import re
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import distributed, fx, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle
from torchvision.models import segmentation
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FeaturePyramidNetwork

from carafe_d2 import CARAFEPack, replace_upsampling
from carafe_d2.replace import CARAFEConvTranspose2d


def conv(in_channels, out_channels, stride=1):
    layer = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)
    return nn.Sequential(layer, nn.ReLU())


class UNet(nn.Module):
    """Two levels up again, each by what `up` makes of channels before and after."""

    def __init__(self, up):
        super().__init__()
        self.down1, self.down2, self.down3 = conv(3, 8), conv(8, 16, 2), conv(16, 32, 2)
        self.up2, self.merge2 = up(32, 16), conv(32, 16)
        self.up1, self.merge1 = up(16, 8), conv(16, 8)
        self.predictor = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        x1 = self.down1(x)
        x2 = self.down2(x1)
        x = self.merge2(torch.cat([x2, self.up2(self.down3(x2))], 1))
        return self.predictor(self.merge1(torch.cat([x1, self.up1(x)], 1)))


class Interpolate(nn.Module):
    """Interpolates as often as it is told to, and does something after each time."""

    def __init__(self, times=1, **arguments):
        super().__init__()
        self.arguments = arguments or {"scale_factor": 2}
        self.times = times

    def forward(self, x):
        for _ in range(self.times):
            x = F.interpolate(x, **self.arguments)
            self.action()
        return x

    def action(self):
        """Tests set others."""


def unet_deconv():
    return UNet(lambda before, after: nn.ConvTranspose2d(before, after, 2, stride=2))


def unet_of(layer, **arguments):
    arguments = arguments or {"scale_factor": 2}
    return UNet(
        lambda before, after: nn.Sequential(layer(**arguments), nn.Conv2d(before, after, 1))
    )


unet_upsample = functools.partial(unet_of, nn.Upsample)
unet_interpolate = functools.partial(unet_of, Interpolate)
UNETS = {
    "deconv": (unet_deconv, ["up2", "up1"]),
    "upsample": (unet_upsample, ["up2.0", "up1.0"]),
    "interpolate": (unet_interpolate, ["up2.0.carafe_upsample.0", "up1.0.carafe_upsample.0"]),
}
EVERY_UNET = pytest.mark.parametrize(("build", "names"), UNETS.values(), ids=UNETS)


def fail(error):
    raise error


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def names(sites):
    return [site.name for site in sites]


def reasons(report):
    return {site.name: site.reason for site in report.left_alone}


def as_nearest(model):
    """Sets every CARAFEPack to nearest neighbors: all weight on the middle of its kernel."""
    packs = [module for module in model.modules() if isinstance(module, CARAFEPack)]
    for pack in packs:
        nn.init.zeros_(pack.content_encoder.weight)
        middle = pack.up_kernel**2 // 2
        bias = pack.content_encoder.bias.data.view(pack.up_group, pack.up_kernel**2, -1)
        bias.zero_()[:, middle] = 1000.0
    return packs


# ------------------------------------------------------------------ what is replaced


@EVERY_UNET
def test_unet_is_changed_by_name_and_trains(build, names):
    torch.manual_seed(0)
    model, x = build(), torch.randn(2, 3, 32, 32)
    before = count(model)
    report = replace_upsampling(model, x, compressed_channels=8, normalizer="sigmoid")
    packs = [m for m in model.modules() if isinstance(m, CARAFEPack)]
    assert [site.name for site in report] == names
    assert [(site.channels, site.scale) for site in report] == [(32, 2), (16, 2)]
    assert sum(site.parameters for site in report) == count(model) - before
    assert report.left_alone == []
    assert type(model) is UNet and model.training
    assert [(p.channels, p.compressed_channels) for p in packs] == [(32, 8), (16, 8)]
    assert {p.normalizer for p in packs} == {"sigmoid"}
    assert model(torch.randn(2, 3, 48, 64)).shape == (2, 5, 48, 64)

    F.cross_entropy(model(x), torch.randint(5, (2, 32, 32))).backward()
    for name in names:
        for parameter in model.get_submodule(name).parameters():
            assert parameter.grad.abs().sum() > 0

    state, expected = copy.deepcopy(model.state_dict()), model(x)
    assert replace_upsampling(model, x) == []  # a second call finds nothing
    assert model.state_dict().keys() == state.keys()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"scale_factor": 2.0, "mode": "bilinear"},
        {"scale_factor": (2, 2), "mode": "bilinear", "align_corners": True},
        {"scale_factor": 2, "mode": "nearest-exact"},
    ],
    ids=str,
)
@pytest.mark.parametrize("build", [unet_upsample, unet_interpolate])
def test_kinds_of_interpolation(arguments, build):
    report = replace_upsampling(build(**arguments), torch.randn(1, 3, 16, 16))
    assert len(report) == 2
    assert all(arguments["mode"] in site.was for site in report)


def test_upsampling_classes_of_old():
    model = nn.Sequential(nn.UpsamplingNearest2d(scale_factor=3), nn.UpsamplingBilinear2d((18, 18)))
    report = replace_upsampling(model, torch.randn(1, 4, 3, 3), max_scale=3)
    # The one of a fixed size stays, so that it goes on to refuse what does not fit.
    assert [(s.name, s.scale) for s in report] == [("0", 3), ("1.carafe_upsample.0", 2)]
    assert model(torch.randn(1, 4, 3, 3)).shape == (1, 4, 18, 18)
    with pytest.raises(RuntimeError, match="factor 2, but a map of 12 x 12 is to become 18 x 18"):
        model(torch.randn(1, 4, 4, 4))


def test_dtype_and_training_flag_follow_the_model():
    model = unet_upsample().double()
    model.up1.eval()
    replace_upsampling(model, torch.randn(1, 3, 16, 16, dtype=torch.float64))
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.training and model.up2[0].training
    assert not model.up1.training and not model.up1[0].training


# -------------------------------------------------------- transposed convolutions


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1},  # one row and column less
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
        {"kernel_size": 4, "stride": 2, "padding": 1, "bias": False},
        {"kernel_size": (3, 4), "stride": 2, "padding": 1},
        {"kernel_size": 2, "stride": 3, "dilation": 2},
        {"kernel_size": 4, "stride": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("out_channels", [8, 6])
def test_transposed_convolution_keeps_its_output_size(arguments, out_channels):
    deconv = nn.ConvTranspose2d(8, out_channels, **arguments)
    model, x = nn.Sequential(deconv), torch.randn(2, 8, 5, 7)
    report = replace_upsampling(model, x, max_scale=4)
    assert isinstance(model[0], CARAFEConvTranspose2d)
    assert model(x).shape == deconv(x).shape
    assert [site.parameters for site in report] == [count(model) - count(deconv)]
    if out_channels == 6:
        assert (model[0].project.bias is None) == (deconv.bias is None)
    else:
        assert isinstance(model[0].project, nn.Identity)


def test_depthwise_transposed_convolution_becomes_carafe():
    model = nn.Sequential(nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1, groups=8))
    assert names(replace_upsampling(model, torch.randn(1, 8, 5, 5))) == ["0"]


def test_transposed_convolution_is_carafe_and_then_a_1x1_convolution():
    module, x = CARAFEConvTranspose2d(8, 6, 2, trim=(1, 0)), torch.randn(2, 8, 5, 7)
    expected = module.project(module.upsample(x))
    torch.testing.assert_close(module(x), expected[:, :, :9])
    torch.testing.assert_close(module(x, output_size=(10, 13)), expected[..., :13])
    torch.testing.assert_close(module(x, output_size=torch.Size((2, 6, 9, 14))), module(x))
    with pytest.raises(RuntimeError, match="factor 2, but a map of 5 x 7 is to become 11 x 14"):
        module(x, output_size=(11, 14))


def test_shared_transposed_convolution_stays_shared():
    deconv = nn.ConvTranspose2d(8, 8, 2, stride=2)
    model = nn.ModuleDict({"a": deconv, "b": nn.Sequential(deconv)})
    model.forward = lambda x: model["b"](model["a"](x))
    assert names(replace_upsampling(model, torch.randn(1, 8, 4, 4))) == ["a"]
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], CARAFEConvTranspose2d)


# ------------------------------------------------------------- feature pyramids, sizes


def pyramid_inputs(rows, columns):
    sizes = [(rows, columns)]
    for _ in range(3):
        sizes.append(tuple((n + 1) // 2 for n in sizes[-1]))  # as of a stride-2 convolution
    return {str(i): torch.randn(2, 4 * 2**i, *size) for i, size in enumerate(sizes)}


def pyramid():
    return FeaturePyramidNetwork([4, 8, 16, 32], 12)


@pytest.mark.parametrize("size", [(40, 64), (50, 37), (33, 49)], ids=str)
def test_torchvision_pyramid_of_any_size_stays_aligned(size):
    """25 rows from 13: cut off at the end, CARAFE looks where nearest neighbors look."""
    model, x = pyramid(), pyramid_inputs(*size)
    expected = model(x)
    report = replace_upsampling(model, pyramid_inputs(50, 64))
    assert names(report) == [f"carafe_upsample.{k}" for k in range(3)]
    assert isinstance(model, FeaturePyramidNetwork)
    as_nearest(model)
    torch.testing.assert_close(model(x), expected)


# ---------------------------------------------------------------- torchvision's models


def test_faster_rcnn():
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    model = FasterRCNN(backbone, num_classes=3, min_size=64, max_size=96)
    image = torch.rand(3, 64, 80)
    report = replace_upsampling(model, [image])
    assert names(report) == [f"backbone.fpn.carafe_upsample.{k}" for k in range(3)]
    assert reasons(report) == {
        "transform.carafe_upsample.0": "its factor, 1 x 1, is not one integer above 1"
    }
    target = {"boxes": torch.tensor([[5.0, 5.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    sum(model([image], [target]).values()).backward()
    for pack in model.backbone.fpn.carafe_upsample.values():
        assert pack.content_encoder.weight.grad.abs().sum() > 0
    assert len(model.eval()([image, torch.rand(3, 96, 61)])) == 2


def test_lraspp():
    model = segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=5
    )
    x = torch.rand(2, 3, 64, 64)
    report = replace_upsampling(model, x)
    assert names(report) == ["classifier.carafe_upsample.0"]
    assert reasons(report) == {"carafe_upsample.0": "factor 8 is above max_scale = 2"}
    report = replace_upsampling(model, x, max_scale=8, compressed_channels=8)
    assert names(report) == ["carafe_upsample.0"]
    assert model(torch.rand(2, 3, 75, 50))["out"].shape == (2, 5, 75, 50)


# ----------------------------------------------------------------- which call is which


class Pooling(nn.Module):
    """Interpolates by no integer factor."""

    def forward(self, x):
        return F.interpolate(F.adaptive_avg_pool2d(x, 3), size=x.shape[-2:], mode="bilinear")


class Nested(nn.Module):
    """Calls that stay and calls that go, of its own and further in, a loop, and a shared module."""

    def __init__(self):
        super().__init__()
        self.pooling = Pooling()
        self.inner, self.widen = Interpolate(), nn.Conv2d(4, 8, 1)
        self.fixed = nn.Upsample(scale_factor=1.5)
        self.shared = nn.Upsample(scale_factor=2)
        self.narrow = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.pooling(x)
        x = self.widen(self.inner(x))  # 16 x 16
        x = self.fixed(x)  # 24 x 24
        x = self.shared(x)  # 48 x 48, 8 channels: call 0
        x = F.interpolate(x, scale_factor=0.5)  # call 1
        x = self.shared(self.narrow(x))  # 48 x 48, 4 channels: call 2
        for _ in range(2):
            x = F.interpolate(F.max_pool2d(x, 2), scale_factor=2)  # calls 3 and 4
        return F.interpolate(x, scale_factor=3, mode="bicubic")  # call 5


def test_calls_are_told_apart():
    torch.manual_seed(0)
    model, x = Nested(), torch.randn(1, 4, 8, 8)
    expected = model(x)
    report = replace_upsampling(model, x)
    own = [f"carafe_upsample.{k}" for k in (0, 2, 3, 4)]
    assert sorted(names(report)) == sorted([*own, "inner.carafe_upsample.0"])
    assert reasons(report).keys() == {
        *("fixed", "pooling.carafe_upsample.0", "carafe_upsample.1", "carafe_upsample.5")
    }
    assert {k: pack.channels for k, pack in model.carafe_upsample.items()} == {
        **{"0": 8, "2": 4, "3": 4, "4": 4}
    }
    calls = []
    for site in report:
        model.get_submodule(site.name).register_forward_hook(
            lambda *_, name=site.name: calls.append(name)
        )
    model(x)
    assert calls == ["inner.carafe_upsample.0", *own]
    as_nearest(model)
    torch.testing.assert_close(model(x), expected)


def test_upsample_that_stands_in_several_places_gets_a_carafe_in_each():
    up = nn.Upsample(scale_factor=2)
    model = nn.Sequential(conv(3, 8), up, conv(8, 16), up)
    assert names(replace_upsampling(model, torch.randn(1, 3, 8, 8))) == ["1", "3"]
    assert (model[1].channels, model[3].channels) == (8, 16)


class Levels(nn.Module):
    """One head for several levels, as detectors have."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return [self.head(x), self.head(F.max_pool2d(x, 2))]


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (lambda: nn.Sequential(conv(4, 8), nn.Upsample(scale_factor=2)), "head.1"),
        (lambda: nn.Sequential(conv(4, 8), Interpolate()), "head.1.carafe_upsample.0"),
    ],
)
def test_head_of_several_levels_shares_its_carafe(head, name):
    model, x = Levels(head()), torch.randn(1, 4, 8, 8)
    assert names(replace_upsampling(model, x)) == [name]
    assert [level.shape for level in model(x)] == [(1, 8, 16, 16), (1, 8, 8, 8)]


@pytest.mark.parametrize("times", [1, 3])
def test_another_number_of_calls_is_refused(times):
    model, x = Interpolate(2), torch.randn(1, 4, 4, 4)
    assert len(replace_upsampling(model, x)) == 2
    model.times = times
    with pytest.raises(RuntimeError, match=f"interpolated {times} times, but 2 times with the ex"):
        model(x)


def test_calls_that_differ_from_run_to_run_are_left_alone():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice = Interpolate(2)

        def forward(self, x):
            self.twice.times = 3 - self.twice.times
            x = self.twice(x)
            self.twice.times = 3 - self.twice.times
            return self.twice(x)

    report = replace_upsampling(Both(), torch.randn(1, 4, 4, 4))
    assert report == []
    assert reasons(report) == {
        "twice.carafe_upsample.*": "its calls differ from one run of the module to another"
    }


# --------------------------------------------------------------------- what is left alone


class OwnDeconv(nn.ConvTranspose2d):
    pass


def with_attribute(module, **attributes):
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


class Iterating(nn.Sequential):
    def forward(self, x):
        return F.interpolate(super().forward(x), scale_factor=2)


MAP = (1, 4, 6, 6)
LEFT_ALONE = {
    "not an integer": (lambda: nn.Upsample(scale_factor=1.5), MAP, r"factor, 1\.5 x 1\.5, is not"),
    "unequal": (lambda: nn.Upsample(scale_factor=(2, 4)), MAP, "factor, 2 x 4, is not one"),
    "no integer size": (lambda: Interpolate(size=(9, 9)), MAP, r"factor, 1\.5 x 1\.5"),
    "downsampling": (lambda: Interpolate(scale_factor=0.5), MAP, r"factor, 0\.5 x 0\.5"),
    "bicubic": (lambda: nn.Upsample(scale_factor=2, mode="bicubic"), MAP, "mode bicubic"),
    "one dimension": (lambda: nn.Upsample(scale_factor=2), (1, 4, 6), "rank 3, not 4"),
    "volume": (lambda: Interpolate(), (1, 4, 6, 6, 6), "rank 5, not 4"),
    "bytes": (lambda: Interpolate(), "bytes", r"dtype torch\.uint8"),
    "large": (lambda: nn.Upsample(scale_factor=4), MAP, "factor 4 is above max_scale = 2"),
    "mask": (lambda: nn.Upsample(scale_factor=2), (1, 1, 6, 6), "channels, 1, is that of"),
    "pooled": (lambda: Interpolate(size=(4, 4)), (1, 4, 1, 1), "input is a single pixel"),
    "iterating": (lambda: Iterating(nn.ReLU()), MAP, "Iterating would run a CARAFEPack as one of"),
    "deconv stride": (lambda: nn.ConvTranspose2d(4, 4, 3), MAP, "factor, 1 x 1, is not"),
    "deconv strides": (lambda: nn.ConvTranspose2d(4, 4, 3, (2, 1)), MAP, "factor, 2 x 1"),
    "deconv size": (lambda: nn.ConvTranspose2d(4, 4, 3, 2), MAP, r"\+1 x \+1 pixels off"),
    "deconv groups": (lambda: nn.ConvTranspose2d(4, 8, 2, 2, groups=2), MAP, "2 groups that ch"),
    "deconv class": (lambda: OwnDeconv(4, 4, 2, 2), MAP, "OwnDeconv is a class of its own"),
    "parametrized": (
        lambda: parametrizations.spectral_norm(nn.ConvTranspose2d(4, 4, 2, 2)).eval(),
        MAP,
        "ParametrizedConvTranspose2d is a class of its own",
    ),
    "pruned": (
        lambda: prune.l1_unstructured(nn.ConvTranspose2d(4, 4, 2, 2), "weight", 3),
        MAP,
        "its parameters are bias and weight_orig",
    ),
    "own forward": (
        lambda: with_attribute(nn.Upsample(scale_factor=2), forward=nn.Upsample(None, 2).forward),
        MAP,
        "it was given a forward of its own",
    ),
    "own attribute": (
        lambda: with_attribute(nn.Upsample(scale_factor=2), channels=3),
        MAP,
        "it was given a channels of its own",
    ),
    "own child": (
        lambda: with_attribute(nn.ConvTranspose2d(4, 4, 2, 2), project=nn.Identity()),
        MAP,
        "it was given a project of its own",
    ),
    "own packs": (
        lambda: with_attribute(Interpolate(), carafe_upsample=1),
        MAP,
        "Interpolate has a carafe_upsample of its own",
    ),
    "graph": (lambda: fx.symbolic_trace(Interpolate()), MAP, "GraphModule loses its forward hooks"),
}


@pytest.mark.parametrize(("build", "shape", "reason"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone_with_a_reason(build, shape, reason):
    model = nn.Sequential(build())
    x = torch.zeros(MAP, dtype=torch.uint8) if shape == "bytes" else torch.randn(shape)
    expected, kind = model(x), type(model[0])
    report = replace_upsampling(model, x)
    assert report == []
    (site,) = report.left_alone
    assert site.name.startswith("0")
    assert re.search(reason, site.reason)
    assert type(model[0]) is kind
    assert torch.equal(model(x), expected)


def test_what_the_example_does_not_reach_is_left_alone():
    model = nn.ModuleDict({"used": nn.Upsample(scale_factor=2), "idle": nn.Upsample(2)})
    model.forward = lambda x: model["used"](x)
    report = replace_upsampling(model, torch.randn(MAP))
    assert names(report) == ["used"]
    assert reasons(report) == {"idle": "not reached with the example inputs"}


@pytest.mark.parametrize("module", [nn.Upsample(scale_factor=2), nn.ConvTranspose2d(4, 4, 2, 2)])
def test_model_that_is_nothing_but_upsampling(module):
    x = torch.randn(MAP)
    report = replace_upsampling(module, x)
    if isinstance(module, nn.Upsample):
        assert names(report) == ["carafe_upsample.0"]
        as_nearest(module)
        torch.testing.assert_close(module(x), F.interpolate(x, scale_factor=2))
    else:
        assert reasons(report) == {"": "it is the model itself"}


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"include": ["up1.0", "nothing"]}, ["up1.0"]),
        ({"exclude": ["*.0"]}, []),
        ({"include": ["up*"], "exclude": ["up1*"]}, ["up2.0"]),
        ({"max_scale": 1}, []),
        ({"up_group": 32}, ["up2.0"]),
    ],
    ids=str,
)
def test_filters(filters, expected):
    report = replace_upsampling(unet_upsample(), torch.randn(1, 3, 16, 16), **filters)
    assert names(report) == expected
    assert len(report) + len(report.left_alone) == 2


def test_later_calls_replace_more_but_not_within_what_is_changed():
    model, x = Nested(), torch.randn(1, 4, 8, 8)
    first = replace_upsampling(model, x, include=["inner*"])
    assert names(first) == ["inner.carafe_upsample.0"]
    second = replace_upsampling(model, x, include=["carafe_upsample.[03]"])
    assert names(second) == ["carafe_upsample.0", "carafe_upsample.3"]
    third = replace_upsampling(model, x)
    assert third == []
    left_alone = reasons(third)
    assert left_alone["pooling.carafe_upsample.0"].startswith("its factor")
    assert left_alone["shared"] == "within Nested, which an earlier call has changed"
    assert left_alone["carafe_upsample.*"].startswith("an earlier call has given")
    assert model(x).shape == (1, 4, 144, 144)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"up_kernel": 4}, "up_kernel must be odd, got 4"),
        ({"up_group": 0}, "up_group must be an integer of at least 1, got 0"),
        ({"max_scale": 2.5}, r"max_scale must be an integer of at least 1, got 2\.5"),
    ],
)
def test_wrong_arguments_are_named_and_change_nothing(arguments, message):
    model = unet_deconv()
    with pytest.raises(ValueError, match=message):
        replace_upsampling(model, torch.randn(1, 3, 16, 16), **arguments)
    assert isinstance(model.up2, nn.ConvTranspose2d)


def test_model_that_is_distributed_already_is_refused():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(unet_upsample())
        with pytest.raises(ValueError, match="would not synchronize new layers"):
            replace_upsampling(model, torch.randn(1, 3, 16, 16))
    finally:
        distributed.destroy_process_group()


def test_transposed_convolution_that_the_model_finds_elsewhere_is_left_alone():
    model = nn.ModuleDict({"up": nn.ConvTranspose2d(4, 4, 2, stride=2)})
    hidden = model["up"]
    model.forward = lambda x: hidden(x)
    report = replace_upsampling(model, torch.randn(MAP))
    assert reasons(report) == {"up": "the model calls it other than by its name"}
    assert model["up"] is hidden


def test_carafe_that_is_not_in_use_is_named():
    model = nn.ModuleDict({"up": nn.ConvTranspose2d(4, 4, 2, stride=2)})
    model.forward = torch.neg
    with pytest.warns(UserWarning, match="did not run up when the example was repeated"):
        replace_upsampling(model, torch.randn(MAP))


def test_upsampling_that_is_left_alone_is_the_same_module():
    up = nn.Upsample(scale_factor=2)
    model = nn.Sequential(up, conv(4, 8), up)
    assert names(replace_upsampling(model, torch.randn(MAP), exclude=["0"])) == ["2"]
    assert model[0] is up


def test_model_without_upsampling():
    model = nn.Sequential(conv(3, 8), torch.jit.script(nn.Upsample(scale_factor=2.0)))
    report = replace_upsampling(model, torch.randn(1, 3, 4, 4))
    assert report == report.left_alone == []
    assert str(report) == "nothing replaced: no upsampling was seen"


# ------------------------------------------------------------------- several examples


class Pool(nn.Module):
    """Beside what it always doubles, a map pooled to 4 x 4 goes to the size of the input."""

    def forward(self, x):
        pooled = F.interpolate(F.adaptive_avg_pool2d(x, 4), size=x.shape[2:])
        return F.interpolate(x + pooled, scale_factor=2)


@pytest.mark.parametrize(
    ("sizes", "expected", "reason"),
    [
        ([8], ["carafe_upsample.0", "carafe_upsample.1"], None),
        ([8, 10], ["carafe_upsample.1"], "its factor, 2.5 x 2.5, is not one integer above 1"),
        ([10, 8], ["carafe_upsample.1"], "its factor, 2.5 x 2.5, is not one integer above 1"),
        ([12, 8], ["carafe_upsample.1"], "its factor is 2 or 3"),
    ],
    ids=str,
)
def test_what_is_doubled_by_chance_shows_with_several_examples(sizes, expected, reason):
    model, examples = Pool(), [(torch.randn(1, 4, size, size),) for size in sizes]
    report = replace_upsampling(model, examples, max_scale=4)
    assert names(report) == expected
    assert reasons(report).get("carafe_upsample.0") == reason
    for example in examples:
        model(*example)


def test_calls_that_only_some_examples_make_are_left_alone():
    class ToSize(nn.Module):
        def forward(self, x):
            return F.interpolate(x, size=(12, 12)) if x.shape[2] != 12 else x

    model, examples = ToSize(), [(torch.randn(1, 4, n, n),) for n in (6, 12)]
    assert reasons(replace_upsampling(model, examples)) == {
        "carafe_upsample.*": "its calls differ from one run of the module to another"
    }


def test_examples_have_several_arguments():
    class Add(nn.Module):
        def forward(self, x, y):
            return F.interpolate(x, scale_factor=2) + y

    example = (torch.randn(MAP), torch.tensor(1.0))
    assert len(replace_upsampling(Add(), example)) == 1
    assert len(replace_upsampling(Add(), [example, example])) == 1


# ------------------------------------------------------------- what others put on modules

HOOKS = [
    "forward_pre_hook",
    "forward_hook",
    "full_backward_pre_hook",
    "full_backward_hook",
    "state_dict_pre_hook",
    "state_dict_post_hook",
    "load_state_dict_pre_hook",
    "load_state_dict_post_hook",
]


def use(model, x):
    """Calls hooks of every kind."""
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    model(x).sum().backward()


@pytest.mark.parametrize("in_two_places", [False, True])
@pytest.mark.parametrize("build", [nn.Upsample, lambda **_: nn.ConvTranspose2d(4, 4, 2, 2)])
def test_what_others_put_on_a_module_goes_over(build, in_two_places):
    up = build(scale_factor=2).eval()
    up.f, up.i, up.type, up.np = -1, 1, "up", 0
    up.register_buffer("count", torch.ones(3))
    up.register_buffer("temporary", torch.ones(3), persistent=False)
    up.watch = nn.Identity()
    called, handles = [], []
    for kind in HOOKS:
        hook = lambda module, *_, kind=kind: called.append((kind, module))  # noqa: E731
        if kind == "load_state_dict_post_hook":
            hook = lambda module, keys: called.append(("load_state_dict_post_hook", module))  # noqa: E731
        handles.append(getattr(up, f"register_{kind}")(hook))
    model, x = nn.Sequential(conv(4, 4), up), torch.randn(MAP)
    if in_two_places:
        model.append(up)
    use(model, x)
    assert {kind for kind, _ in called} == set(HOOKS)
    keys = {key for key in model.state_dict() if "count" in key or "temporary" in key}

    assert len(replace_upsampling(model, x)) >= 1
    for new in model[1:]:
        assert type(new) in (CARAFEPack, CARAFEConvTranspose2d)
        assert (new.f, new.i, new.type, new.np) == (-1, 1, "up", 0)
        assert new.watch is up.watch
        assert not any(module.training for module in new.modules() if module is not up.watch)
    assert {key for key in model.state_dict() if "count" in key or "temporary" in key} == keys
    called.clear()
    use(model, x)
    assert {kind for kind, _ in called} == set(HOOKS)
    assert {module for _, module in called} <= {*model}
    use(copy.deepcopy(model), x)
    for handle in handles:
        handle.remove()
    called.clear()
    use(model, x)
    assert called == []


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.autocast("cpu")])
def test_new_layers_can_be_trained_whatever_mode_they_are_made_in(context):
    with context():
        model, x = nn.Sequential(conv(4, 4), nn.Upsample(scale_factor=2)), torch.randn(MAP)
        replace_upsampling(model, x)
    assert {parameter.dtype for parameter in model[1].parameters()} == {torch.float32}
    model[1](torch.randn(MAP)).sum().backward()


# ------------------------------------------------------------------------ all or nothing


class Restless(nn.Module):
    """Every run of it leaves something behind; fails where it is told to."""

    def __init__(self):
        super().__init__()
        self.lazy, self.norm = nn.LazyConv2d(4, 1), nn.BatchNorm2d(4)
        self.up, self.deconv = nn.Upsample(scale_factor=2), nn.ConvTranspose2d(4, 4, 2, 2)
        self.shared = nn.Sequential(self.up, Interpolate())
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("expanded", torch.zeros(1).expand(3))
        self.plain, self.seen, self.runs = torch.zeros(2), [], 0
        self.fail_with = None

    def forward(self, x):
        self.norm.train()
        x = self.norm(self.lazy(x))
        self.steps.add_(1)
        self.plain.data.mul_(2).add_(1)
        self.seen.append(x)
        self.runs += 1
        self.new = x
        self.late = nn.Identity()
        self.shared.register_forward_hook(lambda *_: None)
        x = self.deconv(self.shared(self.up(F.dropout(x))))
        if self.fail_with and (self.fail_with != "with CARAFE" or not hasattr(self.up, "mode")):
            raise self.fail_with if self.fail_with != "with CARAFE" else ValueError("no CARAFE")
        return x


def contents(value):
    """What can be compared of attributes: tensors by identity and value, containers by items."""
    if isinstance(value, torch.Tensor):
        return id(value), type(value), None if is_lazy(value) else value.tolist()
    if type(value) in (dict, OrderedDict):
        return id(value), [(key, contents(item)) for key, item in value.items()]
    if type(value) in (list, set):
        return id(value), list(map(contents, value))
    return value


def state(model):
    modules = [(n, m, type(m), contents(vars(m))) for n, m in model.named_modules()]
    return modules, torch.get_rng_state().tolist()


@pytest.mark.parametrize(
    ("fail_with", "error", "message"),
    [
        (ValueError("example"), RuntimeError, "Restless does not run on the example, so nothing"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        ("with CARAFE", RuntimeError, "does not run with CARAFE in it on the example, so nothing"),
        ("second example", RuntimeError, "does not run on example 2 of 2, so nothing .* TypeError"),
        ("directions.CARAFEPack", MemoryError, None),
        ("replace.inherit", MemoryError, None),
        ("replace.Packs.attach", MemoryError, None),
    ],
    ids=str,
)
def test_whatever_fails_leaves_the_model_as_it_was(fail_with, error, message, monkeypatch):
    model, examples = Restless(), torch.randn(2, 3, 6, 6)
    model.up.register_forward_hook(lambda *_: None)
    if fail_with == "second example":
        examples = [(examples,), ("no tensor",)]
    elif error is MemoryError:
        monkeypatch.setattr(f"carafe_d2.{fail_with}", lambda *_, **__: fail(MemoryError))
    else:
        model.fail_with = fail_with
    before = state(model)
    with pytest.raises(error, match=message):
        replace_upsampling(model, examples)
    assert state(model) == before
    monkeypatch.undo()
    model.fail_with = None
    assert len(replace_upsampling(model, torch.randn(2, 3, 6, 6))) == 4


# -------------------------------------------- the model afterwards is like any other


@EVERY_UNET
def test_copies(build, names, clone):
    model, x = build(), torch.randn(1, 3, 16, 16)
    replace_upsampling(model, x)
    other = clone(model)
    assert torch.equal(other(x), model(x))
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    assert not torch.equal(other(x), model(x))
    assert all(any(key.startswith(name) for key in other.state_dict()) for name in names)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_no_hook_takes_the_number_of_a_loaded_one(monkeypatch):
    """As after loading in a new process, where hooks are numbered from 0 again."""
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    model, x = Interpolate(), torch.randn(MAP)
    replace_upsampling(model, x)
    expected, pickled = model(x), pickle.dumps(model)
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    loaded = pickle.loads(pickled)
    for _ in range(20):
        loaded.register_forward_pre_hook(lambda *_: None)
        loaded.register_forward_hook(lambda *_: None)
    assert torch.equal(loaded(x), expected)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_error_in_a_forward_pass_leaves_nothing_redirected(error):
    model, x = Interpolate(2), torch.randn(MAP)
    replace_upsampling(model, x)
    expected = model(x)
    model.action = lambda: fail(error)
    with pytest.raises(error):
        model(x)
    torch.testing.assert_close(F.interpolate(x, scale_factor=2), nn.Upsample(scale_factor=2)(x))
    del model.action
    for _ in range(2):
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["hook", "forward"])
def test_error_further_in_does_not_confuse_a_module_that_handles_it(error, place):
    class Handling(Interpolate):
        def __init__(self):
            super().__init__(2)
            self.inner = Interpolate(2)

        def action(self):
            with contextlib.suppress(ValueError, KeyboardInterrupt):
                self.inner(torch.ones(MAP))

    model, x = Handling(), torch.randn(MAP)
    assert len(replace_upsampling(model, x)) == 4
    expected = model(x)
    if place == "hook":
        model.inner.register_forward_pre_hook(lambda *_: fail(error), prepend=True)
    else:
        model.inner.action = lambda: fail(error)
    assert torch.equal(model(x), expected)


def test_threads_may_run_a_model_at_once():
    model, inputs = Interpolate(2), [torch.randn(MAP), torch.randn(2, 4, 3, 5)]
    replace_upsampling(model, inputs[0])
    expected = [model(x) for x in inputs]
    model.action = threading.Barrier(2, timeout=60).wait
    with ThreadPoolExecutor(2) as pool:
        for output, one in zip(pool.map(model, inputs), expected, strict=True):
            assert torch.equal(output, one)


def test_replica_of_data_parallel_uses_its_own_carafe():
    model, x = Interpolate(), torch.randn(MAP)
    replace_upsampling(model, x)
    replica = model._replicate_for_data_parallel()
    replica.carafe_upsample = copy.deepcopy(model.carafe_upsample)
    as_nearest(replica)
    torch.testing.assert_close(replica(x), nn.Upsample(scale_factor=2)(x))


def changed_pyramid():
    model, x = pyramid().eval(), pyramid_inputs(50, 64)
    replace_upsampling(model, x)
    return model, x


def test_compiles_as_one_graph():
    model, x = unet_interpolate(), torch.randn(1, 3, 16, 16)
    replace_upsampling(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_exports_with_dynamic_sizes():
    model, x = changed_pyramid()
    side = torch.export.Dim("side", min=2, max=64)
    shapes = {name: {2: 2 ** (3 - int(name)) * side} for name in x}
    program = torch.export.export(model, (pyramid_inputs(64, 32),), dynamic_shapes=(shapes,))
    inputs = pyramid_inputs(96, 32)
    torch.testing.assert_close(program.module()(inputs), model(inputs))


def test_activation_checkpointing():
    model, x = changed_pyramid()

    def loss(x):
        return sum(level.square().sum() for level in model(x).values())

    expected = torch.autograd.grad(loss(x), list(model.parameters()))
    again = checkpoint(loss, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again, list(model.parameters())), expected)


# ------------------------------------------------------------------------- the report


def test_report_prints_as_a_table():
    model = nn.Sequential(conv(3, 8), nn.Upsample(scale_factor=2), Interpolate(size=(10, 12)))
    report = replace_upsampling(model, torch.randn(1, 3, 4, 4))
    assert str(report).splitlines() == [
        "replaced  was               channels  factor  parameters",
        "1         Upsample nearest         8      x2     +58,276",
        "total                                            +58,276",
        "",
        "left alone           was                    because",
        "2.carafe_upsample.0  F.interpolate nearest  "
        "its factor, 1.25 x 1.5, is not one integer above 1",
    ]


def test_report_sums_up_what_a_loop_left():
    class Boxes(nn.Module):
        def forward(self, x):
            return [F.interpolate(x, size=(n, n)) for n in (7, 9, 11)]

    report = replace_upsampling(Boxes(), torch.randn(1, 1, 4, 4))
    assert len(report.left_alone) == 3
    assert str(report).splitlines()[-1] == (
        "carafe_upsample.0 to 2  F.interpolate nearest  "
        "its number of channels, 1, is that of an image or a mask; ..."
    )
