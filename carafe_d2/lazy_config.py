"""Loading LazyConfigs, Detectron2's configs in Python, with the checks that name a mistake."""

import inspect
import logging
import os
from collections.abc import Callable, Iterator, Sequence

import torch
from detectron2.config import CfgNode, LazyConfig
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf

from .config import default_config
from .errors import UserError

logger = logging.getLogger(__name__)

# What tools/lazyconfig_train_net.py reads.
_NEEDED = ("model", "dataloader.test", "train.output_dir", "train.init_checkpoint", "train.device")
_NEEDED_TO_TRAIN = (
    *("dataloader.train", "optimizer.params", "lr_multiplier"),
    *("train.max_iter", "train.amp.enabled", "train.ddp", "train.checkpointer"),
    *("train.eval_period", "train.log_period"),
)
_POSITIVE = ("train.max_iter", "train.log_period", "train.checkpointer.period")


def load_lazy_config(
    config_file: str, overrides: Sequence[str] = (), *, eval_only: bool = False
) -> DictConfig:
    """Builds the config of tools/lazyconfig_train_net.py.

    Args:
        config_file: a Python file, or the YAML that Detectron2 saved such a config as.
        overrides: e.g. ["train.max_iter=100", "model.backbone.upsampler.name=bilinear"]. They may
            give further arguments to what the config calls, but no other keys that are not there.
        eval_only: whether what only training needs may be missing.

    Returns:
        The config. Without a GPU its device is the CPU, in float32.

    Raises:
        UserError: the file is missing or no config, or it lacks a key; an override is wrong; or the
            config calls something with an argument that it does not have.
    """
    cfg = _load(config_file)
    for key in _NEEDED if eval_only else _NEEDED + _NEEDED_TO_TRAIN:
        if OmegaConf.select(cfg, key) is None:
            raise UserError(f"config {config_file} lacks {key!r}, which this program reads")
    _override(cfg, overrides)
    for key in () if eval_only else _POSITIVE:
        value = OmegaConf.select(cfg, key)
        if value is None or value < 1:
            raise UserError(f"{key} must be at least 1, got {value}")
    _check_calls(OmegaConf.to_container(cfg, resolve=False))
    if cfg.train.device.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("No GPU found: running on the CPU in float32.")
        cfg.train.device = "cpu"
        OmegaConf.update(cfg, "train.amp.enabled", False)
    return cfg


def data_expectations(cfg: DictConfig) -> CfgNode:
    """What a LazyConfig says of its data, by the YAML configs' keys: see ``data.checks``.

    Args:
        cfg: a config of :func:`load_lazy_config`.

    Returns:
        Detectron2's defaults with the datasets, and what is trained of their annotations. The
        number of classes counts where ``model.roi_heads`` or a RetinaNet tells it.
    """

    def get(key: str, default=None):
        return OmegaConf.select(cfg, key, default=default)

    expected = default_config()
    for split, loader in (("TRAIN", "train"), ("TEST", "test")):
        names = get(f"dataloader.{loader}.dataset.names", ())
        expected.DATASETS[split] = (names,) if isinstance(names, str) else tuple(names)
    mapper = "dataloader.train.mapper"
    expected.MODEL.MASK_ON = get(f"{mapper}.use_instance_mask", False)
    expected.MODEL.KEYPOINT_ON = get(f"{mapper}.use_keypoint", False)
    expected.INPUT.MASK_FORMAT = get(f"{mapper}.instance_mask_format", "polygon")
    keypoints = get("model.roi_heads.keypoint_head.num_keypoints", 17)
    expected.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = keypoints
    expected.TEST.KEYPOINT_OKS_SIGMAS = list(get("dataloader.evaluator.kpt_oks_sigmas", ()))
    expected.MODEL.META_ARCHITECTURE = "other"
    for key, architecture, section in (
        ("model.num_classes", "RetinaNet", "RETINANET"),
        ("model.roi_heads.num_classes", "GeneralizedRCNN", "ROI_HEADS"),
    ):
        if get(key) is not None:
            expected.MODEL.META_ARCHITECTURE = architecture
            expected.MODEL[section].NUM_CLASSES = get(key)
    return expected


def _load(config_file: str) -> DictConfig:
    if not os.path.isfile(config_file):
        raise UserError(f"config file {config_file!r} does not exist; name one with --config-file")
    try:
        return LazyConfig.load(config_file)
    # Of a file that is no Python, and of one with another ending. Whatever else goes wrong in
    # there is for the programmer, who needs the traceback.
    except (SyntaxError, ValueError) as error:
        raise UserError(f"config {config_file}: {error}") from error


def _override(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Applies overrides; checks that they name what there is, and put numbers for numbers."""
    before = dict(_leaves(OmegaConf.to_container(cfg, resolve=False)))
    sections = set(cfg)
    for override in overrides:
        try:
            LazyConfig.apply_overrides(cfg, [override])
        except Exception as error:  # each of the libraries raises its own
            raise UserError(
                f"override {override!r} is not of the form path.to.key=value, or there is no such "
                f"path: {str(error).splitlines()[0]}"
            ) from error
    for key, value in _leaves(OmegaConf.to_container(cfg, resolve=False)):
        options = key.startswith(("train.ddp.", "train.checkpointer."))
        closed = key.startswith("train.") and not options
        if key not in before and (closed or key.split(".")[0] not in sections):
            raise UserError(f"the config has no key {key!r} that could be overridden")
        if type(before.get(key)) in (int, float) and type(value) in (str, bool):
            raise UserError(f"{key} must be a number like {before[key]}, got {value!r}")


def _leaves(node, path: str = "") -> Iterator[tuple[str, object]]:
    """The keys of nested dicts and lists, joined by dots, and their values."""
    if not isinstance(node, dict | list):
        yield path, node
        return
    for key, child in node.items() if isinstance(node, dict) else enumerate(node):
        yield from _leaves(child, f"{path}.{key}" if path else str(key))


def _check_calls(node, path: str = "") -> None:
    """Checks that what a config calls has the arguments that it is to be called with."""
    if isinstance(node, dict) and "_target_" in node:
        target = node["_target_"]
        target = locate(target) if isinstance(target, str) else target
        unknown = [key for key in node if key != "_target_" and not _takes(target, key)]
        if unknown:
            raise UserError(f"{path}: {target.__qualname__} has no argument {unknown[0]!r}")
    if isinstance(node, dict | list):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            _check_calls(child, f"{path}.{key}" if path else str(key))


def _takes(target: Callable, argument: str) -> bool:
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # nothing is known of it
        return True
    return argument in parameters or any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
    )
