"""Puts CARAFE in the place of the up- or downsampling in any model.

:func:`replace_upsampling` and :func:`replace_downsampling` work by the same means, and a
:class:`Direction` is what they do not share. Modules that resample are swapped by name. A call of
``F.interpolate`` or ``F.max_pool2d`` inside a forward pass is no module, so it is known by its
place: the k-th that one run of its module, the *owner*, makes itself. The owner gets the
CARAFEPacks as children, and forward hooks that put its forward pass under a ``TorchFunctionMode``
that sends those calls to them. Nothing global is patched, every module keeps its class, and the
model is saved, copied, trained, compiled and exported like any other. Nothing here needs
Detectron2.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any

import torch
from torch import fx, nn

from .directions import (
    DOWNSAMPLING,
    UPSAMPLING,
    Call,
    CARAFEConvTranspose2d,
    CARAFEPool2d,
    Direction,
    Run,
    odd_factor,
)
from .downsample import CARAFEDownsamplePack
from .module_state import all_or_nothing, clash, evaluating, give_each_place_its_own, inherit
from .redirect import Packs, Recorder, before_convolution
from .upsample import KernelPrediction, check_options, check_sizes

__all__ = ["CARAFEConvTranspose2d", "CARAFEPool2d", "replace_downsampling", "replace_upsampling"]

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
    sites = _replace(UPSAMPLING, model, example_inputs, options, include, exclude, max_scale)
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
    sites = _replace(DOWNSAMPLING, model, example_inputs, options, include, exclude, max_scale)
    return DownsamplingReport(sites)


def _replace(
    direction: "Direction",
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
        if direction is UPSAMPLING:
            plan.transposed_convolutions()
        else:
            plan.strided_convolutions()
        plan.resampling_modules(runs)
        plan.calls(runs)
        plan.carry_out()
        _check(model, examples, [site.name for site in plan.sites if not site.reason])
    return plan.sites


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


def _transposed_factor(module: nn.ConvTranspose2d) -> tuple[int, tuple[int, ...], str]:
    """The upsampling ratio, the ``trim`` of CARAFE, and "" or why CARAFE cannot do the same."""
    scale = module.stride[0]
    trim: tuple[int, ...] = (0, 0)
    if type(module) is not nn.ConvTranspose2d:
        return scale, trim, f"{type(module).__name__} is a class of its own"
    if module._parameters.keys() != {"weight", "bias"}:
        return scale, trim, f"its parameters are {' and '.join(module._parameters)}"
    if module.stride != (scale, scale) or scale < 2:
        return scale, trim, odd_factor(*module.stride)
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
        return odd_factor(*module.stride)
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

    direction: Direction
    model: nn.Module
    options: dict[str, Any]
    include: Sequence[str] | None
    exclude: Sequence[str]
    max_scale: int
    originals: dict[nn.Module, nn.Module]  # of the copies that are in their places
    sites: list[UpsamplingSite] = field(default_factory=list)
    _bypassed: set[nn.Module] = field(default_factory=set)  # originals that are called all the same
    _modules: dict[nn.Module, nn.Module] = field(default_factory=dict)  # what each is replaced by
    _owners: dict[nn.Module, Packs] = field(default_factory=dict)
    # What the input of each convolution that had a stride is to go through.
    _convolutions: dict[nn.Conv2d, CARAFEDownsamplePack] = field(default_factory=dict)
    # Calls of modules that have a site of their own.
    _planned: set[Call] = field(default_factory=set)
    _replaced: set[Call] = field(default_factory=set)
    # Their calls count as those of their callers.
    _see_through: set[nn.Module] = field(default_factory=set)

    def record(self, examples: Sequence[tuple]) -> list[Run]:
        """Runs the examples; returns the runs of all modules."""
        recorder = Recorder(self.direction)
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
        calls: Sequence[Call],
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

    def resampling_modules(self, runs: list[Run]) -> None:
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
        return isinstance(getattr(module, self.direction.child, None), Packs)

    def _earlier_owner(self, call: Call) -> str:
        """Says if the call is in a module whose calls have numbers already, which have to stay."""
        owner = next((run.module for run in call.runs if self._is_owner(run.module)), None)
        return f"within {type(owner).__name__}, which an earlier call has changed" if owner else ""

    def _run_of_owner(self, call: Call) -> Run:
        runs = call.runs
        return runs[-2] if runs[-1].module in self._see_through and len(runs) > 1 else runs[-1]

    def calls(self, runs: list[Run]) -> None:
        """All other calls, by the modules that make them."""
        runs_of_module: dict[nn.Module, list[Run]] = {}
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

    def _calls_of(self, owner: nn.Module, runs: list[Run], own_calls: list[list[Call]]) -> None:
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
            self._owners[owner] = Packs(child, packs, order)
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
            # Kept for the reason that Packs.attach has.
            handle = conv.register_forward_pre_hook(before_convolution, with_kwargs=True)
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
