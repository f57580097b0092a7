"""What CARAFE is compared with: other ways to compute it, and other upsamplers.

All are written for this comparison from the description at their source, which each names.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..downsample import CARAFEDownsamplePack
from ..ops import carafe
from ..reference import (
    carafe_downsample_naive,
    carafe_downsample_softmax_naive,
    carafe_naive,
    carafe_upsample_naive,
)
from ..upsample import CARAFEPack


@dataclass(frozen=True)
class Peer:
    """One alternative.

    Attributes:
        build: for an operator the function itself, with the signature of `carafe` or
            `carafe_upsample`; for an upsampler what makes the module from (channels,
            scale_factor, kernel_size, group_size).
        source: where it comes from.
        patches: memory that a forward, and a forward with backward, hold at their peak, in units
            of all k*k neighbors of all output values (N*C * k*k * s*H * s*W elements).
        is_carafe: computes exactly what the CARAFE of its group does.
        compiles: its first call takes much longer than others.
        limits: says why it cannot run for (channels, group_size, device), or None.
    """

    build: Callable
    source: str
    patches: tuple[float, float] = (0, 0)
    is_carafe: bool = False
    compiles: bool = False
    limits: Callable[[int, int, torch.device], str | None] = lambda *_: None


# ----------------------------------------------------------------- the operator, masks given


def unfold_einsum(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> Tensor:
    """Unfolded patches, shared by the s*s output pixels of a location, contracted with masks."""
    n, c, h, w = features.shape
    k, g, s = kernel_size, group_size, scale_factor
    patches = F.unfold(features, k, padding=k // 2).view(n, g, c // g, k * k, h, w)
    weights = masks.reshape(n, g, k * k, h, s, w, s)
    out = torch.einsum("ngkhywx,ngckhw->ngchywx", weights, patches)
    return out.reshape(n, c, h * s, w * s)


def unfold_interpolate(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> Tensor:
    """Unfolded patches, enlarged by nearest interpolation, times masks, summed over the taps."""
    n, c, h, w = features.shape
    k, g, s = kernel_size, group_size, scale_factor
    patches = F.unfold(features, k, padding=k // 2).view(n, c * k * k, h, w)
    patches = F.interpolate(patches, scale_factor=s, mode="nearest")
    patches = patches.view(n, g, c // g, k * k, h * s, w * s)
    weights = masks.reshape(n, g, 1, k * k, h * s, w * s)
    return (weights * patches).sum(dim=3).view(n, c, h * s, w * s)


def unfold_matmul(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> Tensor:
    """For every location the product of its patch (C/g, k*k) with its masks (k*k, s*s)."""
    n, c, h, w = features.shape
    k, g, s = kernel_size, group_size, scale_factor
    patches = F.pad(features, [k // 2] * 4).unfold(2, k, 1).unfold(3, k, 1)
    patches = patches.reshape(n, g, c // g, h, w, k * k).permute(0, 1, 3, 4, 2, 5)
    weights = masks.reshape(n, g, k * k, h, s, w, s).permute(0, 1, 3, 5, 2, 4, 6)
    out = patches @ weights.reshape(n, g, h, w, k * k, s * s)
    out = out.view(n, g, h, w, c // g, s, s).permute(0, 1, 4, 2, 5, 3, 6)
    return out.reshape(n, c, h * s, w * s)


def shift_and_add(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> Tensor:
    """Padded features, shifted to each tap, times masks: what torch.compile makes one loop of.

    It computes the same as `carafe_naive`, but writes the output in its final order, which makes
    it much faster when compiled.
    """
    n, c, h, w = features.shape
    k, g, s = kernel_size, group_size, scale_factor
    padded = F.pad(features, [k // 2] * 4).view(n, g, c // g, h + k - 1, 1, w + k - 1, 1)
    weights = masks.reshape(n, g, 1, k * k, h, s, w, s)
    terms = (
        padded[:, :, :, u : u + h, :, v : v + w] * weights[:, :, :, u * k + v]
        for u, v in itertools.product(range(k), repeat=2)
    )
    out = functools.reduce(torch.add, terms)
    return out.reshape(n, c, h * s, w * s)


# --------------------------------------------------------------- the operator, logits given


def separate_steps(
    features: Tensor, kernel_logits: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> Tensor:
    """What `carafe_upsample` does in one pass: pixel shuffle, softmax, compiled `carafe`."""
    masks = F.pixel_shuffle(kernel_logits, scale_factor)
    n, _, h, w = masks.shape
    masks = masks.reshape(n, group_size, kernel_size**2, h, w).softmax(dim=2).view(masks.shape)
    return carafe(features, masks, kernel_size, group_size, scale_factor)


# ----------------------------------------------------------------------------- downsampling


def unfold_downsample(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> Tensor:
    """Patches unfolded with a stride, times masks, summed over the taps."""
    n, c, _, _ = features.shape
    k, g, (rows, columns) = kernel_size, group_size, masks.shape[2:]
    patches = F.unfold(features, k, padding=k // 2, stride=scale_factor)
    patches = patches.view(n, g, c // g, k * k, rows, columns)
    return (masks.view(n, g, 1, k * k, rows, columns) * patches).sum(3).view(n, c, rows, columns)


def unfold_downsample_softmax(features: Tensor, kernel_logits: Tensor, *sizes: int) -> Tensor:
    """The same after a softmax."""
    kernel_size, group_size, _ = sizes
    masks = kernel_logits.unflatten(1, (group_size, kernel_size**2)).softmax(dim=2)
    return unfold_downsample(features, masks.flatten(1, 2), *sizes)


class UnfoldDownsampler(CARAFEDownsamplePack):
    """The plain-PyTorch module that projects carry: CARAFE++ by ``F.unfold``."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.content_encoder(self.channel_compressor(x))
        sizes = self.down_kernel, self.down_group, self.scale_factor
        return unfold_downsample_softmax(x, logits, *sizes)


