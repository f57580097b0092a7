"""One line that names the config key, whatever a wrong value makes the libraries raise.

Libraries check values deep inside, with errors that name their own arguments, if they check at all.
Their checks are not repeated here. When something fails, the values that the user set are taken
back one by one, and the key without whose value it works is the one at fault.
"""

import contextlib
import copy
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import yaml
from detectron2.config import CfgNode
from detectron2.utils import comm

from .config import default_config, load_config, value_of
from .errors import UserError

_BASE = "_BASE_"


@contextlib.contextmanager
def named_mistakes(
    config_file: str, overrides: Sequence[str], attempt: Callable[[CfgNode], object]
) -> Iterator[None]:
    """Turns whatever is raised inside into a :class:`UserError` that names the key at fault.

    With CARAFE_D2_TRACEBACK set in the environment, the error comes out as it is.

    Args:
        config_file, overrides: what the user gave, see :func:`carafe_d2.config.load_config`.
        attempt: does with a config what may fail, or as much of it as is quick.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if os.environ.get("CARAFE_D2_TRACEBACK"):
            raise
        cause = _one_line(error)
        # Several processes would wait for each other in the attempts.
        if comm.get_world_size() == 1 and (fault := find_fault(config_file, overrides, attempt)):
            key, value, former = fault
            raise UserError(f"{key} = {value!r}: {cause}; with {former!r} it works") from error
        raise UserError(f"{cause} (CARAFE_D2_TRACEBACK=1 shows where)") from error


def find_fault(
    config_file: str, overrides: Sequence[str], attempt: Callable[[CfgNode], object]
) -> tuple[str, object, object] | None:
    """The key that makes an attempt fail, its value, and one with which the attempt succeeds.

    Tried are the command line's values first, then those of the config file that differ from
    its base. None if no single one is at fault.
    """
    logging.disable(logging.CRITICAL)
    try:
        cfg = load_config(config_file, overrides)
        if _succeeds(attempt, cfg):
            return None
        for key, former in _changes(config_file, overrides):
            trial = cfg.clone()
            trial.defrost()
            node, _, name = key.rpartition(".")
            section = value_of(trial, node) if node else trial
            value, section[name] = section[name], copy.deepcopy(former)
            if value != former and _succeeds(attempt, trial):
                return key, value, former
        return None
    finally:
        logging.disable(logging.NOTSET)


def _succeeds(attempt: Callable[[CfgNode], object], cfg: CfgNode) -> bool:
    try:
        attempt(cfg)
    except Exception:
        return False
    return True


def _changes(config_file: str, overrides: Sequence[str]) -> Iterator[tuple[str, object]]:
    """The keys that the user set, with the values that they would have otherwise.

    Backward: of two that belong together, such as ENABLED and TYPE, the second says more.
    """
    from_file = load_config(config_file)
    for key in reversed(overrides[::2]):
        yield key, value_of(from_file, key)
    content = yaml.safe_load(Path(config_file).read_text()) or {}
    base = content.pop(_BASE, None)
    from_base = load_config(str(Path(config_file).parent / base)) if base else default_config()
    for key in reversed([*_leaves(content)]):
        yield key, value_of(from_base, key)


def _leaves(node: dict, prefix: str = "") -> Iterator[str]:
    for key, child in node.items():
        if isinstance(child, dict):
            yield from _leaves(child, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _one_line(error: BaseException) -> str:
    message = " ".join(str(error).split())
    kind = type(error).__name__
    return message if isinstance(error, UserError) else f"{kind}: {message}" if message else kind
