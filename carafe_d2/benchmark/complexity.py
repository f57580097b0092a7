"""Prints what every upsampler costs: the columns FLOPs and Params of the paper's comparison.

The figures are counted on the modules themselves, per location of the input map, as the paper
counts (arXiv 1905.02188, sections 3.4 and 4): a multiplication and an addition are two operations,
a bias is one more weight, and kernel normalization is free. PyTorch's own counter leaves biases
and interpolation out; its figure is printed beside.

Example:
    python -m carafe_d2.benchmark.complexity --channels 256 --scale 2 --up-kernel 3 5 7
"""

import argparse
import inspect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from ..errors import UserError, exit_on_user_error
from ..files import format_table
from ..upsample import UPSAMPLERS, build_upsampler

aten = torch.ops.aten


def convolution_flops(
    x_shape, weight_shape, bias_shape, stride, padding, dilation, transposed, *_, out_shape, **__
) -> int:
    flops = conv_flop_count(x_shape, weight_shape, out_shape, transposed=transposed)
    return flops + (2 * math.prod(out_shape) if bias_shape else 0)


def bilinear_flops(*_, out_shape, **__) -> int:
    return 2 * 4 * math.prod(out_shape)  # each value is a weighted sum of four


AS_THE_PAPER_COUNTS = {
    aten.convolution: convolution_flops,
    aten.upsample_bilinear2d: bilinear_flops,
}


@dataclass
class Cost:
    """What a module costs.

    Attributes:
        parameters: how many it has.
        flops: operations for each location of the input map.
        torch_flops: the same by PyTorch's own counting.
    """

    parameters: int
    flops: int
    torch_flops: int


def cost_of(name: str, channels: int, scale: int, size: tuple[int, int], **options: int) -> Cost:
    """Counts the cost of an upsampler.

    Args:
        name: one of ``UPSAMPLERS``.
        channels: channels of its input and output.
        scale: its upsampling ratio.
        size: height and width of the input map.
        **options: further arguments of :func:`carafe_d2.build_upsampler`.

    Raises:
        UserError: an argument is out of its range.
    """
    try:
        with torch.device("meta"):  # counting needs shapes only
            module = build_upsampler(name, channels, scale, **options)
            features = torch.empty(1, channels, *size)
    except ValueError as error:
        raise UserError(f"{name}: {error}; --help lists the options") from error

    def flops(mapping: dict) -> int:
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            module(features)
        return round(counter.get_total_flops() / math.prod(size))

    parameters = sum(p.numel() for p in module.parameters())
    return Cost(parameters, flops(AS_THE_PAPER_COUNTS), flops({}))


def paper_flops(
    channels: int,
    scale: int,
    up_kernel: int = 5,
    up_group: int = 1,
    encoder_kernel: int = 3,
    encoder_dilation: int = 1,
    compressed_channels: int = 64,
) -> int:
    """Operations of CARAFE for each input location by the formula of the paper's section 3.4.

    The paper has no groups: each has kernels of its own to predict.
    """
    kernels = up_group * scale**2 * up_kernel**2
    compress = 2 * (channels + 1) * compressed_channels
    encode = 2 * ((compressed_channels or channels) * encoder_kernel**2 + 1) * kernels
    reassemble = 2 * scale**2 * up_kernel**2 * channels
    return compress + encode + reassemble


def rows_of(args: argparse.Namespace) -> list[tuple[str, dict[str, int]]]:
    """Name and options of every row of the table."""
    carafe = {
        "up_kernel": args.up_kernel,
        "up_group": args.up_group,
        "encoder_kernel": args.encoder_kernel,
        "encoder_dilation": args.encoder_dilation,
        "compressed_channels": args.compressed_channels,
    }
    options = {
        "carafe": [
            dict(zip(carafe, values, strict=True)) for values in itertools.product(*carafe.values())
        ],
        "deconv": [{"kernel_size": args.conv_kernel}],
        "pixel_shuffle": [{"kernel_size": args.conv_kernel}],
    }
    names = sorted(UPSAMPLERS, key=lambda name: name == "carafe")  # CARAFE last, as in the paper
    return [(name, option) for name in names for option in options.get(name, [{}])]


def label(name: str, options: dict[str, int]) -> str:
    """The upsampler and those of its options that are not at their defaults."""
    parameters = inspect.signature(UPSAMPLERS[name]).parameters
    chosen = {key: value for key, value in options.items() if value != parameters[key].default}
    return " ".join([name, *(f"{key}={value}" for key, value in chosen.items())])


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--channels", type=int, default=256, help="of input and output (256)")
    add("--scale", type=int, default=2, help="upsampling ratio (2)")
    add("--size", type=int, nargs=2, default=[100, 136], metavar=("H", "W"),
        help="input map for the column of totals (100 136)")  # fmt: skip
    add("--conv-kernel", type=int, default=3, help="of deconv, pixel_shuffle (3)")
    carafe = parser.add_argument_group("CARAFE", "With several values, a row for each combination.")
    for option, default, what in (
        ("--up-kernel", 5, "side of the reassembly kernel"),
        ("--up-group", 1, "channel groups with kernels of their own"),
        ("--encoder-kernel", 3, "side of the convolution that predicts the kernels"),
        ("--encoder-dilation", 1, "its dilation"),
        ("--compressed-channels", 64, "channels that it sees, 0: all"),
    ):
        carafe.add_argument(
            option, type=int, nargs="+", default=[default], metavar="N", help=f"{what} ({default})"
        )
    return parser.parse_args(argv)


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if min(args.size) < 1:
        raise UserError(f"--size must be at least 1 1, got {args.size[0]} {args.size[1]}")
    rows = []
    for name, options in rows_of(args):
        cost = cost_of(name, args.channels, args.scale, args.size, **options)
        by_formula = paper_flops(args.channels, args.scale, **options) if name == "carafe" else 0
        rows.append(
            [
                label(name, options),
                f"{cost.parameters:,}",
                f"{cost.flops:,}",
                f"{by_formula:,}" if by_formula else "-",
                f"{cost.torch_flops:,}",
                f"{cost.flops * math.prod(args.size) / 1e9:.3f}",
            ]
        )
    print(f"{args.channels} channels, scale {args.scale}")
    header = ["upsampler", "parameters", "FLOPs", "by formula", "by PyTorch", "GFLOPs"]
    print(format_table(header, rows))
    print("FLOPs: for each location of the input; a multiplication and an addition count as two.")
    print("by formula: the paper's, section 3.4. by PyTorch: without biases and interpolation.")
    print(f"GFLOPs: for a map of {args.size[0]} x {args.size[1]}.")


if __name__ == "__main__":
    main()
