"""What is particular to downsampling; test_replace.py has what both directions share."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torchvision.models import resnet18

from carafe_d2 import CARAFEDownsamplePack, replace_downsampling, replace_upsampling
from carafe_d2.replace import CARAFEPool2d


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def names(sites):
    return [site.name for site in sites]


def reasons(report):
    return {site.name: site.reason for site in report.left_alone}


def as_subsampling(model):
    """Sets every CARAFE to take the pixel in the middle of its kernel alone."""
    packs = [m for m in model.modules() if isinstance(m, CARAFEDownsamplePack)]
    for pack in packs:
        nn.init.zeros_(pack.content_encoder.weight)
        bias = pack.content_encoder.bias.data.view(pack.down_group, pack.down_kernel**2)
        bias.zero_()[:, pack.down_kernel**2 // 2] = 1000.0
    return packs


class Pool(nn.Module):
    """Calls of pooling: some of a stride, one without, one of a module that is called twice."""

    def __init__(self):
        super().__init__()
        self.shared = nn.MaxPool2d(2)

    def forward(self, x):
        x = F.max_pool2d(x, 3, 2, 1)
        x = F.avg_pool2d(x, 3, stride=1, padding=1)  # does not count
        return self.shared(F.avg_pool2d(self.shared(x), kernel_size=2))


# ------------------------------------------------------------------------- convolutions


def test_resnet_is_changed_by_name_and_trains():
    torch.manual_seed(0)
    model, x = resnet18(weights=None, num_classes=3), torch.randn(2, 3, 64, 72)
    before, state = count(model), {k: v.shape for k, v in model.state_dict().items()}
    report = replace_downsampling(model, x, down_kernel=3, compressed_channels=8)
    strided = [f"layer{i}.0.{name}" for i in (2, 3, 4) for name in ("conv1", "downsample.0")]
    expected = {"maxpool", *(f"{name}.carafe_downsample" for name in strided)}
    assert {*names(report)} == expected
    assert reasons(report) == {
        "conv1.carafe_downsample": "its number of channels, 3, is that of an image or a mask"
    }
    assert sum(site.parameters for site in report) == count(model) - before
    assert str(report).splitlines()[1].split()[-2:] == ["/2", f"{report[0].parameters:+,}"]
    assert {k: v.shape for k, v in model.state_dict().items() if k in state} == state

    F.cross_entropy(model(x), torch.tensor([0, 2])).backward()
    packs = [m for m in model.modules() if isinstance(m, CARAFEDownsamplePack)]
    assert len(packs) == 7
    assert all(p.grad.abs().sum() > 0 for pack in packs for p in pack.parameters())
    expected = model.eval()(x)
    assert replace_downsampling(model, x) == []  # a second call finds nothing
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 1},
        {"kernel_size": 1, "padding": "valid", "bias": False},
        {"kernel_size": (3, 5), "padding": (1, 2), "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(8, 6), (7, 5)], ids=str)
def test_convolution_keeps_its_weights_and_its_output_size(arguments, size):
    conv = nn.Conv2d(8, 12, stride=2, **arguments)
    model, x = nn.Sequential(conv), torch.randn(2, 8, *size)
    before = conv(x)
    assert names(replace_downsampling(model, x, down_kernel=3)) == ["0.carafe_downsample"]
    assert model[0] is conv
    expected = F.conv2d if conv.padding_mode == "zeros" else None
    assert model(input=x).shape == before.shape
    as_subsampling(model)
    if expected:
        plain = {k: v for k, v in arguments.items() if k in ("padding", "dilation", "groups")}
        torch.testing.assert_close(
            model(x), F.conv2d(x[..., ::2, ::2], conv.weight, conv.bias, **plain)
        )


def test_what_is_on_a_convolution_stays():
    conv = parametrizations.weight_norm(nn.Conv2d(8, 8, 1, stride=2))
    seen = []
    conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    model, x = nn.Sequential(conv).eval(), torch.randn(1, 8, 6, 6)
    expected = model(x)
    replace_downsampling(model, x)
    as_subsampling(model)
    torch.testing.assert_close(model(x), expected)
    assert {*seen} == {6}  # others see what comes in
    assert not conv.carafe_downsample.training


def test_convolutions_that_carafe_cannot_stand_before_are_left_alone():
    model = nn.Sequential(
        nn.Conv2d(8, 8, 2, stride=2),
        nn.Conv2d(8, 8, 3, stride=(1, 2), padding=1),
        nn.Conv2d(8, 8, 3, stride=3, padding=1),
    )
    assert replace_downsampling(model, torch.randn(1, 8, 32, 32)) == []
    assert reasons(replace_downsampling(model, torch.randn(1, 8, 32, 32))) == {
        "0.carafe_downsample": "its padding is not half its kernel",
        "1.carafe_downsample": "its factor, 1 x 2, is not one integer above 1",
        "2.carafe_downsample": "factor 3 is above max_scale = 2",
    }


# ------------------------------------------------------------------------------ pooling


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 2},
        {"kernel_size": 2, "ceil_mode": True},
        {"kernel_size": 3, "stride": 2},
        {"kernel_size": 3, "stride": 2, "ceil_mode": True},
        {"kernel_size": (2, 3), "stride": 2, "padding": (0, 1)},
        {"kernel_size": 1, "stride": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("layer", [nn.MaxPool2d, nn.AvgPool2d])
def test_pooling_keeps_its_output_size(layer, arguments):
    class Functional(nn.Module):
        def forward(self, x):
            function = F.max_pool2d if layer is nn.MaxPool2d else F.avg_pool2d
            return function(x, **arguments)

    pool, x = layer(**arguments), torch.randn(2, 8, 9, 8)
    model, functional = nn.Sequential(pool, nn.Identity()), Functional()
    assert names(replace_downsampling(model, x, max_scale=3)) == ["0"]
    assert names(replace_downsampling(functional, x, max_scale=3)) == ["carafe_downsample.0"]
    assert isinstance(model[0], CARAFEPool2d)
    for size in ((9, 8), (8, 9), (11, 12), (4, 3)):
        x = torch.randn(1, 8, *size)
        assert model(x).shape == functional(x).shape == pool(x).shape
    as_subsampling(model)
    factor = pool.stride if isinstance(pool.stride, int) else pool.stride[0]
    rows, columns = pool(x).shape[-2:]
    torch.testing.assert_close(model(x), x[..., ::factor, ::factor][..., :rows, :columns])


def test_pooling_that_is_left_alone():
    model = nn.Sequential(
        nn.MaxPool2d(3, 1, 1),  # does not downsample
        nn.MaxPool2d(5, 2),
        nn.AvgPool2d((2, 1)),
        nn.AvgPool2d(4),
        nn.MaxPool2d(2, return_indices=True),
    )
    report = replace_downsampling(model, torch.randn(1, 8, 64, 32))
    assert report == []
    assert reasons(report) == {
        "1": "its output is more than a pixel off a fraction of its input",
        "2": "its factor, 2 x 1, is not one integer above 1",
        "3": "factor 4 is above max_scale = 2",
        "4": "its indices are put out, too",
    }


def test_calls_are_told_apart():
    torch.manual_seed(0)
    model, x = Pool(), torch.randn(1, 4, 32, 32)
    report = replace_downsampling(model, x)
    assert names(report) == [f"carafe_downsample.{k}" for k in range(4)]
    assert [s.was for s in report] == [f"F.{n}_pool2d" for n in ("max", "max", "avg", "max")]
    packs = as_subsampling(model)
    expected = F.avg_pool2d(x[..., ::2, ::2], 3, stride=1, padding=1)[..., ::8, ::8]
    torch.testing.assert_close(model(x), expected)
    order = []
    for key, pack in enumerate(packs):
        pack.register_forward_hook(lambda *_, key=key: order.append(key))
    model(x)
    assert order == [0, 1, 2, 3]
    model.shared = nn.Identity()
    with pytest.raises(RuntimeError, match="Pool pooled 2 times, but 4 times with the example"):
        model(x)


def test_call_of_another_stride_is_refused():
    class Varying(nn.Module):
        stride = 2

        def forward(self, x):
            return F.max_pool2d(x, self.stride)

    model, x = Varying(), torch.randn(1, 4, 12, 12)
    replace_downsampling(model, x)
    model.stride = 3
    with pytest.raises(RuntimeError, match=r"made for factor 2, but .* stride 3 x 3"):
        model(x)


class Hourglass(nn.Module):
    """Downsamples and upsamples by itself."""

    broken = False

    def forward(self, x):
        x = F.interpolate(F.max_pool2d(x, 2), scale_factor=2)
        if self.broken:
            raise ZeroDivisionError
        return x


def test_both_directions_of_one_module():
    torch.manual_seed(0)
    model, x = Hourglass(), torch.randn(1, 4, 8, 8)
    assert names(replace_downsampling(model, x)) == ["carafe_downsample.0"]
    assert names(replace_upsampling(model, x)) == ["carafe_upsample.0"]
    expected = model.carafe_upsample["0"](model.carafe_downsample["0"](x))
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), expected)
    model.broken = True
    with pytest.raises(ZeroDivisionError):
        model(x)
    assert torch.equal(F.max_pool2d(x, 8), x.amax((2, 3), keepdim=True))  # nothing is left in force


# --------------------------------------------------------------- errors, compile, export


def test_an_error_leaves_the_model_as_it_was():
    class Refusing(nn.Module):
        def forward(self, x):
            raise ValueError("no")

    conv = nn.Conv2d(8, 8, 3, stride=2, padding=1)
    model = nn.Sequential(conv, nn.MaxPool2d(2), Refusing())
    pool, x = model[1], torch.randn(1, 8, 8, 8)
    with pytest.raises(RuntimeError, match="nothing was replaced: ValueError: no"):
        replace_downsampling(model, x)
    assert conv.stride == (2, 2) and [*conv.children()] == [] and model[1] is pool
    with pytest.raises(ValueError, match="down_kernel must be odd, got 4"):
        replace_downsampling(model, x, down_kernel=4)


def test_compiles_and_exports_as_one_graph():
    torch.manual_seed(0)
    torch.compiler.reset()
    conv = nn.Conv2d(4, 4, 3, stride=2, padding=1)
    model, x = nn.Sequential(conv, nn.MaxPool2d(2), Pool()).eval(), torch.randn(1, 4, 64, 64)
    assert len(replace_downsampling(model, x, down_kernel=3)) == 6
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    program = torch.export.export(model, (x,))
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(torch.ops.carafe_d2.carafe_downsample_softmax.default) == 6
    torch.testing.assert_close(program.module()(x), expected)
