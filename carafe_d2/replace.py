"""Puts CARAFE in the place of the up- or downsampling in any model.

:func:`replace_upsampling` and :func:`replace_downsampling` work by the same means, and a
:class:`_Direction` is what they do not share. Modules that resample are swapped by name. A call of
``F.interpolate`` or ``F.max_pool2d`` inside a forward pass is no module, so it is known by its
place: the k-th that one run of its module, the *owner*, makes itself. The owner gets the
CARAFEPacks as children, and forward hooks that put its forward pass under a ``TorchFunctionMode``
that sends those calls to them. Nothing global is patched, every module keeps its class, and the
model is saved, copied, trained, compiled and exported like any other. Nothing here needs
Detectron2.
"""

import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from itertools import groupby
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .downsample import CARAFEDownsamplePack
from .module_state import (
    POOLING_MODULES,
    UPSAMPLING_MODULES,
    all_or_nothing,
    clash,
    evaluating,
    give_each_place_its_own,
    inherit,
)
from .upsample import CARAFEPack, KernelPrediction, check_options, check_sizes, xavier_init

_MODES = ("nearest", "nearest-exact", "bilinear")
_MAX_POOLS = (F.max_pool2d, torch.max_pool2d)  # of which the second is also what tracers see
_MIN_CHANNELS = 4


@dataclass(frozen=True)
class UpsamplingSite:
    """A place where a model upsamples, or downsamples.

    Attributes:
        name: of the module that stands there, or would; what ``include`` and ``exclude`` match.
        was: what upsampled there.
        channels: of the map that is upsampled; None if unknown.
        scale: CARAFE's ratio; None if left alone.
        parameters: how many the replacement has more than what it replaced.
        reason: why the place was left alone; empty if it was not.
    """

    name: str
    was: str
    channels: int | None = None
    scale: int | None = None
    parameters: int = 0
    reason: str = ""


class UpsamplingReport(list[UpsamplingSite]):
    """What :func:`replace_upsampling` replaced; prints as a table.

    Attributes:
        left_alone: the other upsampling that it saw, each with the reason.
    """

    kind, sign = "upsampling", "x"

    def __init__(self, sites: Sequence[UpsamplingSite]):
        super().__init__(site for site in sites if not site.reason)
        self.left_alone = [site for site in sites if site.reason]

    def __str__(self) -> str:
        rows = [("replaced", "was", "channels", "factor", "parameters")]
        rows += [
            (
                site.name,
                site.was,
                str(site.channels),
                f"{self.sign}{site.scale}",
                f"{site.parameters:+,}",
            )
            for site in self
        ]
        rows.append(("total", "", "", "", f"{sum(site.parameters for site in self):+,}"))
        table = _table(rows, right=(2, 3, 4)) if self else "nothing replaced"
        if self.left_alone:
            table += "\n\n" + _table([("left alone", "was", "because"), *self._left_alone_rows()])
        return table if self or self.left_alone else f"nothing replaced: no {self.kind} was seen"

    def _left_alone_rows(self) -> Iterator[tuple[str, ...]]:
        """One row for all that a module does in the same way, e.g. for every box."""
        for _, group in groupby(self.left_alone, lambda s: (s.name.rpartition(".")[0], s.was)):
            first, *rest = group
            name = f"{first.name} to {rest[-1].name.rpartition('.')[2]}" if rest else first.name
            alike = all(site.reason == first.reason for site in rest)
            yield name, first.was, first.reason if alike else f"{first.reason}; ..."


class DownsamplingReport(UpsamplingReport):
    """The same of :func:`replace_downsampling`."""

    kind, sign = "downsampling", "/"


def _table(rows: Sequence[tuple[str, ...]], right: Sequence[int] = ()) -> str:
    """Lines up columns, those numbered in ``right`` at their right edge."""
    columns = []
    for i, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        columns.append([cell.rjust(width) if i in right else cell.ljust(width) for cell in column])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True))


