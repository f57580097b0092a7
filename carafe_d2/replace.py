"""Puts CARAFE in the place of the upsampling in any model: :func:`replace_upsampling`.

Upsampling modules are swapped by name. A call of ``F.interpolate`` inside a forward pass is no
module, so it is known by its place: the k-th that one run of its module, the *owner*, makes itself.
The owner gets the CARAFEPacks as children, and forward hooks that put its forward pass under a
``TorchFunctionMode`` that sends those calls to them. Nothing global is patched, every module keeps
its class, and the model is saved, copied, trained, compiled and exported like any other. Nothing
here needs Detectron2.
"""

import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .module_state import (
    UPSAMPLING_MODULES,
    all_or_nothing,
    clash,
    evaluating,
    give_each_place_its_own,
    inherit,
)
from .upsample import CARAFEPack, check_options, check_sizes, xavier_init

_MODES = ("nearest", "nearest-exact", "bilinear")
_MIN_CHANNELS = 4


@dataclass(frozen=True)
class UpsamplingSite:
    """A place where a model upsamples.

    Attributes:
        name: of the module that stands there, or would; what ``include`` and ``exclude`` match.
        was: what upsampled there.
        channels: of the map that is upsampled; None if unknown.
        scale: CARAFE's upsampling ratio; None if left alone.
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

    def __init__(self, sites: Sequence[UpsamplingSite]):
        super().__init__(site for site in sites if not site.reason)
        self.left_alone = [site for site in sites if site.reason]

    def __str__(self) -> str:
        rows = [("replaced", "was", "channels", "factor", "parameters")]
        rows += [
            (site.name, site.was, str(site.channels), f"x{site.scale}", f"{site.parameters:+,}")
            for site in self
        ]
        rows.append(("total", "", "", "", f"{sum(site.parameters for site in self):+,}"))
        table = _table(rows, right=(2, 3, 4)) if self else "nothing replaced"
        if self.left_alone:
            table += "\n\n" + _table([("left alone", "was", "because"), *self._left_alone_rows()])
        return table if self or self.left_alone else "nothing replaced: no upsampling was seen"

    def _left_alone_rows(self) -> Iterator[tuple[str, ...]]:
        """One row for all that a module does in the same way, e.g. for every box."""
        for _, group in groupby(self.left_alone, lambda s: (s.name.rpartition(".")[0], s.was)):
            first, *rest = group
            name = f"{first.name} to {rest[-1].name.rpartition('.')[2]}" if rest else first.name
            alike = all(site.reason == first.reason for site in rest)
            yield name, first.was, first.reason if alike else f"{first.reason}; ..."


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
    check_sizes(max_scale=max_scale)
    check_options(**options)
    examples = example_inputs
    if not isinstance(examples, list) or {type(example) for example in examples} != {tuple}:
        examples = [examples if isinstance(examples, tuple) else (examples,)]
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("DistributedDataParallel would not synchronize new layers: wrap later")
    # The new layers are to be trained, even where the model is looked at in inference mode.
    with torch.inference_mode(False), all_or_nothing(model):
        plan = _Plan(model, options, include, exclude, max_scale, give_each_place_its_own(model))
        runs = plan.record(examples)
        plan.transposed_convolutions()
        plan.upsampling_modules(runs)
        plan.interpolations(runs)
        plan.carry_out()
        _check(model, examples, [site.name for site in plan.sites if not site.reason])
    return UpsamplingReport(plan.sites)


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


# ------------------------------------------------------- F.interpolate at run time


class _Packs(nn.ModuleDict):
    """The CARAFEPacks of an owner, by the number of the call that they replace.

    Attributes:
        order: for every interpolation within a forward pass of the owner, those of modules further
            in included that no other owner replaces, the key of its CARAFEPack or None.
    """

    def __init__(self, packs: dict[str, CARAFEPack], order: tuple[str | None, ...]):
        super().__init__(packs)
        self.order = order

    def attach(self, owner: nn.Module) -> None:
        """Makes this a child of ``owner`` and redirects the owner's interpolations to it."""
        owner.carafe_upsample = self.train(owner.training)
        # Kept because unpickling a handle reserves its number, so that no later hook overwrites it.
        self.handles = [
            owner.register_forward_pre_hook(_begin),
            owner.register_forward_hook(_end, prepend=True, always_call=True),
            owner.register_forward_hook(_check_count, prepend=True),  # so it runs before _end
        ]


class _Redirect(TorchFunctionMode):
    """Sends the interpolations of one forward pass to CARAFEPacks."""

    def __init__(self, packs: _Packs):
        super().__init__()
        self.packs = packs
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
        if func is not F.interpolate or self.is_abandoned():
            return func(*args, **kwargs)
        order = self.packs.order
        key = order[self.count] if self.count < len(order) else None
        self.count += 1
        if key is None:
            return func(*args, **kwargs)  # an owner further out may have a CARAFEPack for it
        return _interpolate(self.packs[key], *args, **kwargs)


