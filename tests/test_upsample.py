import functools

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import carafe_d2
from carafe_d2 import CARAFE, CARAFENaive, CARAFEPack, LazyCARAFEPack, build_upsampler, ops
from carafe_d2.upsample import NORMALIZERS, UPSAMPLERS


def test_modules_call_their_operators():
    features = torch.randn(2, 4, 5, 6)
    masks = torch.randn(2, 2 * 9, 10, 12)
    out = CARAFE(3, 2, 2)(features, masks)
    torch.testing.assert_close(out, carafe_d2.carafe_naive(features, masks, 3, 2, 2))
    torch.testing.assert_close(out, CARAFENaive(3, 2, 2)(features, masks))


def test_ops_has_the_names_of_mmcv_ops_carafe():
    from carafe_d2.ops import CARAFE, CARAFENaive, CARAFEPack, carafe, carafe_naive

    modules = (CARAFE, CARAFENaive, CARAFEPack)
    assert modules == (carafe_d2.CARAFE, carafe_d2.CARAFENaive, carafe_d2.CARAFEPack)
    assert (carafe, carafe_naive) == (carafe_d2.carafe, carafe_d2.carafe_naive)
    with pytest.raises(ImportError, match="CARAFEFunction"):
        from carafe_d2.ops import CARAFEFunction  # noqa: F401


NORMALIZE = {
    "softmax": lambda kernels: kernels.softmax(dim=2),
    "sigmoid": torch.sigmoid,
    "normalized_sigmoid": lambda kernels: kernels.sigmoid() / kernels.sigmoid().sum(2, True),
    "none": lambda kernels: kernels,
}


@pytest.mark.parametrize("compressed_channels", [5, 0])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_pack_is_compress_encode_shuffle_normalize_reassemble(normalizer, compressed_channels):
    """The steps of the paper's section 3, each in plain PyTorch."""
    pack = CARAFEPack(8, 2, 3, 2, 3, 2, compressed_channels, normalizer)
    torch.nn.init.normal_(pack.content_encoder.weight)
    x = torch.randn(2, 8, 7, 5)

    compressed = pack.channel_compressor(x) if compressed_channels else x
    logits = pack.content_encoder(compressed)
    kernels = F.pixel_shuffle(logits, 2)
    kernels = NORMALIZE[normalizer](kernels.view(2, 2, 9, 14, 10))
    neighbors = F.unfold(x, 3, padding=1).view(2, 2, 4, 9, 7, 5)
    neighbors = neighbors.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
    expected = (neighbors * kernels.unsqueeze(2)).sum(dim=3).view(2, 8, 14, 10)
    torch.testing.assert_close(pack.masks(logits), kernels.flatten(1, 2))

    torch.testing.assert_close(pack(x), expected)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (2, 4, 5, 6)])
def test_every_normalizer_trains_also_without_boxes(normalizer, shape):
    pack, x = CARAFEPack(4, 2, normalizer=normalizer), torch.randn(shape, requires_grad=True)
    out = pack(x)
    assert out.shape == (shape[0], 4, 10, 12)
    out.sum().backward()
    assert x.grad.shape == shape
    assert all(p.grad is not None for p in pack.parameters())


def test_kernels_of_normalized_sigmoids_sum_to_one_where_every_sigmoid_is_zero():
    pack = CARAFEPack(4, 2, normalizer="normalized_sigmoid")
    torch.nn.init.constant_(pack.content_encoder.bias, -1e4)
    torch.testing.assert_close(pack(torch.ones(1, 4, 5, 5))[..., 4:6, 4:6], torch.ones(1, 4, 2, 2))


def test_pack_initialization_is_the_published_one():
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


MODULES = {
    "CARAFE": (lambda: CARAFE(3, 2, 2), [(2, 4, 5, 6), (2, 18, 10, 12)]),
    "CARAFENaive": (lambda: CARAFENaive(3, 2, 2), [(2, 4, 5, 6), (2, 18, 10, 12)]),
    **{name: (functools.partial(build_upsampler, name, 4), [(2, 4, 5, 6)]) for name in UPSAMPLERS},
}
EVERY_MODULE = pytest.mark.parametrize(("build", "shapes"), MODULES.values(), ids=MODULES)


@EVERY_MODULE
def test_every_module_can_be_copied(build, shapes, clone):
    module = build()
    tensors = [torch.randn(shape) for shape in shapes]
    assert torch.equal(clone(module)(*tensors), module(*tensors))


