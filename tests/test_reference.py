"""The plain-PyTorch definition, against the formula of the design written as loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from carafe_d2 import ops, reference
from carafe_d2.reference import (
    carafe_downsample_naive,
    carafe_downsample_softmax_naive,
    carafe_naive,
    carafe_upsample_naive,
)
from carafe_d2.testing import Case


def carafe_by_loops(features, masks, kernel_size, group_size, scale_factor):
    """The formula, one multiplication at a time."""
    n, c, height, width = features.shape
    k, s, r = kernel_size, scale_factor, kernel_size // 2
    out = np.zeros((n, c, height * s, width * s))
    for b, channel, y, x in np.ndindex(out.shape):
        group = channel // (c // group_size)
        for u in range(-r, r + 1):
            for v in range(-r, r + 1):
                h, w = y // s + u, x // s + v
                if 0 <= h < height and 0 <= w < width:
                    tap = group * k * k + (u + r) * k + (v + r)
                    out[b, channel, y, x] += masks[b, tap, y, x] * features[b, channel, h, w]
    return out


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize(("group_size", "scale_factor"), [(1, 1), (1, 2), (2, 3), (4, 2)])
def test_carafe_naive_is_the_formula(kernel_size, group_size, scale_factor):
    torch.manual_seed(0)
    features = torch.randn(2, 4, 3, 4, dtype=torch.float64)
    masks = torch.randn(
        2, group_size * kernel_size**2, 3 * scale_factor, 4 * scale_factor, dtype=torch.float64
    )
    out = carafe_naive(features, masks, kernel_size, group_size, scale_factor)
    expected = carafe_by_loops(
        features.numpy(), masks.numpy(), kernel_size, group_size, scale_factor
    )
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-12, atol=1e-12)


def carafe_downsample_by_loops(features, masks, kernel_size, group_size, scale_factor):
    """The formula, one multiplication at a time."""
    n, c, height, width = features.shape
    k, s, r = kernel_size, scale_factor, kernel_size // 2
    out = np.zeros((n, c, *masks.shape[2:]))
    for b, channel, y, x in np.ndindex(out.shape):
        group = channel // (c // group_size)
        for u in range(-r, r + 1):
            for v in range(-r, r + 1):
                h, w = y * s + u, x * s + v
                if 0 <= h < height and 0 <= w < width:
                    tap = group * k * k + (u + r) * k + (v + r)
                    out[b, channel, y, x] += masks[b, tap, y, x] * features[b, channel, h, w]
    return out


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize(("group_size", "scale_factor"), [(1, 1), (1, 2), (2, 3), (4, 9)])
def test_carafe_downsample_naive_is_the_formula(kernel_size, group_size, scale_factor):
    case = Case((2, 4, 6, 7), kernel_size, group_size, scale_factor)
    features, masks = (t.detach() for t in case.inputs(carafe_downsample_naive))
    out = carafe_downsample_naive(features, masks, *case.parameters)
    expected = carafe_downsample_by_loops(features.numpy(), masks.numpy(), *case.parameters)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_carafe_downsample_softmax_naive_normalizes_and_reassembles():
    features, logits = Case(group=2).inputs(carafe_downsample_softmax_naive)
    masks = logits.unflatten(1, (2, 9)).softmax(2).flatten(1, 2)
    out = carafe_downsample_softmax_naive(features, logits, 3, 2, 2)
    torch.testing.assert_close(out, carafe_downsample_naive(features, masks, 3, 2, 2))


def test_scale_one_is_neither_up_nor_down():
    features, masks = Case(scale=1).inputs(carafe_naive)
    assert torch.equal(
        carafe_downsample_naive(features, masks, 3, 1, 1), carafe_naive(features, masks, 3, 1, 1)
    )


@pytest.mark.parametrize(("group_size", "scale_factor"), [(1, 2), (2, 3), (2, 1)])
def test_carafe_upsample_naive_shuffles_normalizes_reassembles(group_size, scale_factor):
    torch.manual_seed(0)
    k, s = 3, scale_factor
    features = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    logits = torch.randn(2, group_size * k * k * s * s, 3, 5, dtype=torch.float64)
    shuffled = F.pixel_shuffle(logits, s)
    masks = shuffled.view(2, group_size, k * k, 3 * s, 5 * s).softmax(2).view_as(shuffled)
    out = carafe_upsample_naive(features, logits, k, group_size, s)
    torch.testing.assert_close(out, carafe_naive(features, masks, k, group_size, s))


def test_constant_features_stay_constant_inside():
    """Normalized kernels sum to one, so only the zeros around the map change a constant."""
    logits = torch.randn(1, 9 * 4, 6, 7)
    out = carafe_upsample_naive(torch.full((1, 2, 6, 7), 3.0), logits, 3, 1, 2)
    torch.testing.assert_close(out[..., 2:-2, 2:-2], torch.full((1, 2, 8, 10), 3.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_accumulate_in_float32(dtype):
    features, masks = torch.randn(1, 4, 5, 5, dtype=dtype), torch.rand(1, 25, 10, 10, dtype=dtype)
    out = carafe_naive(features, masks, 5, 1, 2)
    exact = carafe_naive(features.double(), masks.double(), 5, 1, 2)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_naive_is_differentiable_twice():
    features = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    masks = torch.randn(1, 9, 6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda f, m: carafe_naive(f, m, 3, 1, 2), (features, masks))


EVERY_OPERATOR = pytest.mark.parametrize(
    "operator",
    [getattr(reference, name) for name in reference.__all__]
    + [getattr(ops, name.removesuffix("_naive")) for name in reference.__all__],
)


def valid_arguments(operator):
    return {
        "features": torch.zeros(1, 4, 5, 5),
        "kernels": Case((1, 4, 5, 5), kernel=5, dtype=torch.float32).inputs(operator)[1].detach(),
        "kernel_size": 5,
        "group_size": 1,
        "scale_factor": 2,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": torch.zeros(4, 5, 5)}, "features: expected .* rank 4"),
        ({"features": [[0.0]]}, "features"),
        ({"features": torch.zeros(1, 4, 5, 5, dtype=torch.int64)}, "features: expected dtype"),
        ({"features": torch.zeros(1, 4, 5, 5, dtype=torch.complex64)}, "features: expected dtype"),
        ({"features": torch.zeros(1, 4, 5, 5, dtype=torch.float64)}, "expected (a )?dtype"),
        ({"kernels": torch.zeros(1, 100, 10, 11)}, "expected shape .*but got .1, 100, 10, 11"),
        ({"kernels": torch.zeros(1, 100, 5, 5, device="meta")}, "expected a tensor on cpu"),
        ({"kernels": None}, "masks|kernel_logits"),
        ({"kernel_size": 4}, "kernel_size: expected a positive odd number, but got 4"),
        ({"kernel_size": -3}, "kernel_size: expected a positive odd number, but got -3"),
        ({"kernel_size": "5"}, "kernel_size"),
        ({"scale_factor": 0}, "scale_factor: expected at least 1, but got 0"),
        ({"group_size": 0}, "group_size: expected at least 1, but got 0"),
        ({"group_size": 3}, "group_size: expected a divisor of the 4 channels"),
    ],
)
@EVERY_OPERATOR
def test_definition_and_operator_refuse_the_same(operator, changes, message):
    with pytest.raises(RuntimeError, match=message):
        operator(*(valid_arguments(operator) | changes).values())


@EVERY_OPERATOR
@pytest.mark.parametrize("integer", [int, np.int64, torch.tensor])
def test_definition_and_operator_take_the_same_integers(operator, integer):
    features, kernels, *sizes = valid_arguments(operator).values()
    out = operator(features, kernels, *map(integer, sizes))
    assert torch.equal(out, operator(features, kernels, *sizes))
