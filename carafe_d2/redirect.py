"""Calls of functions in the forward passes of a model, for :mod:`carafe_d2.replace`.

With an example they are noted by their places, and later sent to the CARAFEPacks that replace them.
"""

import sys
import threading
import traceback
from functools import partial

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .directions import DIRECTIONS, Direction, Run
from .upsample import KernelPrediction


class Recorder(TorchFunctionMode):
    """Notes every call in the forward passes that are running."""

    def __init__(self, direction: Direction) -> None:
        super().__init__()
        self.direction = direction
        self.runs: list[Run] = []
        self.running: list[Run] = []

    def enter(self, module: nn.Module, _) -> None:
        self.running.append(Run(module, depth=len(self.running)))
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


class Packs(nn.ModuleDict):
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

    def __init__(self, packs: Packs):
        super().__init__()
        self.packs = packs
        self.direction = DIRECTIONS[packs.direction]
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


def before_convolution(conv: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A pre-hook of convolutions that had a stride."""
    if args:
        return (conv.carafe_downsample(args[0]), *args[1:]), kwargs  # type: ignore[operator]
    return args, {**kwargs, "input": conv.carafe_downsample(kwargs["input"])}  # type: ignore[operator]
