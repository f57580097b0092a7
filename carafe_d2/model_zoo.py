"""The configs of this package by name, like :mod:`detectron2.model_zoo`.

They work from a checkout and from an installed wheel alike::

    from carafe_d2 import model_zoo
    cfg = model_zoo.get_config("mask_rcnn_R50_FPN_carafe_1x.yaml")
"""

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from .config import find_config_file, load_config


def get_config_file(config_path: str) -> str:
    """The path of a config by its name, e.g. "mask_rcnn_R50_FPN_carafe_1x.yaml".

    Raises:
        UserError: there is no such config.
    """
    return find_config_file(config_path)


def get_config(config_path: str) -> CfgNode:
    """A config by its name, with the keys of :func:`carafe_d2.add_carafe_config`, not frozen.

    Without a GPU its device is the CPU.

    Raises:
        UserError: there is no such config.
    """
    cfg = load_config(config_path)
    cfg.defrost()
    return cfg


def get(config_path: str, device: str | None = None) -> nn.Module:
    """Builds the model of a config by its name, with random weights, in training mode.

    Args:
        config_path: see :func:`get_config_file`.
        device: default is the config's, or the CPU where there is no GPU.

    Raises:
        UserError: there is no such config.
    """
    cfg = get_config(config_path)
    if device is not None:
        cfg.MODEL.DEVICE = device
    return build_model(cfg)
