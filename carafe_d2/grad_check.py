"""Checks the gradients of CARAFE on the device at hand, and times it.

`python -m carafe_d2.grad_check` compares analytical with numerical gradients in float64 for the
compiled operators and for their plain-PyTorch definition, then prints what a forward and a backward
of each take. The same question as MMDetection's grad_check answers, for CPUs as well.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .ops import carafe, carafe_downsample, carafe_downsample_softmax, carafe_upsample
from .reference import (
    carafe_downsample_naive,
    carafe_downsample_softmax_naive,
    carafe_naive,
    carafe_upsample_naive,
)
from .testing import Case

OPERATORS: dict[str, Callable[..., Tensor]] = {
    "carafe": carafe,
    "carafe_naive": carafe_naive,
    "carafe_upsample": carafe_upsample,
    "carafe_upsample_naive": carafe_upsample_naive,
    "carafe_downsample": carafe_downsample,
    "carafe_downsample_naive": carafe_downsample_naive,
    "carafe_downsample_softmax": carafe_downsample_softmax,
    "carafe_downsample_softmax_naive": carafe_downsample_softmax_naive,
}


def case_of(args: argparse.Namespace, shape: Sequence[int], dtype: torch.dtype) -> Case:
    n, c, h, w = shape
    return Case((n, c, h, w), args.kernel, args.group, args.scale, dtype)


def gradients_agree(name: str, args: argparse.Namespace) -> bool:
    """Whether the gradients of an operator are those of its forward, in float64."""
    case = case_of(args, args.check_shape, torch.float64)

    def function(features: Tensor, kernels: Tensor) -> Tensor:
        return OPERATORS[name](features, kernels, *case.parameters)

    return torch.autograd.gradcheck(function, case.inputs(name, args.device), raise_exception=False)


def measure(name: str, args: argparse.Namespace) -> tuple[float, float]:
    """Median milliseconds of a forward and of a backward."""
    case = case_of(args, args.shape, getattr(torch, args.dtype))
    inputs = case.inputs(name, args.device)

    def now() -> float:
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        return time.perf_counter()

    forward, backward = [], []
    grad = None
    for iteration in range(args.iterations + 1):
        start = now()
        out = OPERATORS[name](*inputs, *case.parameters)
        middle = now()
        grad = torch.ones_like(out) if grad is None else grad
        before = now()
        torch.autograd.grad(out, inputs, grad)
        end = now()
        if iteration:  # the first one warms up
            forward.append(middle - start)
            backward.append(end - before)
    return 1e3 * median(forward), 1e3 * median(backward)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m carafe_d2.grad_check",
        description="Check the gradients of CARAFE in float64 and time forward and backward.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    size: dict[str, Any] = {"type": int, "nargs": 4, "metavar": ("N", "C", "H", "W")}
    parser.add_argument("--shape", **size, default=None, help="features that are timed; default: "
                        "2 1024 100 100 on a GPU, 1 256 50 68 on a CPU")  # fmt: skip
    parser.add_argument("--check-shape", **size, default=[2, 4, 3, 4], help="features of the check")
    parser.add_argument("--kernel", type=int, default=5, help="kernel size of the reassembly")
    parser.add_argument("--group", type=int, default=1, help="groups of channels")
    parser.add_argument("--scale", type=int, default=2, help="scale factor")
    parser.add_argument(
        "--dtype",
        choices=["float32", "float64", "float16", "bfloat16"],
        default="float32",
        help="dtype that is timed",
    )
    parser.add_argument("--device", default=None, help="default: a GPU where there is one, or cpu")
    parser.add_argument("--iterations", type=int, default=5, help="timed repetitions")
    args = parser.parse_args(argv)
    if args.iterations < 1:
        parser.error(f"--iterations: expected at least 1, but got {args.iterations}")
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.shape is None:
        args.shape = [2, 1024, 100, 100] if args.device.type == "cuda" else [1, 256, 50, 68]
    return args


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns the exit status: 1 if a gradient is wrong, 2 for wrong options."""
    args = parse_args(argv)
    torch.manual_seed(0)
    try:
        for shape in (args.check_shape, args.shape):
            case = case_of(args, [*shape[:2], 1, 1], torch.float32)
            carafe(*case.inputs("carafe", args.device), *case.parameters)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = (
        torch.cuda.get_device_name(args.device)
        if args.device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )
    print(f"CARAFE on {device}: kernel {args.kernel}, group {args.group}, scale {args.scale}")
    print(f"gradients checked in float64 on features {tuple(args.check_shape)}")
    print(f"times in {args.dtype} on features {tuple(args.shape)}\n")
    print(f"{'operator':<32}{'gradients':>10}{'forward':>15}{'backward':>15}")
    all_agree = True
    for name in OPERATORS:
        agree = gradients_agree(name, args)
        forward, backward = measure(name, args)
        verdict = "ok" if agree else "WRONG"
        print(f"{name:<32}{verdict:>10}{forward:>12.2f} ms{backward:>12.2f} ms", flush=True)
        all_agree &= agree
    return 0 if all_agree else 1


if __name__ == "__main__":
    sys.exit(main())