class BlurPool(nn.Module):
    """Blur pooling (arXiv 1904.11486): the binomial 3x3 filter with a stride, reflected borders."""

    def __init__(self, channels: int, scale_factor: int):
        super().__init__()
        self.scale_factor = scale_factor
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("filter", (row[:, None] * row).repeat(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, [1] * 4, mode="reflect")
        return F.conv2d(padded, self.filter, stride=self.scale_factor, groups=x.shape[1])  # type: ignore[arg-type]


def _without_options(build: Callable[[int, int], nn.Module]) -> Callable:
    return lambda channels, scale_factor, kernel_size, group_size: build(channels, scale_factor)


def down_pack(kind: type[CARAFEDownsamplePack]) -> Callable[..., CARAFEDownsamplePack]:
    """What builds a downsampler with CARAFE, as in :class:`Peer`."""

    def build(channels: int, scale_factor: int, kernel_size: int, group_size: int):
        return kind(channels, scale_factor, down_kernel=kernel_size, down_group=group_size)

    return build


def down_convolutions(*sizes: int) -> nn.Module:
    pack = down_pack(CARAFEDownsamplePack)(*sizes)
    return nn.Sequential(pack.channel_compressor, pack.content_encoder)


# ------------------------------------------------------------------------- whole upsamplers


class UnfoldCARAFE(nn.Module):
    """The plain-PyTorch module that most projects carry: github.com/XiaLiPKU/CARAFE.

    It departs from the paper by batch normalization and a ReLU in the kernel prediction. The
    features are enlarged first and unfolded with a dilation of s, so that every output pixel has
    a patch of its own in memory.
    """

    def __init__(
        self,
        channels: int,
        scale_factor: int,
        kernel_size: int,
        encoder_kernel: int = 3,
        compressed_channels: int = 64,
    ):
        super().__init__()
        self.scale_factor = scale_factor
        self.kernel_size = kernel_size
        taps = (kernel_size * scale_factor) ** 2
        self.compressor = nn.Sequential(
            nn.Conv2d(channels, compressed_channels, 1, bias=False),
            nn.BatchNorm2d(compressed_channels),
            nn.ReLU(inplace=True),
        )
        self.encoder = nn.Sequential(
            nn.Conv2d(
                compressed_channels, taps, encoder_kernel, padding=encoder_kernel // 2, bias=False
            ),
            nn.BatchNorm2d(taps),
        )

    def masks(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.encoder(self.compressor(x)), self.scale_factor).softmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        masks = self.masks(x)
        n, taps, h, w = masks.shape
        s, k = self.scale_factor, self.kernel_size
        enlarged = F.interpolate(x, scale_factor=s, mode="nearest")
        patches = F.unfold(enlarged, k, dilation=s, padding=k // 2 * s)
        return torch.einsum("nkhw,nckhw->nchw", masks, patches.view(n, -1, taps, h, w))


class DySample(nn.Module):
    """DySample (arXiv 2308.15085): bilinear sampling at positions that a 1x1 convolution predicts.

    The default of its authors' code, github.com/tiny-smart/dysample: static scope 0.25, "linear
    then pixel shuffle", four groups of channels.
    """

    GROUPS = 4

    def __init__(self, channels: int, scale_factor: int):
        super().__init__()
        self.scale_factor = scale_factor
        self.offset = nn.Conv2d(channels, 2 * self.GROUPS * scale_factor**2, kernel_size=1)
        nn.init.normal_(self.offset.weight, std=0.001)
        nn.init.zeros_(self.offset.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        out_h, out_w = h * self.scale_factor, w * self.scale_factor
        offsets = F.pixel_shuffle(0.25 * self.offset(x), self.scale_factor)
        offsets = offsets.reshape(n * self.GROUPS, 2, out_h, out_w).permute(0, 2, 3, 1)
        # grid_sample's coordinates run from -1 to 1 over the map, so a source pixel is 2 / size.
        ys, xs = (
            (torch.arange(size, dtype=x.dtype, device=x.device) + 0.5) * (2 / size) - 1
            for size in (out_h, out_w)
        )
        centers = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1)
        grid = centers + offsets * offsets.new_tensor([2 / w, 2 / h])
        features = x.reshape(n * self.GROUPS, c // self.GROUPS, h, w)
        out = F.grid_sample(features, grid, padding_mode="border", align_corners=False)
        return out.reshape(n, c, out_h, out_w)


def carafe_convolutions(
    channels: int, scale_factor: int, kernel_size: int, group_size: int
) -> nn.Module:
    pack = CARAFEPack(channels, scale_factor, up_kernel=kernel_size, up_group=group_size)
    return nn.Sequential(pack.channel_compressor, pack.content_encoder)


# ------------------------------------------------------------------------------- by name


def _one_group(channels: int, group_size: int, device: torch.device) -> str | None:
    return "has one group only" if group_size != 1 else None


def _four_groups(channels: int, group_size: int, device: torch.device) -> str | None:
    return f"needs a multiple of {DySample.GROUPS} channels" if channels % DySample.GROUPS else None


def _gpu_only(channels: int, group_size: int, device: torch.device) -> str | None:
    return "runs on GPUs only" if device.type != "cuda" else None


PEERS = {
    "operator/carafe_naive": Peer(
        carafe_naive, "the definition, carafe_d2/reference.py", (0.3, 0.5), is_carafe=True
    ),
    "operator/unfold_einsum": Peer(
        unfold_einsum, "CARAFE in plain PyTorch: F.unfold and einsum", (0.4, 0.7), is_carafe=True
    ),
    "operator/unfold_interpolate": Peer(
        unfold_interpolate, "blogs: F.unfold and F.interpolate", (2.2, 3.3), is_carafe=True
    ),
    "operator/unfold_matmul": Peer(
        unfold_matmul,
        "copies of CARAFE for YOLO: unfold and a matrix product for each location",
        (0.4, 0.7),
        is_carafe=True,
    ),
    "fused/separate_steps": Peer(
        separate_steps, "pixel shuffle, softmax, carafe_d2.carafe", is_carafe=True
    ),
    "fused/carafe_upsample_naive": Peer(
        carafe_upsample_naive, "the definition, carafe_d2/reference.py", (0.3, 0.5), is_carafe=True
    ),
    "upsampler/carafe_convolutions": Peer(
        carafe_convolutions, "only the two convolutions inside CARAFEPack; no upsampler"
    ),
    "upsampler/unfold_module": Peer(
        lambda channels, scale_factor, kernel_size, group_size: UnfoldCARAFE(
            channels, scale_factor, kernel_size
        ),
        "github.com/XiaLiPKU/CARAFE, the plain-PyTorch module that most projects carry",
        (1.2, 2.2),
        limits=_one_group,
    ),
    "upsampler/dysample": Peer(
        lambda channels, scale_factor, kernel_size, group_size: DySample(channels, scale_factor),
        "arXiv 2308.15085, as the default of github.com/tiny-smart/dysample",
        limits=_four_groups,
    ),
    "down_operator/carafe_downsample_naive": Peer(
        carafe_downsample_naive,
        "the definition, carafe_d2/reference.py",
        (0.3, 0.5),
        is_carafe=True,
    ),
    "down_operator/unfold": Peer(
        unfold_downsample, "CARAFE++ in plain PyTorch: F.unfold", (2.2, 3.3), is_carafe=True
    ),
    "down_fused/carafe_downsample_softmax_naive": Peer(
        carafe_downsample_softmax_naive,
        "the definition, carafe_d2/reference.py",
        (0.3, 0.5),
        is_carafe=True,
    ),
    "down_fused/unfold": Peer(
        unfold_downsample_softmax, "the same after a softmax", (2.2, 3.3), is_carafe=True
    ),
    "downsampler/carafe_convolutions": Peer(
        down_convolutions, "only the two convolutions inside CARAFEDownsamplePack; no downsampler"
    ),
    "downsampler/unfold_module": Peer(
        down_pack(UnfoldDownsampler), "CARAFE++ by F.unfold", (2.2, 3.3), is_carafe=True
    ),
    "downsampler/max_pool": Peer(
        _without_options(lambda channels, scale: nn.MaxPool2d(3, scale, 1)),
        "torch.nn.MaxPool2d, 3x3",
    ),
    "downsampler/blur_pool": Peer(
        _without_options(BlurPool), "arXiv 1904.11486: a binomial 3x3 filter"
    ),
    "downsampler/strided_conv": Peer(
        _without_options(lambda channels, scale: nn.Conv2d(channels, channels, 3, scale, 1)),
        "torch.nn.Conv2d, 3x3",
    ),
}


def mmcv_peers() -> dict[str, Peer]:
    """The operator and the upsampler of mmcv; empty where there is none.

    They come from an mmcv that is built with its operators, or from dev/build_mmcv_carafe.py.
    mmcv takes every tensor for contiguous and would read another layout wrongly.
    """
    try:
        from mmcv import ops
    except ImportError:
        return {}

    def operator(features: Tensor, masks: Tensor, *sizes: int) -> Tensor:
        return ops.carafe(features.contiguous(), masks.contiguous(), *sizes)

    class ContiguousCARAFEPack(ops.CARAFEPack):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.contiguous())

    def pack(channels: int, scale_factor: int, kernel_size: int, group_size: int) -> nn.Module:
        return ContiguousCARAFEPack(
            channels, scale_factor, up_kernel=kernel_size, up_group=group_size
        )

    return {
        "operator/mmcv": Peer(operator, "mmcv.ops.carafe", is_carafe=True, limits=_gpu_only),
        "upsampler/mmcv": Peer(pack, "mmcv.ops.CARAFEPack", is_carafe=True, limits=_gpu_only),
    }


def compiled_peers() -> dict[str, Peer]:
    """Plain PyTorch as torch.compile makes it: the strongest there is.

    Compiled anew for every shape, dtype, layout and pass, which takes up to half a minute each.
    """
    torch._dynamo.config.recompile_limit = 1000  # beyond it nothing is compiled any more
    functions = {
        "operator/shift_and_add_compiled": shift_and_add,
        "fused/carafe_upsample_naive_compiled": carafe_upsample_naive,
    }
    return {
        name: Peer(
            torch.compile(function, dynamic=False),
            f"torch.compile of {function.__name__}",
            is_carafe=True,
            compiles=True,
        )
        for name, function in functions.items()
    }
