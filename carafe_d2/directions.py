"""What CARAFE takes the place of, for :mod:`carafe_d2.replace`: upsampling, or downsampling.

A :class:`Direction` knows the functions and modules of one, what CARAFE has to be like in their
place, and how to call it as they are called.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .downsample import CARAFEDownsamplePack
from .module_state import POOLING_MODULES, UPSAMPLING_MODULES
from .upsample import CARAFEPack, KernelPrediction, xavier_init

_MODES = ("nearest", "nearest-exact", "bilinear")
_MAX_POOLS = (F.max_pool2d, torch.max_pool2d)  # of which the second is also what tracers see


# ------------------------------------------------------- modules in the place of others


class CARAFEConvTranspose2d(nn.Module):
    """Stands in for ``nn.ConvTranspose2d``: CARAFE, which keeps channels, then a 1x1 convolution.

    Where the number of channels stays there is no convolution, as in the paper's mask head. CARAFE
    comes first so that it predicts its kernels from all there is.

    Args:
        in_channels, out_channels: channels before and after.
        scale_factor: upsampling ratio.
        trim: rows and columns by which the output is smaller than ``scale_factor`` times the input.
        bias: whether the 1x1 convolution has one.
        **options: further arguments of :class:`CARAFEPack`.

    Shapes:
        (N, in_channels, H, W) gives (N, out_channels, scale_factor * H - trim[0],
        scale_factor * W - trim[1]), or the ``output_size`` that is asked for.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        scale_factor: int,
        trim: tuple[int, ...] = (0, 0),
        bias: bool = True,
        **options: Any,
    ):
        super().__init__()
        self.trim = trim
        self.upsample = CARAFEPack(in_channels, scale_factor, **options)
        self.project: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.project = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=bias)
            xavier_init(self.project, distribution="uniform")

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """
        Args:
            input: (N, in_channels, H, W).
            output_size: height and width, or the whole shape, as of ``nn.ConvTranspose2d``.

        Raises:
            RuntimeError: the output size belongs to another factor.
        """
        upsampled = self.upsample(input)
        if output_size is None:
            output_size = [n - t for n, t in zip(upsampled.shape[-2:], self.trim, strict=True)]
        return self.project(_crop(upsampled, output_size[-2:], self.upsample.scale_factor))

    def extra_repr(self) -> str:
        return f"trim={self.trim}" if any(self.trim) else ""


def _crop(upsampled: Tensor, size: Sequence[int], scale: int) -> Tensor:
    """Cuts what is too much off the end; input pixel y // scale stays the center of output y."""
    height, width = upsampled.shape[-2:]
    if not (height - scale < size[0] <= height and width - scale < size[1] <= width):
        raise RuntimeError(
            f"CARAFE in place of other upsampling was made for factor {scale}, but a map of "
            f"{height // scale} x {width // scale} is to become {size[0]} x {size[1]}"
        )
    return upsampled[..., : size[0], : size[1]]


class Window(NamedTuple):
    """Of pooling, by rows and columns.

    Attributes:
        stride: of the window.
        reach: by how many pixels the map has to go on after the last window's first pixel, less
            the padding. Of n pixels there come (n - reach) // stride + 1.
    """

    stride: tuple[int, ...]
    reach: tuple[int, ...]

    @classmethod
    def of(cls, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False) -> "Window":
        strides = pair(stride or kernel_size)
        sizes = zip(*map(pair, (kernel_size, padding, dilation)), strides, strict=True)
        reach = (d * (k - 1) + 1 - 2 * p - ceil_mode * (s - 1) for k, p, d, s in sizes)
        return cls(strides, tuple(reach))

    def obstacle(self) -> str:
        """Why CARAFE cannot put out as many pixels, or "". Its own reach is 1."""
        scale = self.stride[0]
        if self.stride != (scale, scale) or scale < 2:
            return odd_factor(*self.stride)
        if min(self.reach) < 1 or max(self.reach) > scale + 1:
            return "its output is more than a pixel off a fraction of its input"
        return ""


