"""Which config key is at fault, or without effect, whatever it means to the libraries.

Libraries check values deep inside, with errors that name their own arguments, if they check at all.
Their checks are not repeated here. When something fails, the values that the user set are taken
back one by one, and the key without whose value it works is the one at fault.
"""

import contextlib
import copy
import logging
import os
from collections.abc import Callable, Iterator, Sequence

import yaml
from detectron2.config import CfgNode
from detectron2.utils import comm

from .config import default_config, load_config, own_keys, value_of
from .errors import UserError

logger = logging.getLogger(__name__)

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

    def explain(cause: str) -> str | None:
        if not (fault := find_fault(config_file, overrides, attempt)):
            return None
        key, value, former = fault
        return f"{key} = {value!r}: {cause}; with {former!r} it works"

    with one_line(explain):
        yield


@contextlib.contextmanager
def one_line(explain: Callable[[str], str | None]) -> Iterator[None]:
    """Turns whatever is raised inside into a :class:`UserError`; see :func:`named_mistakes`.

    Args:
        explain: makes of an error's message one that names what is at fault, if it finds that.
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
        if comm.get_world_size() == 1 and (explanation := explain(cause)):
            raise UserError(explanation) from error
        raise UserError(f"{cause} (CARAFE_D2_TRACEBACK=1 shows where)") from error


def find_fault(
    config_file: str, overrides: Sequence[str], attempt: Callable[[CfgNode], object]
) -> tuple[str, object, object] | None:
    """The key that makes an attempt fail, its value, and one with which the attempt succeeds.

    Tried are the command line's values first, then those of the config file that differ from
    its base. None if no single one is at fault.
    """
    with silence():
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


class RecordingNode(CfgNode):
    """A config that knows which of its keys were read; copies add to the same record."""

    @classmethod
    def of(cls, cfg: CfgNode, reads: "Reads", path: str = "") -> "RecordingNode":
        """A copy of a config that adds the keys read from it to ``reads``."""
        node = cls()
        node.__dict__.update(cfg.__dict__, __reads__=reads, __path__=path)
        for key, value in cfg.items():
            child = cls.of(value, reads, f"{path}{key}.") if isinstance(value, CfgNode) else value
            dict.__setitem__(node, key, child)
        return node

    def __getitem__(self, key):
        value = super().__getitem__(key)
        if not isinstance(value, CfgNode):
            self.__dict__["__reads__"].add(self.__dict__["__path__"] + key)
        return value

    def get(self, key, default=None):
        try:
            return self[key]
        except KeyError:
            return default


class Reads(set[str]):
    """The keys that were read of a :class:`RecordingNode` and of its copies."""

    def __deepcopy__(self, memo):
        return self


# Read when the config is loaded, or of a copy that Detectron2's default_setup makes.
_READ_ELSEWHERE = {"VERSION", "DATASETS.REGISTER", "CUDNN_BENCHMARK", "FLOAT32_PRECISION"}


def warn_of_idle_keys(
    config_file: str, overrides: Sequence[str], cfg: RecordingNode, *, eval_only: bool
) -> None:
    """Names in a warning what the user set and nothing has read, such as RetinaNet's options.

    Of the file only the model's keys count: recipes are shared among models and schedules.

    Args:
        config_file, overrides: what the user gave.
        cfg: the config from that, when everything is built that reads it.
        eval_only: whether nothing is trained; what concerns only training is then none of it.
    """
    read = cfg.__dict__["__reads__"] | _READ_ELSEWHERE
    typed = {*overrides[::2]}
    with silence():
        changes = dict(_changes(config_file, overrides))
    for key, former in changes.items():
        matters = key.startswith(("MODEL.", "TEST.AUG.")) or (key in typed and not eval_only)
        if matters and key not in read and value_of(cfg, key) != former:
            logger.warning(f"{key} has no effect: nothing in this model or training reads it.")


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keeps the log empty while something is only tried."""
    logging.disable(logging.CRITICAL)
    try:
        yield
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
    keys = own_keys(config_file)
    from_base = default_config()
    if base := keys.pop(_BASE, None):
        for node in base.value if isinstance(base, yaml.SequenceNode) else [base]:
            path = os.path.join(os.path.dirname(config_file), os.path.expanduser(node.value))
            from_base.merge_from_file(node.value if "://" in node.value else path)
    for key in reversed(keys):
        with contextlib.suppress(KeyError):  # one of an earlier version of the config
            yield key, value_of(from_base, key)


def _one_line(error: BaseException) -> str:
    message = " ".join(str(error).split())
    kind = type(error).__name__
    return message if isinstance(error, UserError) else f"{kind}: {message}" if message else kind
