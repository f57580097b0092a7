"""CARAFE, the compiled operator: loading, shapes, gradients and FLOPs.

Four operators, each on CPU and CUDA, differentiable once in both tensors:

- `torch.ops.carafe_d2.carafe`: reassembly with masks that are given.
- `torch.ops.carafe_d2.carafe_upsample`: pixel shuffle, softmax and reassembly in one pass, from
  what the content encoder puts out. Keeps only its two inputs for the backward.
- `carafe_downsample` and `carafe_downsample_softmax`: the same two for fewer pixels (CARAFE++).

Features and masks may differ in dtype among float32, float16 and bfloat16, so nothing has to be
cast under autocast. The definition of both is in `carafe_d2.reference`; it runs in the operator's
place where something has to see inside: ONNX export, `torch.func`, forward-mode derivatives.
"""

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from .import_hooks import when_imported
from .reference import (
    carafe_downsample_naive,
    carafe_downsample_softmax_naive,
    carafe_naive,
    carafe_upsample_naive,
    check_arguments,
    check_shape,
    check_tensor,
    downsampled,
    require,
)

__all__ = [
    "DECOMPOSITIONS",
    "carafe",
    "carafe_downsample",
    "carafe_downsample_softmax",
    "carafe_upsample",
    "flop_count_ops",
]

_LIBRARY = Path(__file__).with_name("_C.so")
_HOW_TO_BUILD = (
    "Build it with `pip install -e . --no-build-isolation` in a checkout of carafe-d2 "
    "(needs PyTorch 2.10 or later and g++; nvcc for GPUs)."
)


def _load_library() -> None:
    if not _LIBRARY.exists():
        raise ImportError(f"The compiled operator of carafe_d2 is missing. {_HOW_TO_BUILD}")
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        raise ImportError(
            f"The compiled operator of carafe_d2 does not load with PyTorch {torch.__version__}: "
            f"{error}. {_HOW_TO_BUILD}"
        ) from error


_load_library()

DECOMPOSITIONS: dict[torch._ops.OpOverload, Callable[..., Tensor]] = {
    torch.ops.carafe_d2.carafe.default: carafe_naive,
    torch.ops.carafe_d2.carafe_upsample.default: carafe_upsample_naive,
    torch.ops.carafe_d2.carafe_downsample.default: carafe_downsample_naive,
    torch.ops.carafe_d2.carafe_downsample_softmax.default: carafe_downsample_softmax_naive,
}
"""The operators in PyTorch's own, for :meth:`torch.export.ExportedProgram.run_decompositions`."""

_functorch_is_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def _call(operator: torch._ops.OpOverload, *arguments: Tensor | int) -> Tensor:
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        # ONNX has no such operator; everything else that traces takes it as it is.
        decompose = torch.onnx.is_in_onnx_export()
    elif torch.compiler.is_compiling():
        decompose = False
    else:
        # torch.func cannot transform it, and forward-mode derivatives would silently be zero.
        decompose = _functorch_is_active() or getattr(forward_ad, "_current_level", -1) >= 0
    return (DECOMPOSITIONS[operator] if decompose else operator)(*arguments)