@EVERY_MODULE
def test_every_module_runs_on_the_meta_device(build, shapes):
    with torch.device("meta"):
        module = build()
        tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
        out = module(*tensors)
    assert out.is_meta
    assert out.shape == (2, 4, 10, 12)
    out.sum().backward()
    for tensor in (*tensors, *module.parameters()):
        assert tensor.grad.is_meta
        assert tensor.grad.shape == tensor.shape


def test_lazy_pack_takes_its_channels_from_the_first_input():
    lazy = LazyCARAFEPack(3, up_kernel=3, compressed_channels=16)
    assert isinstance(lazy, CARAFEPack)
    assert lazy.channels == 0
    optimizer = torch.optim.SGD(lazy.parameters(), 0.1)  # may be made before
    x = torch.randn(1, 12, 4, 5)
    assert lazy(x).shape == (1, 12, 12, 15)
    assert type(lazy) is CARAFEPack
    assert type(lazy.channel_compressor) is torch.nn.Conv2d
    assert lazy.channels == lazy.channel_compressor.in_channels == 12
    assert 0.1 < lazy.channel_compressor.weight.abs().max() <= (6 / (12 + 16)) ** 0.5
    assert not lazy.channel_compressor.bias.any()

    pack = CARAFEPack(12, 3, up_kernel=3, compressed_channels=16)
    pack.load_state_dict(lazy.state_dict())
    assert torch.equal(pack(x), lazy(x))
    lazy(x).square().sum().backward()
    optimizer.step()
    for name, p in lazy.named_parameters():
        assert not torch.equal(p, pack.get_parameter(name)), name


def test_lazy_pack_keeps_what_was_loaded_or_set_before_the_first_forward(clone):
    pack = CARAFEPack(4, 2)
    torch.nn.init.normal_(pack.content_encoder.weight)
    x = torch.randn(1, 4, 5, 6)
    lazy = LazyCARAFEPack()
    lazy.load_state_dict(pack.state_dict())
    assert torch.equal(clone(lazy)(x), pack(x))
    assert torch.equal(lazy(x), pack(x))
    assert lazy.channels == lazy.channel_compressor.in_channels == 4

    lazy = LazyCARAFEPack()
    torch.nn.init.normal_(lazy.content_encoder.weight)
    weight = lazy.content_encoder.weight.clone()
    lazy(x)
    assert torch.equal(lazy.content_encoder.weight, weight)


def test_lazy_pack_can_be_copied_counted_and_moved_before_the_first_forward(clone):
    lazy = LazyCARAFEPack()
    encoder = sum(p.numel() for p in lazy.content_encoder.parameters())
    assert sum(p.numel() for p in lazy.parameters()) == encoder
    copy = clone(lazy).double()
    assert copy(torch.randn(1, 4, 5, 6, dtype=torch.float64)).dtype == torch.float64
    assert type(copy) is CARAFEPack
    assert type(lazy) is LazyCARAFEPack
    with pytest.raises(RuntimeError, match="group_size: expected a divisor"):
        LazyCARAFEPack(up_group=3)(torch.zeros(1, 4, 5, 6))


def test_initialization_as_in_mmcv():
    conv = torch.nn.Conv2d(40, 60, 3)
    xavier = (2 / (9 * 40 + 9 * 60)) ** 0.5  # its deviation
    ops.xavier_init(conv, gain=2, bias=0.5)
    assert conv.weight.std().item() == pytest.approx(2 * xavier, rel=0.05)
    assert conv.weight.abs().max() > 2 * xavier * 3**0.5
    ops.xavier_init(conv, distribution="uniform")
    assert conv.weight.std().item() == pytest.approx(xavier, rel=0.05)
    assert conv.weight.abs().max() <= xavier * 3**0.5
    assert not conv.bias.any()
    ops.normal_init(conv, mean=1, std=0.01, bias=2)
    assert conv.weight.mean().item() == pytest.approx(1, rel=0.001)
    assert conv.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert torch.equal(conv.bias, torch.full((60,), 2.0))
    ops.normal_init(torch.nn.Conv2d(2, 2, 1, bias=False))
    ops.xavier_init(torch.nn.ReLU())
    with pytest.raises(ValueError, match="distribution must be normal or uniform, got 'other'"):
        ops.xavier_init(conv, distribution="other")


def lively_pack() -> CARAFEPack:
    """In double precision, and with kernels that are far from uniform."""
    torch.manual_seed(0)
    pack = CARAFEPack(4, 2, compressed_channels=8).double()
    torch.nn.init.normal_(pack.content_encoder.weight)
    return pack


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_with_checkpointing(use_reentrant):
    pack, x = lively_pack(), torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    tensors = (x, *pack.parameters())
    expected = torch.autograd.grad(pack(x).square().sum(), tensors)
    checkpoint(pack, x, use_reentrant=use_reentrant).square().sum().backward()
    for tensor, grad in zip(tensors, expected, strict=True):
        assert torch.equal(tensor.grad, grad)


