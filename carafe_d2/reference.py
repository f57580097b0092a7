"""CARAFE in plain PyTorch: the definition that the compiled operator is tested against.

Readable and slow. Runs on any device, and autograd differentiates it as often as you like.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["carafe_naive", "carafe_upsample_naive"]


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
        ValueError: a size or a value does not fit; the message names the argument.
    """
    _check(features, kernel_size, group_size, scale_factor)
    n, _, h, w = features.shape
    k, s = kernel_size, scale_factor
    expected = (n, group_size * k * k, s * h, s * w)
    if masks.shape != expected:
        raise ValueError(f"masks: expected shape {expected}, but got {tuple(masks.shape)}")

    weights = masks.reshape(n, group_size, k * k, h, s, w, s).permute(0, 1, 2, 4, 6, 3, 5)
    return _reassemble(features, weights, k)


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
        ValueError: a size or a value does not fit; the message names the argument.
    """
    _check(features, kernel_size, group_size, scale_factor)
    n, _, h, w = features.shape
    k, s = kernel_size, scale_factor
    expected = (n, group_size * k * k * s * s, h, w)
    if kernel_logits.shape != expected:
        raise ValueError(
            f"kernel_logits: expected shape {expected}, but got {tuple(kernel_logits.shape)}"
        )
    logits = kernel_logits.to(_accumulation_dtype(kernel_logits))
    weights = logits.reshape(n, group_size, k * k, s, s, h, w).softmax(dim=2)
    return _reassemble(features, weights, k)


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _reassemble(features: Tensor, weights: Tensor, k: int) -> Tensor:
    """The sum of section 3.3, one tap at a time.

    Args:
        features: (N, C, H, W).
        weights: (N, group, k*k, s, s, H, W), for each source location those of its s x s output
            pixels; the order that `torch.nn.functional.pixel_shuffle` undoes.
    """
    n, c, h, w = features.shape
    group, _, s = weights.shape[1:4]
    padded = F.pad(features.to(_accumulation_dtype(features)), [k // 2] * 4)
    # The channels of a group share its weights, the s x s output pixels their source location.
    padded = padded.reshape(n, group, c // group, 1, *padded.shape[2:])
    weights = weights.to(padded.dtype).reshape(n, group, k * k, s * s, h, w)
    taps = itertools.product(range(k), repeat=2)
    out = sum(
        weight * padded[..., u : u + h, v : v + w]  # the features at (h + u - r, w + v - r)
        for (u, v), weight in zip(taps, weights.split(1, dim=2), strict=True)
    )
    # F.pixel_shuffle, spelled out because its gradient fails for empty batches
    out = out.reshape(n, c, s, s, h, w).permute(0, 1, 4, 2, 5, 3)
    return out.reshape(n, c, h * s, w * s).to(features.dtype)


def _check(features: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> None:
    if features.dim() != 4:
        raise ValueError(
            f"features: expected a tensor of rank 4, but got shape {tuple(features.shape)}"
        )
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size: expected a positive odd number, but got {kernel_size}")
    if scale_factor < 1:
        raise ValueError(f"scale_factor: expected at least 1, but got {scale_factor}")
    if group_size < 1 or features.shape[1] % group_size:
        raise ValueError(
            f"group_size: expected a divisor of the {features.shape[1]} channels of features, "
            f"but got {group_size}"
        )