class CARAFEPool2d(CARAFEDownsamplePack):
    """Stands in for ``nn.MaxPool2d`` and ``nn.AvgPool2d``: CARAFE, and as many pixels as theirs.

    Args:
        channels: channels of the input and of the output.
        scale_factor: downsampling ratio.
        reach: of the pooling's window, see :class:`Window`.
        **options: further arguments of :class:`CARAFEDownsamplePack`.

    Shapes:
        (N, channels, H, W) gives (N, channels, (H - reach[0]) // scale_factor + 1,
        (W - reach[1]) // scale_factor + 1).
    """

    def __init__(
        self, channels: int, scale_factor: int, reach: tuple[int, ...] = (1, 1), **options: Any
    ):
        super().__init__(channels, scale_factor, **options)
        self.reach = reach

    def forward(self, x: Tensor) -> Tensor:
        return _keep(super().forward(x), x, Window(pair(self.scale_factor), self.reach))

    def extra_repr(self) -> str:
        return f"reach={self.reach}"


def _keep(downsampled: Tensor, x: Tensor, window: Window) -> Tensor:
    """As many pixels of ``downsampled`` as the window makes of ``x``."""
    rows, columns = (
        (n - reach) // stride + 1
        for n, reach, stride in zip(x.shape[-2:], window.reach, window.stride, strict=True)
    )
    return downsampled[..., :rows, :columns]


def pair(value) -> tuple:
    return tuple(value) if isinstance(value, Sequence) else (value, value)


# ------------------------------------------------------- calls


@dataclass(eq=False)
class Run:
    """One run of a module's forward pass, with the calls in it and further in."""

    module: nn.Module
    depth: int
    calls: list["Call"] = field(default_factory=list)


@dataclass(eq=False)
class Call:
    """One call of a function; ``runs`` are the forward passes it is in, outermost first."""

    runs: tuple[Run, ...]
    input_shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    was: str  # the function
    scale: int  # the ratio of CARAFE in its place, or 0
    obstacle: str  # why CARAFE cannot do the same, or ""
    reach: tuple[int, ...] = ()  # of pooling

    @property
    def channels(self) -> int:
        return self.input_shape[1]


def odd_factor(rows: float, columns: float) -> str:
    return f"its factor, {rows:.3g} x {columns:.3g}, is not one integer above 1"


def _size_factor(before: int, after: int) -> float:
    """A pyramid's odd sizes count as doubled: 25 comes of 13, which a stride of 2 made of 25."""
    return 2 if after == 2 * before - 1 > 1 else after / before


class Direction:
    """What is particular to the replacement of upsampling, or of downsampling.

    Attributes:
        kind: "upsampling" or "downsampling".
        did: what a module did that called one of the functions.
        child: the name of an owner's CARAFEPacks, and of what a convolution's input goes through.
        modules: the classes of modules that are swapped by what their calls show.
        placed: the classes of modules of which each place gets its own, see
            :func:`give_each_place_its_own`.
        group: the option that has to divide the channels.
    """

    kind: str
    did: str
    child: str
    modules: tuple[type[nn.Module], ...]
    placed: tuple[type[nn.Module], ...]
    group: str

    def counts(self, func, args: tuple, kwargs: dict) -> bool:
        """Whether a call is one of those that are numbered."""
        raise NotImplementedError

    def describe(self, func, output: Tensor, input: Tensor, *args, **kwargs) -> tuple:
        """``was``, ``scale``, ``obstacle`` and ``reach`` of the :class:`Call`."""
        raise NotImplementedError

    def replace(self, pack: KernelPrediction, func, input: Tensor, *args, **kwargs) -> Tensor:
        """Does with CARAFE what a call would have done."""
        raise NotImplementedError

    def module_kind(self, module: nn.Module) -> tuple[str, str]:
        """What a module of ``modules`` is, or "" if it does not resample, and what forbids it."""
        raise NotImplementedError

    def pack(self, call: Call, options: dict, module: nn.Module | None) -> KernelPrediction:
        """What is to replace the call, or the module that makes it."""
        raise NotImplementedError

    def call(self, runs: Sequence[Run], func, output: Tensor, input: Tensor, *args, **kwargs):
        """The note of a call, from what it is in, what it returned and the arguments it had."""
        # Autocast makes the input half, but CARAFE's parameters are to be like the others.
        device = input.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.float32 if autocast else input.dtype
        was, scale, obstacle, reach = self.describe(func, output, input, *args, **kwargs)
        if input.dim() != 4:
            obstacle = f"its input has rank {input.dim()}, not 4"
        elif not obstacle and not dtype.is_floating_point:
            obstacle = f"dtype {dtype}"
        scale = 0 if obstacle else scale
        return Call(tuple(runs), input.shape, dtype, input.device, was, scale, obstacle, reach)