class _Thread(threading.local):
    """The redirects that are in force in a thread, outermost first."""

    def __init__(self) -> None:
        self.redirects: list[_Redirect] = []

    def current(self, owner: nn.Module) -> _Redirect | None:
        """The redirect of the owner's running forward pass, without abandoned ones above it."""
        while self.redirects and self.redirects[-1].is_abandoned():
            self.pop()
        if self.redirects and self.redirects[-1].packs is owner.carafe_upsample:
            return self.redirects[-1]
        return None  # another hook failed before the forward pass began

    def pop(self) -> None:
        self.redirects.pop().__exit__(None, None, None)


_thread = _Thread()


# Functions rather than methods: DataParallel's replicas share the hooks, but not the CARAFEPacks.
def _begin(owner: nn.Module, _) -> None:
    _thread.current(owner)
    redirect = _Redirect(owner.carafe_upsample)  # type: ignore[arg-type]
    redirect.__enter__()
    _thread.redirects.append(redirect)


def _check_count(owner: nn.Module, *_) -> None:
    redirect = _thread.current(owner)
    assert redirect is not None
    expected = len(redirect.packs.order)
    if redirect.count != expected:
        raise RuntimeError(
            f"{type(owner).__name__} interpolated {redirect.count} times, but {expected} times "
            "with the example inputs of replace_upsampling, so its CARAFEPacks cannot be told "
            "apart; exclude it there"
        )


def _end(owner: nn.Module, *_) -> None:
    if _thread.current(owner):
        _thread.pop()


def _interpolate(pack: CARAFEPack, input: Tensor, size=None, scale_factor=None, *_, **__) -> Tensor:
    """CARAFE with the arguments of ``F.interpolate``."""
    scale = pack.scale_factor
    if size is None:
        rows, columns = _pair(scale_factor)
        size = (int(input.shape[-2] * rows), int(input.shape[-1] * columns))
    return _crop(pack(input), _pair(size), scale)


def _pair(value) -> tuple:
    return tuple(value) if isinstance(value, Sequence) else (value, value)


# ----------------------------------------------------- what the example shows


@dataclass(eq=False)
class _Run:
    """One run of a module's forward pass, with the interpolations in it and further in."""

    module: nn.Module
    depth: int
    calls: list["_Call"] = field(default_factory=list)


@dataclass(eq=False)
class _Call:
    """One call of ``F.interpolate``; ``runs`` are the forward passes it is in, outermost first."""

    runs: tuple[_Run, ...]
    input_shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    output_size: tuple[int, ...]
    scale_factor: float | Sequence[float] | None
    mode: str

    @property
    def channels(self) -> int:
        return self.input_shape[1]

    def factor(self) -> tuple[int, str]:
        """The upsampling ratio and "", or 0 and why CARAFE cannot do the same."""
        if len(self.input_shape) != 4:
            return 0, f"its input has rank {len(self.input_shape)}, not 4"
        if self.mode not in _MODES:
            return 0, f"mode {self.mode}"
        if not self.dtype.is_floating_point:
            return 0, f"dtype {self.dtype}"
        input_size = self.input_shape[2:]
        if self.scale_factor is not None:
            factors = _pair(self.scale_factor)
        elif prod(input_size) == 1:
            return 0, "its input is a single pixel with the example inputs"
        else:
            factors = tuple(map(_size_factor, input_size, self.output_size))
        if factors[0] != factors[1] or factors[0] < 2 or factors[0] % 1:
            return 0, _odd_factor(*factors)
        return int(factors[0]), ""


def _odd_factor(rows: float, columns: float) -> str:
    return f"its factor, {rows:.3g} x {columns:.3g}, is not one integer above 1"


def _size_factor(before: int, after: int) -> float:
    """A pyramid's odd sizes count as doubled: 25 comes of 13, which a stride of 2 made of 25."""
    return 2 if after == 2 * before - 1 > 1 else after / before


def _call(
    runs: Sequence[_Run], output, input, size=None, scale_factor=None, mode="nearest", *_, **__
) -> _Call:
    """The note of a call, from what it is in, what it returned and the arguments it had."""
    # Autocast makes the input half, but CARAFE's parameters are to be like the others.
    kind = input.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    dtype = torch.float32 if autocast else input.dtype
    size_after = tuple(output.shape[2:])
    return _Call(tuple(runs), input.shape, dtype, input.device, size_after, scale_factor, mode)


