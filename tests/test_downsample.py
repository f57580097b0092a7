import pytest
import torch
from torch.nn import functional as F

import carafe_d2
from carafe_d2 import CARAFEDownsample, CARAFEDownsamplePack
from carafe_d2.upsample import NORMALIZERS


def test_module_calls_its_operator():
    features, masks = torch.randn(2, 4, 5, 6), torch.randn(2, 2 * 9, 3, 3)
    out = CARAFEDownsample(3, 2, 2)(features, masks)
    assert torch.equal(out, carafe_d2.carafe_downsample(features, masks, 3, 2, 2))


@pytest.mark.parametrize("size", [(8, 6), (7, 5), (1, 1)])
@pytest.mark.parametrize("scale", [1, 2, 3])
def test_pack_is_compress_encode_softmax_reassemble(scale, size):
    pack = CARAFEDownsamplePack(8, scale, down_kernel=3, down_group=2, encoder_dilation=2)
    torch.nn.init.normal_(pack.content_encoder.weight)
    x = torch.randn(2, 8, *size)

    kernels = pack.content_encoder(pack.channel_compressor(x))
    rows, columns = (-(-side // scale) for side in size)
    assert kernels.shape == (2, 2 * 9, rows, columns)
    kernels = kernels.view(2, 2, 1, 9, rows, columns).softmax(dim=3)
    neighbors = F.unfold(x, 3, padding=1, stride=scale).view(2, 2, 4, 9, rows, columns)
    torch.testing.assert_close(pack(x), (neighbors * kernels).sum(3).view(2, 8, rows, columns))


@pytest.mark.parametrize("compressed_channels", [0, 8])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_every_normalizer_reassembles_with_its_masks(normalizer, compressed_channels):
    options = {"normalizer": normalizer, "compressed_channels": compressed_channels}
    pack = CARAFEDownsamplePack(4, 2, down_kernel=3, down_group=2, **options)
    torch.nn.init.normal_(pack.content_encoder.weight)
    x = torch.randn(2, 4, 7, 6)
    masks = pack.masks(pack.content_encoder(pack.channel_compressor(x)))
    torch.testing.assert_close(pack(x), carafe_d2.carafe_downsample(x, masks, 3, 2, 2))
    sums = masks.unflatten(1, (2, 9)).sum(2)
    is_normalized = normalizer in ("softmax", "normalized_sigmoid")
    assert torch.allclose(sums, torch.ones(())) == is_normalized


def test_a_fresh_pack_is_nearly_a_mean():
    pack, x = CARAFEDownsamplePack(4, 2, down_kernel=3), torch.randn(1, 4, 12, 12)
    torch.testing.assert_close(pack(x), F.avg_pool2d(x, 3, 2, padding=1), rtol=0, atol=0.02)


def test_pack_learns_which_pixel_to_take():
    """Max pooling is beyond any fixed kernel, but kernels from the content come close."""
    torch.manual_seed(0)
    pack = CARAFEDownsamplePack(4, 2, down_kernel=3)
    optimizer = torch.optim.Adam(pack.parameters(), 0.02)
    losses = []
    for _ in range(60):
        x = torch.rand(4, 1, 16, 16).expand(-1, 4, -1, -1)
        loss = F.mse_loss(pack(x), F.max_pool2d(x, 3, 2, padding=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pack_under_autocast_in_channels_last(dtype):
    pack = CARAFEDownsamplePack(8, 2).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 9, 7).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = pack(x.to(dtype))
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.float(), pack(x), rtol=0.02, atol=0.02)


def test_pack_can_be_copied_and_runs_on_the_meta_device(clone):
    pack, x = CARAFEDownsamplePack(4, 2), torch.randn(1, 4, 5, 6)
    assert torch.equal(clone(pack)(x), pack(x))
    assert pack.to("meta")(x.to("meta")).shape == (1, 4, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"down_kernel": 4}, "down_kernel must be odd, got 4"),
        ({"down_group": 3}, "down_group must divide channels = 8, got 3"),
        ({"scale_factor": 0}, "scale_factor must be an integer of at least 1, got 0"),
        ({"compressed_channels": -1}, "compressed_channels must be an integer of at least 1"),
        ({"normalizer": "relu"}, "normalizer must be one of softmax, sigmoid"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CARAFEDownsamplePack(**{"channels": 8, "scale_factor": 2, **arguments})
