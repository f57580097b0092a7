import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

import carafe_d2
from carafe_d2 import CARAFE, CARAFENaive, CARAFEPack, build_upsampler


def test_modules_call_their_operators():
    features = torch.randn(2, 4, 5, 6)
    masks = torch.randn(2, 2 * 9, 10, 12)
    out = CARAFE(3, 2, 2)(features, masks)
    torch.testing.assert_close(out, carafe_d2.carafe_naive(features, masks, 3, 2, 2))
    torch.testing.assert_close(out, CARAFENaive(3, 2, 2)(features, masks))


def test_pack_is_compress_encode_shuffle_softmax_reassemble():
    """The steps of the paper's section 3, each in plain PyTorch."""
    pack = CARAFEPack(8, 2, up_kernel=3, up_group=2, encoder_dilation=2, compressed_channels=5)
    torch.nn.init.normal_(pack.content_encoder.weight)
    x = torch.randn(2, 8, 7, 5)

    kernels = F.pixel_shuffle(pack.content_encoder(pack.channel_compressor(x)), 2)
    kernels = kernels.view(2, 2, 9, 14, 10).softmax(dim=2)
    neighbours = F.unfold(x, 3, padding=1).view(2, 2, 4, 9, 7, 5)
    neighbours = neighbours.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
    expected = (neighbours * kernels.unsqueeze(2)).sum(dim=3).view(2, 8, 14, 10)

    torch.testing.assert_close(pack(x), expected)


def test_pack_initialisation_is_the_published_one():
    pack = CARAFEPack(256, 2)
    bound = (6 / (256 + 64)) ** 0.5  # Xavier-uniform
    weight = pack.channel_compressor.weight
    assert 0.99 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert pack.content_encoder.weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert not pack.channel_compressor.bias.any()
    assert not pack.content_encoder.bias.any()


def test_pack_parameter_names_and_shapes_are_those_of_mmcv():
    shapes = {name: tuple(p.shape) for name, p in CARAFEPack(256, 2).named_parameters()}
    assert shapes == {
        "channel_compressor.weight": (64, 256, 1, 1),
        "channel_compressor.bias": (64,),
        "content_encoder.weight": (100, 64, 3, 3),
        "content_encoder.bias": (100,),
    }


def test_pack_survives_deepcopy_and_pickle():
    pack = CARAFEPack(4, 2)
    x = torch.randn(1, 4, 3, 3)
    for clone in (copy.deepcopy(pack), pickle.loads(pickle.dumps(pack))):
        assert torch.equal(clone(x), pack(x))


@pytest.mark.parametrize("name", ["carafe", "nearest", "bilinear", "deconv", "pixel_shuffle"])
@pytest.mark.parametrize("scale", [2, 3])
def test_every_upsampler_scales_exactly_and_trains(name, scale):
    upsampler = build_upsampler(name, 8, scale)
    x = torch.randn(2, 8, 5, 7, requires_grad=True)
    out = upsampler(x)
    assert out.shape == (2, 8, 5 * scale, 7 * scale)
    out.square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None for p in upsampler.parameters())


@pytest.mark.parametrize("kernel_size", [2, 3, 4, 5])
def test_deconvolution_kernels(kernel_size):
    out = build_upsampler("deconv", 4, kernel_size=kernel_size)(torch.randn(1, 4, 5, 6))
    assert out.shape == (1, 4, 10, 12)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"up_kernel": 4}, "up_kernel"),
        ({"encoder_kernel": 2}, "encoder_kernel"),
        ({"up_group": 3}, "up_group"),
        ({"compressed_channels": 0}, "compressed_channels"),
        ({"scale_factor": 0}, "scale_factor"),
    ],
)
def test_wrong_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        CARAFEPack(**{"channels": 8, "scale_factor": 2, **arguments})


def test_unknown_upsampler_is_named():
    with pytest.raises(ValueError, match=r"carafe, nearest.*'bicubic'"):
        build_upsampler("bicubic", 8)