def replace_upsampling(
    model: nn.Module,
    example_inputs,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    max_scale: int = 2,
    up_kernel: int = 5,
    up_group: int = 1,
    encoder_kernel: int = 3,
    encoder_dilation: int = 1,
    compressed_channels: int = 64,
    normalizer: str = "softmax",
) -> UpsamplingReport:
    """Puts CARAFE, freshly initialized, in the place of a model's upsampling; changes it in place.

    Replaced are nearest and bilinear ``nn.Upsample`` and ``F.interpolate`` and
    ``nn.ConvTranspose2d`` whose factor is the same integer from 2 to ``max_scale`` in both
    directions. The examples run twice, in evaluation mode and without gradients: before, which
    shows what there is, and, as a check, after the change. A second call finds nothing. Whatever
    fails leaves the model as it was.

    - ``nn.Upsample`` becomes a :class:`CARAFEPack` of the same name.
    - ``nn.ConvTranspose2d`` becomes a :class:`CARAFEConvTranspose2d` of the same name.
    - The k-th ``F.interpolate`` of a module named ``fpn`` becomes a :class:`CARAFEPack` named
      ``fpn.carafe_upsample.k``. So does an ``nn.Upsample`` that ``fpn`` calls several times.

    Where a size was asked for rather than a factor, CARAFE upsamples by the factor rounded up, and
    what is too much is cut off at the bottom and at the right. Output pixel y thus keeps looking
    at input pixel y // factor, as with nearest neighbors; a pyramid's 13 rows become 26, then 25.
    A size that belongs to another factor than that of the example raises a RuntimeError, as does a
    forward pass that interpolates more or less often than with the example.

    What others have put on a module goes over to its replacement: attributes, hooks of every kind,
    whose handles go on to remove them, and training or evaluation mode. Left alone is what the
    replacement could not take over, such as a normalization of weights.

    Call it before the optimizer is made and before compiling, sharding or wrapping the model.
    ``torch.jit.script`` cannot read a module whose ``F.interpolate`` was replaced, activation
    checkpointing has to hold such a module as a whole, and whoever calls its ``forward`` rather
    than the module passes by the hooks that redirect it.

    Args:
        model: the model, on the device and in the dtype it is to have.
        example_inputs: a tuple of the positional arguments of ``model``, or the only one; or a list
            of such tuples, several examples. Best are sides that are multiples of the model's
            strides, and large enough that no map to be upsampled is a single pixel. Where a model
            resizes maps of a fixed size, take examples of two sizes: what is doubled by chance, in
            one of them, is left alone.
        include: patterns of names (:func:`fnmatch.fnmatchcase`) that are replaced; default is all.
        exclude: patterns of names that are left alone.
        max_scale: largest factor that is replaced. Those in the paper are all 2; larger ones mostly
            enlarge class scores at the end of a network, where the paper keeps to bilinear.
        up_kernel, up_group, encoder_kernel, encoder_dilation, compressed_channels, normalizer: of
            every :class:`CARAFEPack`.

    Returns:
        What was replaced, and as ``left_alone`` what was not, with the reasons.

    Raises:
        ValueError: an argument is out of its range, or the model distributed already.
        RuntimeError: the model does not run on an example, as it is or with CARAFE.
    """
    options: dict[str, Any] = {
        "up_kernel": up_kernel,
        "up_group": up_group,
        "encoder_kernel": encoder_kernel,
        "encoder_dilation": encoder_dilation,
        "compressed_channels": compressed_channels,
        "normalizer": normalizer,
    }
    sites = _replace(_UPSAMPLING, model, example_inputs, options, include, exclude, max_scale)
    return UpsamplingReport(sites)


def replace_downsampling(
    model: nn.Module,
    example_inputs,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    max_scale: int = 2,
    down_kernel: int = 5,
    down_group: int = 1,
    encoder_kernel: int = 3,
    encoder_dilation: int = 1,
    compressed_channels: int = 16,
    normalizer: str = "softmax",
) -> DownsamplingReport:
    """Puts CARAFE, freshly initialized, in the place of a model's downsampling, as CARAFE++ does.

    Replaced are max and average pooling and the strides of ``nn.Conv2d``, where the factor is the
    same integer from 2 to ``max_scale`` in both directions. Means, report, ``include`` and
    ``exclude``, and what is said of hooks, errors and a second call, are those of
    :func:`replace_upsampling`.

    - ``nn.MaxPool2d`` and ``nn.AvgPool2d`` become a :class:`CARAFEPool2d` of the same name.
    - ``nn.Conv2d`` with a stride stays where it is, with its weights and a stride of 1, and gets a
      :class:`CARAFEDownsamplePack` named ``carafe_downsample``, which its input goes through first.
      Its padding has to be half its kernel. Checkpoints of the strided model load, but for what
      they lack.
    - The k-th ``F.max_pool2d`` or ``F.avg_pool2d`` of a module named ``stem`` becomes a
      :class:`CARAFEDownsamplePack` named ``stem.carafe_downsample.k``. So does a pooling module
      that ``stem`` calls several times. Calls with a stride of 1 do not count.

    Output pixel y is made from around input pixel y * factor. Where pooling leaves out what does
    not fill its window, the last row and column of CARAFE's are cut off.

    Args:
        model, example_inputs, include, exclude: see :func:`replace_upsampling`.
        max_scale: largest factor that is replaced.
        down_kernel, down_group, encoder_kernel, encoder_dilation, compressed_channels, normalizer:
            of every :class:`CARAFEDownsamplePack`.

    Returns:
        What was replaced, and as ``left_alone`` what was not, with the reasons.

    Raises:
        ValueError: an argument is out of its range, or the model distributed already.
        RuntimeError: the model does not run on an example, as it is or with CARAFE.
    """
    options: dict[str, Any] = {
        "down_kernel": down_kernel,
        "down_group": down_group,
        "encoder_kernel": encoder_kernel,
        "encoder_dilation": encoder_dilation,
        "compressed_channels": compressed_channels,
        "normalizer": normalizer,
    }
    sites = _replace(_DOWNSAMPLING, model, example_inputs, options, include, exclude, max_scale)
    return DownsamplingReport(sites)


