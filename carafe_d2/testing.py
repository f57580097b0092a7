"""Inputs and tolerances for checks of the operators: of the test suite, grad_check, collect_env."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
LAYOUTS = ["contiguous", "channels_last", "sliced", "transposed", "expanded", "broadcast"]
TOLERANCE = {F64: (1e-10, 1e-10), F32: (2e-5, 2e-5), F16: (2e-3, 2e-3), BF16: (1.6e-2, 1.6e-2)}
"""By dtype, the relative and the absolute tolerance of results."""


@dataclass(frozen=True)
class Case:
    """Sizes, dtypes and layout of one call of an operator.

    Attributes:
        shape: (N, C, H, W) of the features.
        kernel, group, scale: kernel_size, group_size and scale_factor.
        dtype: of the features.
        kernels_dtype: of masks or logits; default is that of the features.
        layout: of all tensors, one of ``LAYOUTS``.
    """

    shape: tuple[int, int, int, int] = (2, 6, 4, 5)
    kernel: int = 3
    group: int = 1
    scale: int = 2
    dtype: torch.dtype = torch.float64
    kernels_dtype: torch.dtype | None = None
    layout: str = "contiguous"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        if self.kernels_dtype:
            dtype += "+" + str(self.kernels_dtype).removeprefix("torch.")
        size = "x".join(map(str, self.shape))
        return f"{size}-k{self.kernel}-g{self.group}-s{self.scale}-{dtype}-{self.layout}"

    @property
    def parameters(self) -> tuple[int, int, int]:
        return self.kernel, self.group, self.scale

    def inputs(
        self, operator: Callable[..., Tensor] | str, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Random features, and masks or logits, whichever the operator takes; the same each time.

        Args:
            operator: one of ``carafe_d2.ops``, compiled or in plain PyTorch, or its name.
            device: where the tensors are to be.
        """
        n, _, h, w = self.shape
        taps = self.group * self.kernel**2
        name = operator if isinstance(operator, str) else operator.__name__
        if name.startswith("carafe_downsample"):
            kernels_shape = (n, taps, -(-h // self.scale), -(-w // self.scale))
        elif name.startswith("carafe_upsample"):
            kernels_shape = (n, taps * self.scale**2, h, w)
        else:
            kernels_shape = (n, taps, h * self.scale, w * self.scale)
        generator = torch.Generator().manual_seed(0)

        def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            values = torch.randn(shape, dtype=torch.float64, generator=generator)
            # the layout comes last: a change of dtype or device makes every tensor dense
            return self._arrange(values.to(device, dtype)).requires_grad_()

        features = random(self.shape, self.dtype)
        return features, random(kernels_shape, self.kernels_dtype or self.dtype)

    def _arrange(self, tensor: Tensor) -> Tensor:
        if self.layout == "channels_last":
            return tensor.contiguous(memory_format=torch.channels_last)
        if self.layout == "sliced":  # no dimension is dense
            doubled = tensor
            for dim in range(4):
                doubled = doubled.repeat_interleave(2, dim)
            return doubled[::2, ::2, ::2, ::2]
        if self.layout == "transposed":
            return tensor.transpose(2, 3).contiguous().transpose(2, 3)
        if self.layout == "expanded":
            return tensor[:1].expand_as(tensor)
        if self.layout == "broadcast":
            return tensor[:1, :1, :1, :1].expand_as(tensor)
        return tensor


def extreme_logits(logits: Tensor) -> Iterator[Tensor]:
    """The same logits far from zero, where a softmax still has to be right.

    Args:
        logits: (N, C, H, W).

    Yields:
        Tensors with dtype and strides of `logits`: with an offset of up to 1e9, as far as the dtype
        goes; with the lowest number in some channels, as by masking, and in all of one row; beside
        these also with the highest one.
    """
    values, limits = logits.detach(), torch.finfo(logits.dtype)
    for offset in (1e2, -1e2, 1e4, -1e4, 1e6, -1e6, 1e9, -1e9):
        if abs(offset) < limits.max:
            yield values + offset
    masked = values.clone()
    masked[:, ::3] = limits.min
    masked[:, :, 0] = limits.min
    yield masked
    masked = masked.clone()
    masked[:, 1] = limits.max
    yield masked


def check_operator(
    operator: Callable[..., Tensor],
    definition: Callable[..., Tensor],
    case: Case,
    device: torch.device | str = "cpu",
    inputs: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Compares an operator and both its gradients with those of its definition in float64.

    Args:
        inputs: what to call it with; default is ``case.inputs(operator, device)``.

    Returns:
        What the operator gave: its output, the gradient of the features, that of the kernels.

    Raises:
        AssertionError: a result has another dtype than its tensor, or is further from the
            definition's than rounding explains.
    """
    inputs = inputs or case.inputs(operator, device)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
    out = operator(*inputs, *case.parameters)
    expected = definition(*exact, *case.parameters)
    grad_output = torch.randn_like(out)
    results = (out, *torch.autograd.grad(out, inputs, grad_output))
    wanted = (expected, *torch.autograd.grad(expected, exact, grad_output.double()))
    for result, like, exact_result in zip(results, (inputs[0], *inputs), wanted, strict=True):
        if result.dtype != like.dtype:
            raise AssertionError(f"expected {like.dtype}, but got {result.dtype}")
        assert_close(result, exact_result, case)
    return results


def backward_of(operator: Callable[..., Tensor]):
    """The operator that computes the gradients of one of ``carafe_d2.ops``."""
    return getattr(torch.ops.carafe_d2, f"{operator.__name__}_backward")


def assert_close(actual: Tensor, expected: Tensor, case: Case) -> None:
    """Compares results with those of the definition in float64.

    Raises:
        AssertionError: they are further apart than rounding explains.
    """
    # A sum has as many roundings as terms, and half types round what goes in as well as the result.
    lowest = max((case.dtype, case.kernels_dtype or case.dtype), key=lambda t: TOLERANCE[t])
    rtol, atol = TOLERANCE[lowest]
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol * scale)