def test_functional_transforms():
    """torch.func: functional_call, grad, vmap of both, and jvp."""
    pack, x = lively_pack(), torch.randn(3, 4, 5, 6, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in pack.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(pack, parameters, (x,)).square().sum()

    assert torch.equal(loss(parameters, x), pack(x).square().sum())
    grads = torch.func.grad(loss)(parameters, x)
    pack(x).square().sum().backward()
    for name, p in pack.named_parameters():
        torch.testing.assert_close(grads[name], p.grad)

    samples = x.unsqueeze(1)
    torch.testing.assert_close(torch.func.vmap(pack)(samples).squeeze(1), pack(x))
    sample_grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, samples)
    for name, grad in grads.items():
        torch.testing.assert_close(sample_grads[name].sum(0), grad)

    direction = torch.randn_like(x)
    _, derivative = torch.func.jvp(lambda x: loss(parameters, x), (x,), (direction,))
    torch.testing.assert_close(
        derivative, (torch.func.grad(loss, argnums=1)(parameters, x) * direction).sum()
    )


def test_forward_mode_derivatives():
    pack, x = lively_pack(), torch.randn(1, 4, 5, 6, dtype=torch.float64)
    direction, step = torch.randn_like(x), 1e-6
    with forward_ad.dual_level():
        derivative = forward_ad.unpack_dual(pack(forward_ad.make_dual(x, direction))).tangent
    difference = (pack(x + step * direction) - pack(x - step * direction)) / (2 * step)
    torch.testing.assert_close(derivative, difference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", UPSAMPLERS)
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
    ("arguments", "message"),
    [
        ({"up_kernel": 4}, "up_kernel must be odd, got 4"),
        ({"up_kernel": -1}, "up_kernel must be an integer of at least 1, got -1"),
        ({"encoder_kernel": 2}, "encoder_kernel must be odd, got 2"),
        ({"encoder_dilation": 0}, "encoder_dilation must be an integer of at least 1, got 0"),
        ({"up_group": 3}, "up_group must divide channels = 8, got 3"),
        ({"up_group": 0}, "up_group must be an integer of at least 1, got 0"),
        ({"compressed_channels": -1}, "compressed_channels must be an integer of at least 1"),
        ({"normalizer": "softMax"}, "normalizer must be one of softmax, sigmoid.*, got 'softMax'"),
        ({"channels": 0}, "channels must be an integer of at least 1, got 0"),
        ({"scale_factor": 0}, "scale_factor must be an integer of at least 1, got 0"),
        ({"scale_factor": 2.0}, r"scale_factor must be an integer of at least 1, got 2\.0"),
        ({"scale_factor": "2"}, "scale_factor must be an integer of at least 1, got '2'"),
        ({"up_kernel": None}, "up_kernel must be an integer of at least 1, got None"),
        ({"name": "nearest", "channels": 0}, "channels must be an integer of at least 1, got 0"),
        ({"name": "bilinear", "scale_factor": 1.5}, r"scale_factor must be an integer.* got 1\.5"),
        ({"name": "deconv", "kernel_size": 0}, "kernel_size 0 cannot upsample exactly by 2"),
        ({"name": "deconv", "scale_factor": 5}, "kernel_size 3 cannot upsample exactly by 5"),
        ({"name": "pixel_shuffle", "kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"name": "lanczos"}, r"carafe, nearest.*'lanczos'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_upsampler(**{"name": "carafe", "channels": 8, **arguments})


@pytest.mark.parametrize(
    ("module", "shapes", "message"),
    [
        (CARAFE(4, 1, 2), [(1, 4, 5, 5), (1, 16, 10, 10)], "kernel_size: expected a positive odd"),
        (CARAFE(3, 3, 2), [(1, 4, 5, 5), (1, 27, 10, 10)], "group_size: expected a divisor"),
        (CARAFE(3, 1, 2), [(1, 4, 5, 5), (1, 9, 5, 5)], r"masks: expected shape \(1, 9, 10, 10\)"),
        (CARAFE(3, 1, 2), [(4, 5, 5), (9, 10, 10)], "features: expected a tensor of rank 4"),
        (CARAFEPack(4, 2), [(4, 5, 5)], "features: expected a tensor of rank 4"),
    ],
)
def test_modules_refuse_wrong_input(module, shapes, message):
    with pytest.raises(RuntimeError, match=message):
        module(*(torch.zeros(shape) for shape in shapes))