def _replace(
    direction: "_Direction",
    model: nn.Module,
    examples,
    options: dict[str, Any],
    include: Sequence[str] | None,
    exclude: Sequence[str],
    max_scale: int,
) -> list[UpsamplingSite]:
    """What both functions do; returns all sites."""
    check_sizes(max_scale=max_scale)
    check_options(**options)
    if not isinstance(examples, list) or {type(example) for example in examples} != {tuple}:
        examples = [examples if isinstance(examples, tuple) else (examples,)]
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("DistributedDataParallel would not synchronize new layers: wrap later")
    # The new layers are to be trained, even where the model is looked at in inference mode.
    with torch.inference_mode(False), all_or_nothing(model):
        originals = give_each_place_its_own(model, direction.placed)
        plan = _Plan(direction, model, options, include, exclude, max_scale, originals)
        runs = plan.record(examples)
        direction.plan_convolutions(plan)
        plan.resampling_modules(runs)
        plan.calls(runs)
        plan.carry_out()
        _check(model, examples, [site.name for site in plan.sites if not site.reason])
    return plan.sites


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


class _Window(NamedTuple):
    """Of pooling, by rows and columns.

    Attributes:
        stride: of the window.
        reach: by how many pixels the map has to go on after the last window's first pixel, less
            the padding. Of n pixels there come (n - reach) // stride + 1.
    """

    stride: tuple[int, ...]
    reach: tuple[int, ...]

    @classmethod
    def of(cls, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False) -> "_Window":
        strides = _pair(stride or kernel_size)
        sizes = zip(*map(_pair, (kernel_size, padding, dilation)), strides, strict=True)
        reach = (d * (k - 1) + 1 - 2 * p - ceil_mode * (s - 1) for k, p, d, s in sizes)
        return cls(strides, tuple(reach))

    def obstacle(self) -> str:
        """Why CARAFE cannot put out as many pixels, or "". Its own reach is 1."""
        scale = self.stride[0]
        if self.stride != (scale, scale) or scale < 2:
            return _odd_factor(*self.stride)
        if min(self.reach) < 1 or max(self.reach) > scale + 1:
            return "its output is more than a pixel off a fraction of its input"
        return ""


class CARAFEPool2d(CARAFEDownsamplePack):
    """Stands in for ``nn.MaxPool2d`` and ``nn.AvgPool2d``: CARAFE, and as many pixels as theirs.

    Args:
        channels: channels of the input and of the output.
        scale_factor: downsampling ratio.
        reach: of the pooling's window, see :class:`_Window`.
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
        return _keep(super().forward(x), x, _Window(_pair(self.scale_factor), self.reach))

    def extra_repr(self) -> str:
        return f"reach={self.reach}"


def _keep(downsampled: Tensor, x: Tensor, window: _Window) -> Tensor:
    """As many pixels of ``downsampled`` as the window makes of ``x``."""
    rows, columns = (
        (n - reach) // stride + 1
        for n, reach, stride in zip(x.shape[-2:], window.reach, window.stride, strict=True)
    )
    return downsampled[..., :rows, :columns]


# ------------------------------------------------------- functions at run time


class _Packs(nn.ModuleDict):
    """The CARAFEPacks of an owner, by the number of the call that they replace.

    Attributes:
        direction: the name that it has as a child of the owner.
        order: for every call within a forward pass of the owner, those of modules further in
            included that no other owner replaces, the key of its CARAFEPack or None.
    """

    def __init__(
        self, direction: str, packs: dict[str, KernelPrediction], order: tuple[str | None, ...]
    ):
        super().__init__(packs)
        self.direction = direction
        self.order = order

    def attach(self, owner: nn.Module) -> None:
        """Makes this a child of ``owner`` and redirects the owner's calls to it."""
        owner.add_module(self.direction, self.train(owner.training))
        begin, check_count, end = (partial(f, self.direction) for f in (_begin, _check_count, _end))
        # Kept because unpickling a handle reserves its number, so that no later hook overwrites it.
        self.handles = [
            owner.register_forward_pre_hook(begin),
            owner.register_forward_hook(end, prepend=True, always_call=True),
            owner.register_forward_hook(check_count, prepend=True),  # so it runs before the end
        ]