class _Upsampling(Direction):
    kind, did, child, group = "upsampling", "interpolated", "carafe_upsample", "up_group"
    modules, placed = UPSAMPLING_MODULES, (*UPSAMPLING_MODULES, nn.ConvTranspose2d)

    def counts(self, func, args, kwargs):
        return func is F.interpolate

    def describe(
        self, func, output, input, size=None, scale_factor=None, mode="nearest", *_, **__
    ) -> tuple:
        was, input_size = f"F.interpolate {mode}", input.shape[2:]
        if mode not in _MODES or input.dim() != 4:
            return was, 0, f"mode {mode}", ()
        if scale_factor is not None:
            factors = pair(scale_factor)
        elif prod(input_size) == 1:
            return was, 0, "its input is a single pixel with the example inputs", ()
        else:
            factors = tuple(map(_size_factor, input_size, output.shape[2:]))
        if factors[0] != factors[1] or factors[0] < 2 or factors[0] % 1:
            return was, 0, odd_factor(*factors), ()
        return was, int(factors[0]), "", ()

    def replace(self, pack, func, input, size=None, scale_factor=None, *_, **__):
        if size is None:
            rows, columns = pair(scale_factor)
            size = (int(input.shape[-2] * rows), int(input.shape[-1] * columns))
        return _crop(pack(input), pair(size), pack.scale_factor)

    def module_kind(self, module):
        # One of a fixed size goes on to refuse what does not fit.
        return f"{type(module).__name__} {module.mode}", ""

    def pack(self, call, options, module):
        return CARAFEPack(call.channels, call.scale, **options)


class _Downsampling(Direction):
    kind, did, child, group = "downsampling", "pooled", "carafe_downsample", "down_group"
    modules = placed = POOLING_MODULES

    def counts(self, func, args, kwargs):
        is_pooling = func == F.avg_pool2d or func in _MAX_POOLS
        return is_pooling and _window(func, *args, **kwargs).stride != (1, 1)

    def describe(self, func, output, input, *args, **kwargs):
        window = _window(func, input, *args, **kwargs)
        return f"F.{func.__name__}", window.stride[0], window.obstacle(), window.reach

    def replace(self, pack, func, input, *args, **kwargs):
        window = _window(func, input, *args, **kwargs)
        if window.stride != pair(pack.scale_factor) or window.obstacle():
            raise RuntimeError(
                f"CARAFE in place of other downsampling was made for factor {pack.scale_factor}, "
                f"but a map is to be pooled with stride {' x '.join(map(str, window.stride))}"
            )
        return _keep(pack(input), input, window)

    def module_kind(self, module):
        stride = pair(module.stride)
        if stride == (1, 1):
            return "", ""
        takes_indices = getattr(module, "return_indices", False)
        return type(module).__name__, "its indices are put out, too" if takes_indices else ""

    def pack(self, call, options, module):
        if module is None:
            return CARAFEDownsamplePack(call.channels, call.scale, **options)
        return CARAFEPool2d(call.channels, call.scale, call.reach, **options)


def _window(func, input, kernel_size, stride=None, padding=0, *args, **kwargs) -> Window:
    """Of a call of pooling."""
    names = ("dilation", "ceil_mode") if func in _MAX_POOLS else ("ceil_mode",)
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    options = {name: kwargs[name] for name in names if name in kwargs}
    return Window.of(kernel_size, stride, padding, **options)


UPSAMPLING, DOWNSAMPLING = _Upsampling(), _Downsampling()
DIRECTIONS = {direction.child: direction for direction in (UPSAMPLING, DOWNSAMPLING)}