def carafe(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> Tensor:
    """Content-aware reassembly of features (CARAFE, arXiv 1905.02188, section 3.3).

    Every output pixel is a weighted sum of the k x k features around its source location, with k =
    `kernel_size`, s = `scale_factor` and weights of its own. Features outside the map are zero.

    Args:
        features: (N, C, H, W), float64, float32, float16 or bfloat16. Contiguous and channels_last
            are used as they are.
        masks: (N, group_size*k*k, s*H, s*W), the weights, usually normalized over each k*k. Of
            float64 if features are, otherwise of any of the other three dtypes.
        kernel_size: k, odd.
        group_size: number of groups of channels that share their weights; divides C.
        scale_factor: s, at least 1.

    Returns:
        (N, C, s*H, s*W), with dtype and memory format of `features`.

    Raises:
        RuntimeError: an argument has the wrong rank, dtype, device, shape or value; the message
            names it, what was expected and what came.
    """
    operator = torch.ops.carafe_d2.carafe.default
    return _call(operator, features, masks, kernel_size, group_size, scale_factor)


def carafe_upsample(
    features: Tensor, kernel_logits: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> Tensor:
    """Kernel normalization and reassembly in one pass (arXiv 1905.02188, sections 3.2 and 3.3).

    The same as `carafe` with the masks `softmax(pixel_shuffle(kernel_logits, s))`, the softmax over
    the k*k taps of each group, but without ever storing these masks.

    Args:
        features: (N, C, H, W), as in `carafe`.
        kernel_logits: (N, group_size*k*k*s*s, H, W), what the content encoder puts out.
        kernel_size: k, odd.
        group_size: number of groups of channels that share their weights; divides C.
        scale_factor: s, at least 1.

    Returns:
        (N, C, s*H, s*W), with dtype and memory format of `features`.

    Raises:
        RuntimeError: as in `carafe`.
    """
    operator = torch.ops.carafe_d2.carafe_upsample.default
    return _call(operator, features, kernel_logits, kernel_size, group_size, scale_factor)


def carafe_downsample(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> Tensor:
    """Content-aware reassembly of fewer pixels (CARAFE++, arXiv 2012.04733).

    Every output pixel (y, x) is a weighted sum of the k x k features around (y*s, x*s), with k =
    `kernel_size`, s = `scale_factor` and weights of its own. Features outside the map are zero.

    Args:
        features: (N, C, H, W), as in `carafe`.
        masks: (N, group_size*k*k, ceil(H/s), ceil(W/s)), the weights, with dtypes as in `carafe`.
        kernel_size: k, odd.
        group_size: number of groups of channels that share their weights; divides C.
        scale_factor: s, at least 1.

    Returns:
        (N, C, ceil(H/s), ceil(W/s)), with dtype and memory format of `features`.

    Raises:
        RuntimeError: as in `carafe`.
    """
    operator = torch.ops.carafe_d2.carafe_downsample.default
    return _call(operator, features, masks, kernel_size, group_size, scale_factor)


def carafe_downsample_softmax(
    features: Tensor, kernel_logits: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> Tensor:
    """Kernel normalization and reassembly of fewer pixels in one pass (CARAFE++).

    The same as `carafe_downsample` with the masks `softmax(kernel_logits)`, the softmax over the
    k*k taps of each group, but without ever storing these masks.

    Args:
        features: (N, C, H, W), as in `carafe`.
        kernel_logits: (N, group_size*k*k, ceil(H/s), ceil(W/s)), what the content encoder puts out.
        kernel_size: k, odd.
        group_size: number of groups of channels that share their weights; divides C.
        scale_factor: s, at least 1.

    Returns:
        (N, C, ceil(H/s), ceil(W/s)), with dtype and memory format of `features`.

    Raises:
        RuntimeError: as in `carafe`.
    """
    operator = torch.ops.carafe_d2.carafe_downsample_softmax.default
    return _call(operator, features, kernel_logits, kernel_size, group_size, scale_factor)


# ------------------------------------------------------------------------ shapes: fake kernels


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """Layout of what is made like `tensor`; `is_channels_last` in csrc/carafe.cpp must agree."""
    if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=_memory_format(tensor))


def _check_grad_output(grad_output: Tensor, features: Tensor, size: tuple[int, ...]) -> None:
    check_tensor("grad_output", grad_output, features)
    require(
        grad_output.dtype == features.dtype,
        lambda: (
            f"grad_output: expected dtype {features.dtype} as features have, "
            f"but got {grad_output.dtype}"
        ),
    )
    check_shape("grad_output", grad_output, size)


# ---------------------------------------------------- registration with the parts of PyTorch


def _register(operator: str, kernels_name: str) -> None:
    """Registers fake kernels, autograd and FLOPs of one operator and its backward operator.

    Args:
        operator: its name.
        kernels_name: its name for its second argument.
    """
    forward_op = getattr(torch.ops.carafe_d2, operator)
    backward_op = getattr(torch.ops.carafe_d2, f"{operator}_backward")
    downsampling = "downsample" in operator

    def output_size(features_shape, scale_factor):
        n, c, h, w = features_shape
        if downsampling:
            return n, c, downsampled(h, scale_factor), downsampled(w, scale_factor)
        return n, c, h * scale_factor, w * scale_factor

    def check(features, kernels, *sizes):
        check_arguments(features, kernels_name, kernels, *sizes, downsampling)

    @torch.library.register_fake(f"carafe_d2::{operator}")
    def forward_fake(features, kernels, kernel_size, group_size, scale_factor):
        check(features, kernels, kernel_size, group_size, scale_factor)
        return torch.empty(
            output_size(features.shape, scale_factor),
            dtype=features.dtype,
            device=features.device,
            memory_format=_memory_format(features),
        )

    @torch.library.register_fake(f"carafe_d2::{operator}_backward")
    def backward_fake(
        grad_output,
        features,
        kernels,
        kernel_size,
        group_size,
        scale_factor,
        features_grad,
        kernels_grad,
    ):
        check(features, kernels, kernel_size, group_size, scale_factor)
        _check_grad_output(grad_output, features, output_size(features.shape, scale_factor))
        return (
            _empty_like(features) if features_grad else features.new_empty(0),
            _empty_like(kernels) if kernels_grad else kernels.new_empty(0),
        )

    def setup_context(ctx, inputs, output):
        features, kernels, *ctx.sizes = inputs
        ctx.save_for_backward(features, kernels)

    def backward(ctx, grad_output):
        features, kernels = ctx.saved_tensors
        features_grad, kernels_grad, *_ = ctx.needs_input_grad
        grad_features, grad_kernels = backward_op(
            grad_output, features, kernels, *ctx.sizes, features_grad, kernels_grad
        )
        return (
            grad_features if features_grad else None,
            grad_kernels if kernels_grad else None,
            *[None] * len(ctx.sizes),
        )

    def backward_twice(ctx, *grads):
        raise NotImplementedError(f"{operator} is differentiable once, not twice")

    torch.library.register_autograd(f"carafe_d2::{operator}", backward, setup_context=setup_context)
    torch.library.register_autograd(f"carafe_d2::{operator}_backward", backward_twice)

    # A multiplication and an addition per output value and tap, as PyTorch counts convolutions.
    # Normalizing the kernels is not counted, just as PyTorch does not count softmax.
    def reassembly_flops(features_shape, kernel_size, scale_factor):
        return 2 * math.prod(output_size(features_shape, scale_factor)) * kernel_size**2

    @register_flop_formula(forward_op)
    def forward_flops(features_shape, kernels_shape, kernel_size, group_size, scale_factor, **_):
        return reassembly_flops(features_shape, kernel_size, scale_factor)

    @register_flop_formula(backward_op)
    def backward_flops(
        grad_output_shape,
        features_shape,
        kernels_shape,
        kernel_size,
        group_size,
        scale_factor,
        features_grad,
        kernels_grad,
        **_,
    ):
        gradients = int(features_grad) + int(kernels_grad)
        return gradients * reassembly_flops(features_shape, kernel_size, scale_factor)


_register("carafe", "masks")
_register("carafe_upsample", "kernel_logits")
_register("carafe_downsample", "masks")
_register("carafe_downsample_softmax", "kernel_logits")


def _multiply_adds(inputs: list, outputs: list) -> int:
    """Cost of one node of a traced graph as fvcore counts it: a multiply-add is one."""
    kernel_size = inputs[2].toIValue()
    return math.prod(outputs[0].type().sizes()) * kernel_size**2


flop_count_ops = {operator.name(): _multiply_adds for operator in DECOMPOSITIONS}
"""For `fvcore.nn.FlopCountAnalysis(...).set_op_handle(**flop_count_ops)`.

Needed only with an fvcore that lacks the table of defaults to which they are added here.
"""


def _register_with_fvcore() -> None:
    flop_count = importlib.import_module("fvcore.nn.flop_count")
    getattr(flop_count, "_DEFAULT_SUPPORTED_OPS", {}).update(flop_count_ops)


when_imported("fvcore.nn.flop_count", _register_with_fvcore)


def __getattr__(name: str) -> Any:
    """What ``mmcv.ops.carafe`` has beside the operator, so that changing an import is enough."""
    if name in ("CARAFE", "CARAFENaive", "CARAFEPack", "normal_init", "xavier_init"):
        return getattr(importlib.import_module(".upsample", __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