class _Redirect(TorchFunctionMode):
    """Sends the calls of one forward pass to CARAFEPacks."""

    def __init__(self, packs: _Packs):
        super().__init__()
        self.packs = packs
        self.direction = _DIRECTIONS[packs.direction]
        self.count = 0
        # Of the module's call: above this method and the hook.
        self.frame = None if torch.compiler.is_compiling() else sys._getframe(2)

    def is_abandoned(self) -> bool:
        """Whether the forward pass has ended without its hooks, as KeyboardInterrupt ends it."""
        if torch.compiler.is_compiling() or self.frame is None:
            return False
        return all(frame is not self.frame for frame, _ in traceback.walk_stack(sys._getframe()))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.direction.counts(func, args, kwargs) or self.is_abandoned():
            return func(*args, **kwargs)
        order = self.packs.order
        key = order[self.count] if self.count < len(order) else None
        self.count += 1
        if key is None:
            return func(*args, **kwargs)  # an owner further out may have a CARAFEPack for it
        return self.direction.replace(self.packs[key], func, *args, **kwargs)


class _Thread(threading.local):
    """The redirects that are in force in a thread, outermost first."""

    def __init__(self) -> None:
        self.redirects: list[_Redirect] = []

    def current(self, direction: str, owner: nn.Module) -> _Redirect | None:
        """The redirect of the owner's running forward pass, without abandoned ones above it."""
        while self.redirects and self.redirects[-1].is_abandoned():
            self.pop()
        if self.redirects and self.redirects[-1].packs is getattr(owner, direction):
            return self.redirects[-1]
        return None  # another hook failed before the forward pass began

    def pop(self) -> None:
        self.redirects.pop().__exit__(None, None, None)


_thread = _Thread()


# Functions rather than methods: DataParallel's replicas share the hooks, but not the CARAFEPacks.
def _begin(direction: str, owner: nn.Module, _) -> None:
    _thread.current(direction, owner)
    redirect = _Redirect(getattr(owner, direction))
    redirect.__enter__()
    _thread.redirects.append(redirect)


def _check_count(direction: str, owner: nn.Module, *_) -> None:
    redirect = _thread.current(direction, owner)
    assert redirect is not None
    expected = len(redirect.packs.order)
    if redirect.count != expected:
        raise RuntimeError(
            f"{type(owner).__name__} {redirect.direction.did} {redirect.count} times, but "
            f"{expected} times with the example inputs of replace_{redirect.direction.kind}, so "
            "its CARAFEPacks cannot be told apart; exclude it there"
        )


def _end(direction: str, owner: nn.Module, *_) -> None:
    if _thread.current(direction, owner):
        _thread.pop()


