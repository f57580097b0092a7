"""CARAFE in plain PyTorch: the definition that the compiled operator is tested against.

Readable and slow. Runs on any device, and autograd differentiates it as often as you like.
"""

import itertools
from collections.abc import Callable
from typing import SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "carafe_downsample_naive",
    "carafe_downsample_softmax_naive",
    "carafe_naive",
    "carafe_upsample_naive",
]


def carafe_naive(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> Tensor:
    """Content-aware reassembly of features (CARAFE, arXiv 1905.02188, section 3.3).

        out[n, c, y, x] = sum over u, v in [-r, r] of
            masks[n, g*k*k + (u+r)*k + (v+r), y, x] * features[n, c, y//s + u, x//s + v]

    with k = `kernel_size`, r = (k-1)/2, s = `scale_factor`, g = c // (C / `group_size`), and
    features zero outside the map. Half types are accumulated in float32.

    Args:
        features: (N, C, H, W).
        masks: (N, group_size*k*k, s*H, s*W).
        kernel_size: k, odd.
        group_size: number of groups of channels that share their weights; divides C.
        scale_factor: s, at least 1.

    Returns:
        (N, C, s*H, s*W), with the dtype of `features`.

    Raises:
        RuntimeError: as the compiled operator: an argument has the wrong type, rank, dtype, device,
            shape or value; the message names it, what was expected and what came.
    """
    check_arguments(features, "masks", masks, kernel_size, group_size, scale_factor)
    n, _, h, w = features.shape
    k, s = kernel_size, scale_factor
    weights = masks.reshape(n * group_size * k * k, h, s, w, s).permute(0, 2, 4, 1, 3)
    weights = weights.reshape(n * group_size, k * k, s * s, h, w)
    return _reassemble(features, weights, k, group_size, s)


def carafe_upsample_naive(
    features: Tensor, kernel_logits: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> Tensor:
    """Kernel normalization and reassembly (arXiv 1905.02188, sections 3.2 and 3.3).

    The same as `carafe_naive` with the masks `softmax(pixel_shuffle(kernel_logits, s))`, the
    softmax over the k*k taps of each group.

    Args:
        features: (N, C, H, W).
        kernel_logits: (N, group_size*k*k*s*s, H, W), what the content encoder puts out.
        kernel_size: k, odd.
        group_size: number of groups of channels that share their weights; divides C.
        scale_factor: s, at least 1.

    Returns:
        (N, C, s*H, s*W), with the dtype of `features`.

    Raises:
        RuntimeError: as the compiled operator: an argument has the wrong type, rank, dtype, device,
            shape or value; the message names it, what was expected and what came.
    """
    check_arguments(features, "kernel_logits", kernel_logits, kernel_size, group_size, scale_factor)
    n, _, h, w = features.shape
    k, s = kernel_size, scale_factor
    logits = kernel_logits.to(_accumulation_dtype(kernel_logits))
    weights = logits.reshape(n * group_size, k * k, s * s, h, w).softmax(dim=1)
    return _reassemble(features, weights, k, group_size, s)


def carafe_downsample_naive(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> Tensor:
    """Content-aware reassembly of fewer pixels (CARAFE++, arXiv 2012.04733).

        out[n, c, y, x] = sum over u, v in [-r, r] of
            masks[n, g*k*k + (u+r)*k + (v+r), y, x] * features[n, c, y*s + u, x*s + v]

    with k, r, s, g and the zeros around the map as in `carafe_naive`, to which it is equal where
    s is one. Half types are accumulated in float32.

    Args:
        features: (N, C, H, W).
        masks: (N, group_size*k*k, ceil(H/s), ceil(W/s)).
        kernel_size: k, odd.
        group_size: number of groups of channels that share their weights; divides C.
        scale_factor: s, at least 1.

    Returns:
        (N, C, ceil(H/s), ceil(W/s)), with the dtype of `features`.

    Raises:
        RuntimeError: as the compiled operator: an argument has the wrong type, rank, dtype, device,
            shape or value; the message names it, what was expected and what came.
    """
    sizes = kernel_size, group_size, scale_factor
    check_arguments(features, "masks", masks, *sizes, downsampling=True)
    n, _, *size = masks.shape
    weights = masks.reshape(n * group_size, kernel_size**2, 1, *size)
    return _reassemble(features, weights, kernel_size, group_size, stride=scale_factor)


def carafe_downsample_softmax_naive(
    features: Tensor, kernel_logits: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> Tensor:
    """Kernel normalization and reassembly of fewer pixels (CARAFE++, arXiv 2012.04733).

    The same as `carafe_downsample_naive` with the masks `softmax(kernel_logits)`, the softmax over
    the k*k taps of each group.

    Args:
        features: (N, C, H, W).
        kernel_logits: (N, group_size*k*k, ceil(H/s), ceil(W/s)), what the content encoder puts out.
        kernel_size: k, odd.
        group_size: number of groups of channels that share their weights; divides C.
        scale_factor: s, at least 1.

    Returns:
        (N, C, ceil(H/s), ceil(W/s)), with the dtype of `features`.

    Raises:
        RuntimeError: as in `carafe_downsample_naive`.
    """
    sizes = kernel_size, group_size, scale_factor
    check_arguments(features, "kernel_logits", kernel_logits, *sizes, downsampling=True)
    logits = kernel_logits.to(_accumulation_dtype(kernel_logits))
    n, _, *size = logits.shape
    weights = logits.reshape(n * group_size, kernel_size**2, 1, *size).softmax(dim=1)
    return _reassemble(features, weights, kernel_size, group_size, stride=scale_factor)


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _reassemble(
    features: Tensor, weights: Tensor, k: int, group: int, s: int = 1, stride: int = 1
) -> Tensor:
    """The sum of section 3.3, one tap at a time.

    No tensor has more than five dimensions, which is as many as some runtimes of ONNX take.

    Args:
        features: (N, C, H, W).
        weights: (N*group, k*k, s*s, rows, columns), for each source location those of its s x s
            output pixels; the order that `torch.nn.functional.pixel_shuffle` undoes.
        stride: of the source locations in the features.
    """
    n, c, h, w = features.shape
    rows, columns = weights.shape[3:]
    padded = F.pad(features.to(_accumulation_dtype(features)), [k // 2] * 4)
    # The channels of a group share its weights, the s x s output pixels their source location.
    padded = padded.reshape(n * group, c // group, 1, *padded.shape[2:])
    taps = itertools.product(range(k), repeat=2)
    out = sum(
        weight * padded[..., u : u + h : stride, v : v + w : stride]  # those (u - r, v - r) away
        for (u, v), weight in zip(taps, weights.to(padded.dtype).split(1, dim=1), strict=True)
    )
    # F.pixel_shuffle, spelled out because its gradient fails for empty batches
    out = out.reshape(n * c, s, s, rows, columns).permute(0, 3, 1, 4, 2)
    return out.reshape(n, c, rows * s, columns * s).to(features.dtype)


# ------------------------------------------------------------------------------------ checks

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def require(condition: object, message: Callable[[], str]) -> None:
    """``torch._check``, also of NumPy's numbers and of the tensors that ``torch.jit.trace`` makes
    of sizes."""
    torch._check(condition if isinstance(condition, torch.SymBool) else bool(condition), message)


def check_tensor(name: str, tensor: Tensor, features: Tensor) -> None:
    require(
        isinstance(tensor, Tensor),
        lambda: f"{name}: expected a tensor, but got {type(tensor).__name__}",
    )
    require(
        tensor.dim() == 4,
        lambda: (
            f"{name}: expected a tensor of rank 4, but got rank {tensor.dim()} "
            f"with shape {tuple(tensor.shape)}"
        ),
    )
    require(
        tensor.dtype in _DTYPES,
        lambda: (
            f"{name}: expected dtype float64, float32, float16 or bfloat16, but got {tensor.dtype}"
        ),
    )
    require(
        tensor.device == features.device,
        lambda: (
            f"{name}: expected a tensor on {features.device}, where features are, "
            f"but got {tensor.device}"
        ),
    )


def check_shape(name: str, tensor: Tensor, expected: tuple, reason: str = "") -> None:
    for size, expected_size in zip(tensor.shape, expected, strict=True):
        require(
            size == expected_size,
            lambda: f"{name}: expected shape {expected}{reason}, but got {tuple(tensor.shape)}",
        )


def downsampled(size: int, scale: int) -> int:
    """The side of what is left of a map, every `scale`-th pixel from the first on."""
    return (size + scale - 1) // scale


def check_arguments(
    features: Tensor,
    name: str,
    kernels: Tensor,
    kernel_size: int,
    groups: int,
    scale: int,
    downsampling: bool = False,
) -> None:
    """What csrc/carafe.cpp checks of the compiled operators; `kernels` are masks or logits."""
    for argument, value in (
        ("kernel_size", kernel_size),
        ("group_size", groups),
        ("scale_factor", scale),
    ):
        require(
            isinstance(value, SupportsIndex),  # also NumPy's integers, and sizes that are traced
            lambda: f"{argument}: expected an integer, but got {value!r}",  # noqa: B023 - at once
        )
    require(
        kernel_size > 0 and kernel_size % 2 == 1,
        lambda: f"kernel_size: expected a positive odd number, but got {kernel_size}",
    )
    require(scale >= 1, lambda: f"scale_factor: expected at least 1, but got {scale}")
    require(groups >= 1, lambda: f"group_size: expected at least 1, but got {groups}")
    check_tensor("features", features, features)
    check_tensor(name, kernels, features)
    require(
        (features.dtype == torch.float64) == (kernels.dtype == torch.float64),
        lambda: (
            f"{name}: expected a dtype that goes with features of {features.dtype}, "
            f"but got {kernels.dtype}"
        ),
    )
    n, c, h, w = features.shape
    require(
        c % groups == 0,
        lambda: f"group_size: expected a divisor of the {c} channels of features, but got {groups}",
    )
    taps = groups * kernel_size**2
    if downsampling:
        expected = (n, taps, downsampled(h, scale), downsampled(w, scale))
    elif name == "kernel_logits":
        expected = (n, taps * scale**2, h, w)
    else:
        expected = (n, taps, h * scale, w * scale)
    check_shape(
        name,
        kernels,
        expected,
        f" for features of shape {tuple(features.shape)} with kernel_size {kernel_size}, "
        f"group_size {groups} and scale_factor {scale}",
    )
