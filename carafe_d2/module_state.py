"""What :func:`~carafe_d2.replace_upsampling` and its like do to modules as such.

What others have put on a module goes over to its replacement, each place gets a module of its own
while calls are recorded, and an error leaves a model as it was.
"""

import copy
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

UPSAMPLING_MODULES = (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
POOLING_MODULES = (nn.MaxPool2d, nn.AvgPool2d)
_CHILDREN = ("_parameters", "_buffers", "_modules")


def _attached(module: nn.Module) -> Iterator[tuple[str, str]]:
    """What others put on a module to be replaced, beside hooks: where it is kept, and its name."""
    if isinstance(module, nn.ConvTranspose2d):
        plain = vars(nn.ConvTranspose2d(1, 1, 1, device="meta"))
    elif isinstance(module, POOLING_MODULES):
        plain = vars(type(module)(1))
    else:
        plain = vars(nn.Upsample())
    yield from (("", name) for name in vars(module) if name not in plain)
    for kind in _CHILDREN:
        yield from ((kind, name) for name in vars(module)[kind] if name not in plain[kind])


def clash(old: nn.Module, new: nn.Module) -> str:
    """Says if something that others put on ``old`` would mean something else on ``new``."""
    for _, name in _attached(old):
        # nn.Module's own may be hidden, e.g. its method `type`, but not what makes a forward pass.
        if hasattr(new, name) and (callable(getattr(old, name)) or not hasattr(nn.Module, name)):
            return f"it was given a {name} of its own"
    return ""


def inherit(new: nn.Module, old: nn.Module) -> None:
    """Gives ``new`` the mode of ``old`` and what others put there; hooks stay known to handles."""
    new.train(old.training)
    for name in vars(nn.Module()).keys() - _CHILDREN:
        vars(new)[name] = vars(old)[name]
    for kind, name in _attached(old):
        target, source = (vars(m)[kind] if kind else vars(m) for m in (new, old))
        target[name] = source[name]
    hooks: dict[int, Any] = old._load_state_dict_pre_hooks
    for number, hook in hooks.items():
        if hook.with_module:  # and knows it, by a weak reference
            hooks[number] = copy.copy(hook)
            hooks[number].module = weakref.ref(new)


def give_each_place_its_own(
    model: nn.Module, kinds: tuple[type[nn.Module], ...]
) -> dict[nn.Module, nn.Module]:
    """Puts a copy where modules of these classes stand, so that a call shows its place.

    Returns:
        The originals of the copies. A module with weights has the same copy in all its places.
    """
    originals: dict[nn.Module, nn.Module] = {}
    shared: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and type(module) in kinds:
            own = shared.get(module) or copy.copy(module)
            if isinstance(module, nn.ConvTranspose2d):
                shared[module] = own
            vars(own).update({k: copy.copy(v) for k, v in vars(own).items() if "_hooks" in k})
            originals[own] = module
            model.set_submodule(name, own)
    return originals


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """An error leaves modules, attributes, hooks, buffers and random numbers as they were."""
    found = [c for m in model.modules() for c in (vars(m), *vars(m).values())]
    containers = [c for c in found if type(c) in (dict, OrderedDict, list, set)]
    contents = [copy.copy(c) for c in containers]
    items = (c.values() if isinstance(c, dict) else c for c in containers)
    tensors = {item for item in chain.from_iterable(items) if isinstance(item, Tensor)}
    others = [t for t in tensors if not isinstance(t, nn.Parameter) and not is_lazy(t)]
    values = [(t, t.detach().clone()) for t in others]
    classes: list[tuple[Any, type]] = [(m, type(m)) for m in (*model.modules(), *tensors)]
    random = torch.get_rng_state()
    cuda_random = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    except BaseException:
        for container, content in zip(containers, contents, strict=True):
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)
        for changed, kind in classes:
            if type(changed) is not kind:  # a lazy module, or one of its parameters
                changed.__class__ = kind
        for tensor, value in values:
            # In inference mode because only there all are written to. Those that cannot be, such as
            # expanded ones, have not changed.
            with torch.inference_mode(), suppress(RuntimeError):
                tensor.copy_(value)
        torch.set_rng_state(random)
        torch.cuda.set_rng_state_all(cuda_random)
        raise


@contextmanager
def evaluating(model: nn.Module) -> Iterator[ExitStack]:
    """Evaluation mode without gradients; the stack may take more that is to be undone after it."""
    with ExitStack() as undo, torch.no_grad():
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        model.eval()
        yield undo