def _before_convolution(conv: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A pre-hook of convolutions that had a stride."""
    if args:
        return (conv.carafe_downsample(args[0]), *args[1:]), kwargs  # type: ignore[operator]
    return args, {**kwargs, "input": conv.carafe_downsample(kwargs["input"])}  # type: ignore[operator]


def _pair(value) -> tuple:
    return tuple(value) if isinstance(value, Sequence) else (value, value)


# ----------------------------------------------------- what the example shows


@dataclass(eq=False)
class _Run:
    """One run of a module's forward pass, with the calls in it and further in."""

    module: nn.Module
    depth: int
    calls: list["_Call"] = field(default_factory=list)


@dataclass(eq=False)
class _Call:
    """One call of a function; ``runs`` are the forward passes it is in, outermost first."""

    runs: tuple[_Run, ...]
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


def _odd_factor(rows: float, columns: float) -> str:
    return f"its factor, {rows:.3g} x {columns:.3g}, is not one integer above 1"


def _size_factor(before: int, after: int) -> float:
    """A pyramid's odd sizes count as doubled: 25 comes of 13, which a stride of 2 made of 25."""
    return 2 if after == 2 * before - 1 > 1 else after / before


class _Direction:
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

    def plan_convolutions(self, plan: "_Plan") -> None:
        """Those that resample, which are known without their calls."""
        raise NotImplementedError

    def counts(self, func, args: tuple, kwargs: dict) -> bool:
        """Whether a call is one of those that are numbered."""
        raise NotImplementedError

    def describe(self, func, output: Tensor, input: Tensor, *args, **kwargs) -> tuple:
        """``was``, ``scale``, ``obstacle`` and ``reach`` of the :class:`_Call`."""
        raise NotImplementedError

    def replace(self, pack: KernelPrediction, func, input: Tensor, *args, **kwargs) -> Tensor:
        """Does with CARAFE what a call would have done."""
        raise NotImplementedError

    def module_kind(self, module: nn.Module) -> tuple[str, str]:
        """What a module of ``modules`` is, or "" if it does not resample, and what forbids it."""
        raise NotImplementedError

    def pack(self, call: _Call, options: dict, module: nn.Module | None) -> KernelPrediction:
        """What is to replace the call, or the module that makes it."""
        raise NotImplementedError

    def call(self, runs: Sequence[_Run], func, output: Tensor, input: Tensor, *args, **kwargs):
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
        return _Call(tuple(runs), input.shape, dtype, input.device, was, scale, obstacle, reach)


class _Upsampling(_Direction):
    kind, did, child, group = "upsampling", "interpolated", "carafe_upsample", "up_group"
    modules, placed = UPSAMPLING_MODULES, (*UPSAMPLING_MODULES, nn.ConvTranspose2d)

    def plan_convolutions(self, plan):
        plan.transposed_convolutions()

    def counts(self, func, args, kwargs):
        return func is F.interpolate

    def describe(
        self, func, output, input, size=None, scale_factor=None, mode="nearest", *_, **__
    ) -> tuple:
        was, input_size = f"F.interpolate {mode}", input.shape[2:]
        if mode not in _MODES or input.dim() != 4:
            return was, 0, f"mode {mode}", ()
        if scale_factor is not None:
            factors = _pair(scale_factor)
        elif prod(input_size) == 1:
            return was, 0, "its input is a single pixel with the example inputs", ()
        else:
            factors = tuple(map(_size_factor, input_size, output.shape[2:]))
        if factors[0] != factors[1] or factors[0] < 2 or factors[0] % 1:
            return was, 0, _odd_factor(*factors), ()
        return was, int(factors[0]), "", ()

    def replace(self, pack, func, input, size=None, scale_factor=None, *_, **__):
        if size is None:
            rows, columns = _pair(scale_factor)
            size = (int(input.shape[-2] * rows), int(input.shape[-1] * columns))
        return _crop(pack(input), _pair(size), pack.scale_factor)

    def module_kind(self, module):
        # One of a fixed size goes on to refuse what does not fit.
        return f"{type(module).__name__} {module.mode}", ""

    def pack(self, call, options, module):
        return CARAFEPack(call.channels, call.scale, **options)


class _Downsampling(_Direction):
    kind, did, child, group = "downsampling", "pooled", "carafe_downsample", "down_group"
    modules = placed = POOLING_MODULES

    def plan_convolutions(self, plan):
        plan.strided_convolutions()

    def counts(self, func, args, kwargs):
        is_pooling = func == F.avg_pool2d or func in _MAX_POOLS
        return is_pooling and _window(func, *args, **kwargs).stride != (1, 1)

    def describe(self, func, output, input, *args, **kwargs):
        window = _window(func, input, *args, **kwargs)
        return f"F.{func.__name__}", window.stride[0], window.obstacle(), window.reach

    def replace(self, pack, func, input, *args, **kwargs):
        window = _window(func, input, *args, **kwargs)
        if window.stride != _pair(pack.scale_factor) or window.obstacle():
            raise RuntimeError(
                f"CARAFE in place of other downsampling was made for factor {pack.scale_factor}, "
                f"but a map is to be pooled with stride {' x '.join(map(str, window.stride))}"
            )
        return _keep(pack(input), input, window)

    def module_kind(self, module):
        stride = _pair(module.stride)
        if stride == (1, 1):
            return "", ""
        takes_indices = getattr(module, "return_indices", False)
        return type(module).__name__, "its indices are put out, too" if takes_indices else ""

    def pack(self, call, options, module):
        if module is None:
            return CARAFEDownsamplePack(call.channels, call.scale, **options)
        return CARAFEPool2d(call.channels, call.scale, call.reach, **options)


def _window(func, input, kernel_size, stride=None, padding=0, *args, **kwargs) -> _Window:
    """Of a call of pooling."""
    names = ("dilation", "ceil_mode") if func in _MAX_POOLS else ("ceil_mode",)
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    options = {name: kwargs[name] for name in names if name in kwargs}
    return _Window.of(kernel_size, stride, padding, **options)


_UPSAMPLING, _DOWNSAMPLING = _Upsampling(), _Downsampling()
_DIRECTIONS = {direction.child: direction for direction in (_UPSAMPLING, _DOWNSAMPLING)}


class _Recorder(TorchFunctionMode):
    """Notes every call in the forward passes that are running."""

    def __init__(self, direction: _Direction) -> None:
        super().__init__()
        self.direction = direction
        self.runs: list[_Run] = []
        self.running: list[_Run] = []

    def enter(self, module: nn.Module, _) -> None:
        self.running.append(_Run(module, depth=len(self.running)))
        self.runs.append(self.running[-1])

    def leave(self, *_) -> None:
        self.running.pop()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self.direction.counts(func, args, kwargs):
            call = self.direction.call(self.running, func, output, *args, **kwargs)
            for run in self.running:
                run.calls.append(call)
        return output


def _run_examples(model: nn.Module, examples: Sequence[tuple], how: str = "") -> None:
    for number, example in enumerate(examples, 1):
        try:
            model(*example)
        except Exception as error:
            which = f"example {number} of {len(examples)}" if len(examples) > 1 else "the example"
            raise RuntimeError(
                f"{type(model).__name__} does not run{how} on {which}, so nothing was replaced: "
                f"{type(error).__name__}: {error}"
            ) from error


# ------------------------------------------------------------- what is replaced


def _transposed_factor(module: nn.ConvTranspose2d) -> tuple[int, tuple[int, ...], str]:
    """The upsampling ratio, the ``trim`` of CARAFE, and "" or why CARAFE cannot do the same."""
    scale = module.stride[0]
    trim: tuple[int, ...] = (0, 0)
    if type(module) is not nn.ConvTranspose2d:
        return scale, trim, f"{type(module).__name__} is a class of its own"
    if module._parameters.keys() != {"weight", "bias"}:
        return scale, trim, f"its parameters are {' and '.join(module._parameters)}"
    if module.stride != (scale, scale) or scale < 2:
        return scale, trim, _odd_factor(*module.stride)
    if module.groups > 1 and module.in_channels != module.out_channels:
        return scale, trim, f"{module.groups} groups that change the number of channels"
    reach = (d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    borders = (
        2 * p - o  # type: ignore[operator]
        for p, o in zip(module.padding, module.output_padding, strict=True)
    )
    trim = tuple(scale - r + b for r, b in zip(reach, borders, strict=True))
    if min(trim) < 0 or max(trim) >= scale:
        return scale, trim, f"its output is {-trim[0]:+} x {-trim[1]:+} pixels off a multiple"
    return scale, trim, ""


def _strided_obstacle(module: nn.Conv2d) -> str:
    """Why CARAFE cannot stand before a convolution in the place of its stride, or ""."""
    scale = module.stride[0]
    if module.stride != (scale, scale):
        return _odd_factor(*module.stride)
    paddings = (0, 0) if module.padding == "valid" else module.padding
    for p, k, d in zip(paddings, module.kernel_size, module.dilation, strict=True):
        if 2 * p != d * (k - 1):  # type: ignore[operator]
            return "its padding is not half its kernel"
    return ""


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass
class _Plan:
    """What is to be changed in one model."""

    direction: _Direction
    model: nn.Module
    options: dict[str, Any]
    include: Sequence[str] | None
    exclude: Sequence[str]
    max_scale: int
    originals: dict[nn.Module, nn.Module]  # of the copies that are in their places
    sites: list[UpsamplingSite] = field(default_factory=list)
    _bypassed: set[nn.Module] = field(default_factory=set)  # originals that are called all the same
    _modules: dict[nn.Module, nn.Module] = field(default_factory=dict)  # what each is replaced by
    _owners: dict[nn.Module, _Packs] = field(default_factory=dict)
    # What the input of each convolution that had a stride is to go through.
    _convolutions: dict[nn.Conv2d, CARAFEDownsamplePack] = field(default_factory=dict)
    # Calls of modules that have a site of their own.
    _planned: set[_Call] = field(default_factory=set)
    _replaced: set[_Call] = field(default_factory=set)
    # Their calls count as those of their callers.
    _see_through: set[nn.Module] = field(default_factory=set)

    def record(self, examples: Sequence[tuple]) -> list[_Run]:
        """Runs the examples; returns the runs of all modules."""
        recorder = _Recorder(self.direction)
        with evaluating(self.model) as undo, recorder:
            for module in self.model.modules():
                if isinstance(module, torch.jit.ScriptModule):
                    continue  # takes no hooks and shows no calls
                # Next to the forward pass, with the hooks that the module has outside of them.
                enter = module.register_forward_pre_hook(recorder.enter)
                leave = module.register_forward_hook(recorder.leave, prepend=True, always_call=True)
                undo.callback(enter.remove)
                undo.callback(leave.remove)
            for original in self.originals.values():
                hook = original.register_forward_pre_hook(lambda m, _: self._bypassed.add(m))
                undo.callback(hook.remove)
            _run_examples(self.model, examples)
        return recorder.runs

    def _objection(self, name: str, scale: int, channels: int) -> str:
        """Why a place that can have CARAFE is left alone all the same, or ""."""
        group = self.options[self.direction.group]
        if any(fnmatchcase(name, pattern) for pattern in self.exclude):
            return "excluded"
        if self.include is not None and not any(fnmatchcase(name, p) for p in self.include):
            return "not included"
        if scale > self.max_scale:
            return f"factor {scale} is above max_scale = {self.max_scale}"
        if channels < _MIN_CHANNELS:
            return f"its number of channels, {channels}, is that of an image or a mask"
        if channels % group:
            return f"{self.direction.group} = {group} does not divide its {channels} channels"
        return ""

    def _pack(
        self,
        name: str,
        was: str,
        calls: Sequence[_Call],
        obstacle: str,
        module: nn.Module | None = None,
    ) -> KernelPrediction | None:
        """Enters the site of a place's calls; returns what is to replace it, if anything is."""
        call = calls[0]
        scales = [call.scale for call in calls]
        reason = next(filter(None, (call.obstacle for call in calls)), "")
        if len(set(scales)) > 1:
            reason = reason or f"its factor is {' or '.join(map(str, sorted(set(scales))))}"
        reason = reason or self._objection(name, scales[0], call.channels) or obstacle
        if not reason:
            pack = self.direction.pack(call, self.options, module)
            reason = clash(module, pack) if module else ""
        if reason:
            self.sites.append(UpsamplingSite(name, was, call.channels, reason=reason))
            return None
        self.sites.append(UpsamplingSite(name, was, call.channels, scales[0], _count(pack)))
        return pack.to(device=call.device, dtype=call.dtype)

    def transposed_convolutions(self) -> None:
        for name, module in self.model.named_modules():
            if not isinstance(module, nn.ConvTranspose2d):
                continue
            before, after = module.in_channels, module.out_channels
            was = f"ConvTranspose2d to {after}"
            scale, trim, reason = _transposed_factor(module)
            reason = reason or self._objection(name, scale, before)
            if not name:
                reason = "it is the model itself"
            elif self.originals.get(module) in self._bypassed:
                reason = reason or "the model calls it other than by its name"
            if not reason:
                bias = module.bias is not None
                new = CARAFEConvTranspose2d(before, after, scale, trim, bias, **self.options)
                reason = clash(module, new)
            if reason:
                self.sites.append(UpsamplingSite(name, was, before, reason=reason))
                continue
            self._modules[module] = new.to(module.weight)
            added = _count(new) - _count(module)
            self.sites.append(UpsamplingSite(name, was, before, scale, added))

    def strided_convolutions(self) -> None:
        packs = [m for m in self.model.modules() if isinstance(m, CARAFEDownsamplePack)]
        encoders = {pack.content_encoder for pack in packs}
        for name, module in self.model.named_modules():
            if not isinstance(module, nn.Conv2d) or max(module.stride) == 1 or module in encoders:
                continue
            site = f"{name}.carafe_downsample" if name else "carafe_downsample"
            was, channels = f"Conv2d to {module.out_channels}", module.in_channels
            reason = _strided_obstacle(module)
            reason = reason or self._objection(site, module.stride[0], channels)
            if not reason and hasattr(module, "carafe_downsample"):
                reason = f"{type(module).__name__} has a carafe_downsample of its own"
            if reason:
                self.sites.append(UpsamplingSite(site, was, channels, reason=reason))
                continue
            scale = module.stride[0]
            pack = CARAFEDownsamplePack(channels, scale, **self.options)
            self._convolutions[module] = pack.to(module.weight)
            self.sites.append(UpsamplingSite(site, was, channels, scale, _count(pack)))

    def resampling_modules(self, runs: list[_Run]) -> None:
        """Modules that can be swapped: called for a factor, once in a run of their caller."""
        for name, module in self.model.named_modules():
            if type(module) not in self.direction.modules:
                continue
            was, reason = self.direction.module_kind(module)
            calls = [call for run in runs if run.module is module for call in run.calls]
            callers = {call.runs[-2:-1] for call in calls}
            if not was:
                continue
            if not calls:
                reason = reason or "not reached with the example inputs"
                self.sites.append(UpsamplingSite(name, was, reason=reason))
            elif len(callers) < len(calls) or len({call.channels for call in calls}) > 1:
                self._see_through.add(module)
            elif name and getattr(module, "size", None) is None:
                self._planned.update(calls)
                if pack := self._pack(name, was, calls, self._earlier_owner(calls[0]), module):
                    self._modules[module] = pack
                    self._replaced.update(calls)

    def _is_owner(self, module: nn.Module) -> bool:
        return isinstance(getattr(module, self.direction.child, None), _Packs)

    def _earlier_owner(self, call: _Call) -> str:
        """Says if the call is in a module whose calls have numbers already, which have to stay."""
        owner = next((run.module for run in call.runs if self._is_owner(run.module)), None)
        return f"within {type(owner).__name__}, which an earlier call has changed" if owner else ""

    def _run_of_owner(self, call: _Call) -> _Run:
        runs = call.runs
        return runs[-2] if runs[-1].module in self._see_through and len(runs) > 1 else runs[-1]

    def calls(self, runs: list[_Run]) -> None:
        """All other calls, by the modules that make them."""
        runs_of_module: dict[nn.Module, list[_Run]] = {}
        # What owners further in replace never comes to those further out.
        for run in sorted(runs, key=lambda run: run.depth, reverse=True):
            runs_of_module.setdefault(run.module, []).append(run)
        for owner, its_runs in runs_of_module.items():
            own_calls = [
                [c for c in run.calls if c not in self._planned and self._run_of_owner(c) is run]
                for run in its_runs
            ]
            if any(own_calls):
                self._calls_of(owner, its_runs, own_calls)

    def _calls_of(self, owner: nn.Module, runs: list[_Run], own_calls: list[list[_Call]]) -> None:
        name = next(n for n, module in self.model.named_modules() if module is owner)
        child = self.direction.child
        prefix = f"{name}.{child}" if name else child
        numbers = {call: str(k) for calls in own_calls for k, call in enumerate(calls)}
        # Whether every run of the owner makes the same calls, and in the same order among others.
        kinds = {tuple((call.channels, call.was) for call in calls) for calls in own_calls}
        orders = {
            tuple(numbers.get(call) for call in run.calls if call not in self._replaced)
            for run in runs
        }
        reason = ""
        if self._is_owner(owner):
            reason = "an earlier call has given the module's calls their numbers"
        elif len(kinds) > 1 or len(orders) > 1:
            reason = "its calls differ from one run of the module to another"
        if reason:
            was = next(call for calls in own_calls for call in calls).was.split()[0]
            self.sites.append(UpsamplingSite(f"{prefix}.*", was, reason=reason))
            return

        unfit = ""
        if isinstance(owner, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            unfit = f"{type(owner).__name__} would run a CARAFEPack as one of its layers"
        elif isinstance(owner, fx.GraphModule):
            unfit = "a GraphModule loses its forward hooks when it is copied"
        elif hasattr(owner, child):
            unfit = f"{type(owner).__name__} has a {child} of its own"
        packs = {}
        for key, calls in enumerate(zip(*own_calls, strict=True)):
            obstacle = self._earlier_owner(calls[0]) or unfit
            if pack := self._pack(f"{prefix}.{key}", calls[0].was, calls, obstacle):
                packs[str(key)] = pack
        if packs:
            (order,) = orders
            order = tuple(key if key in packs else None for key in order)
            self._owners[owner] = _Packs(child, packs, order)
            self._replaced.update(call for call, key in numbers.items() if key in packs)

    def carry_out(self) -> None:
        for name, module in list(self.model.named_modules(remove_duplicate=False)):
            original = self.originals.get(module, module)
            if new := self._modules.get(module):
                inherit(new, original)
            if new or original is not module:
                self.model.set_submodule(name, new or original)
        for owner, packs in self._owners.items():
            packs.attach(self.originals.get(owner, owner))
        for conv, pack in self._convolutions.items():
            conv.carafe_downsample = pack.train(conv.training)
            conv.stride = (1, 1)
            # Kept for the reason that _Packs.attach has.
            handle = conv.register_forward_pre_hook(_before_convolution, with_kwargs=True)
            vars(pack)["handle"] = handle


def _check(model: nn.Module, examples: Sequence[tuple], names: list[str]) -> None:
    """Runs the examples again, now with CARAFE, and warns of what is not in use."""
    idle = set(names)
    with evaluating(model) as undo:
        for name in names:
            hook = model.get_submodule(name).register_forward_hook(
                lambda *_, name=name: idle.discard(name)
            )
            undo.callback(hook.remove)
        _run_examples(model, examples, " with CARAFE in it")
    if idle:
        warnings.warn(
            f"the model did not run {', '.join(sorted(idle))} when the example was repeated",
            stacklevel=3,
        )