class _Recorder(TorchFunctionMode):
    """Notes every interpolation in the forward passes that are running."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[_Run] = []
        self.running: list[_Run] = []

    def enter(self, module: nn.Module, _) -> None:
        self.running.append(_Run(module, depth=len(self.running)))
        self.runs.append(self.running[-1])

    def leave(self, *_) -> None:
        self.running.pop()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is F.interpolate:
            call = _call(self.running, output, *args, **(kwargs or {}))
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


def _is_owner(module: nn.Module) -> bool:
    return isinstance(getattr(module, "carafe_upsample", None), _Packs)


def _earlier_owner(call: _Call) -> str:
    """Says if the call is in a module whose calls have numbers already, which must not change."""
    owner = next((run.module for run in call.runs if _is_owner(run.module)), None)
    return f"within {type(owner).__name__}, which an earlier call has changed" if owner else ""


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass
class _Plan:
    """What is to be changed in one model."""

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
    # Calls of modules that have a site of their own.
    _planned: set[_Call] = field(default_factory=set)
    _replaced: set[_Call] = field(default_factory=set)
    # Their calls count as those of their callers.
    _see_through: set[nn.Module] = field(default_factory=set)

    def record(self, examples: Sequence[tuple]) -> list[_Run]:
        """Runs the examples; returns the runs of all modules."""
        recorder = _Recorder()
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
        up_group = self.options["up_group"]
        if any(fnmatchcase(name, pattern) for pattern in self.exclude):
            return "excluded"
        if self.include is not None and not any(fnmatchcase(name, p) for p in self.include):
            return "not included"
        if scale > self.max_scale:
            return f"factor {scale} is above max_scale = {self.max_scale}"
        if channels < _MIN_CHANNELS:
            return f"its number of channels, {channels}, is that of an image or a mask"
        if channels % up_group:
            return f"up_group = {up_group} does not divide its {channels} channels"
        return ""

    def _pack(
        self,
        name: str,
        was: str,
        calls: Sequence[_Call],
        obstacle: str,
        module: nn.Module | None = None,
    ) -> CARAFEPack | None:
        """Enters the site of a place's calls; returns what is to replace it, if anything is."""
        call = calls[0]
        scales, reasons = zip(*(call.factor() for call in calls), strict=True)
        reason = next(filter(None, reasons), "")
        if len(set(scales)) > 1:
            reason = reason or f"its factor is {' or '.join(map(str, sorted(set(scales))))}"
        reason = reason or self._objection(name, scales[0], call.channels) or obstacle
        if not reason:
            pack = CARAFEPack(call.channels, scales[0], **self.options)
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

    def upsampling_modules(self, runs: list[_Run]) -> None:
        """Modules that can be swapped: called for a factor, once in a run of their caller."""
        for name, module in self.model.named_modules():
            if type(module) not in UPSAMPLING_MODULES:
                continue
            was = f"{type(module).__name__} {module.mode}"
            calls = [call for run in runs if run.module is module for call in run.calls]
            callers = {call.runs[-2:-1] for call in calls}
            if not calls:
                reason = "not reached with the example inputs"
                self.sites.append(UpsamplingSite(name, was, reason=reason))
            elif len(callers) < len(calls) or len({call.channels for call in calls}) > 1:
                self._see_through.add(module)
            elif name and module.size is None:
                self._planned.update(calls)
                if pack := self._pack(name, was, calls, _earlier_owner(calls[0]), module):
                    self._modules[module] = pack
                    self._replaced.update(calls)

    def _run_of_owner(self, call: _Call) -> _Run:
        runs = call.runs
        return runs[-2] if runs[-1].module in self._see_through and len(runs) > 1 else runs[-1]

    def interpolations(self, runs: list[_Run]) -> None:
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
                self._interpolations_of(owner, its_runs, own_calls)

    def _interpolations_of(
        self, owner: nn.Module, runs: list[_Run], own_calls: list[list[_Call]]
    ) -> None:
        name = next(n for n, module in self.model.named_modules() if module is owner)
        prefix = f"{name}.carafe_upsample" if name else "carafe_upsample"
        numbers = {call: str(k) for calls in own_calls for k, call in enumerate(calls)}
        # Whether every run of the owner makes the same calls, and in the same order among others.
        kinds = {tuple((call.channels, call.mode) for call in calls) for calls in own_calls}
        orders = {
            tuple(numbers.get(call) for call in run.calls if call not in self._replaced)
            for run in runs
        }
        reason = ""
        if _is_owner(owner):
            reason = "an earlier call has given the module's calls their numbers"
        elif len(kinds) > 1 or len(orders) > 1:
            reason = "its calls differ from one run of the module to another"
        if reason:
            self.sites.append(UpsamplingSite(f"{prefix}.*", "F.interpolate", reason=reason))
            return

        unfit = ""
        if isinstance(owner, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            unfit = f"{type(owner).__name__} would run a CARAFEPack as one of its layers"
        elif isinstance(owner, fx.GraphModule):
            unfit = "a GraphModule loses its forward hooks when it is copied"
        elif hasattr(owner, "carafe_upsample"):
            unfit = f"{type(owner).__name__} has a carafe_upsample of its own"
        packs = {}
        for key, calls in enumerate(zip(*own_calls, strict=True)):
            site, was = f"{prefix}.{key}", f"F.interpolate {calls[0].mode}"
            if pack := self._pack(site, was, calls, _earlier_owner(calls[0]) or unfit):
                packs[str(key)] = pack
        if packs:
            (order,) = orders
            order = tuple(key if key in packs else None for key in order)
            self._owners[owner] = _Packs(packs, order)
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
