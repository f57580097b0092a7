"""Config keys of CARAFE models, and the checks that name the key when a value is wrong."""

import logging
import os
from collections.abc import Sequence

import torch
import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg

from .errors import UserError

logger = logging.getLogger(__name__)


def add_carafe_config(cfg: CN) -> None:
    """Adds the keys of CARAFE models, with the published defaults, to a Detectron2 config."""
    # The CARAFE upsamplers of pyramid and heads; names as in the arguments of CARAFEPack.
    cfg.MODEL.CARAFE = CN()
    # Side of the reassembly kernel, odd.
    cfg.MODEL.CARAFE.UP_KERNEL = 5
    # Number of channel groups with reassembly kernels of their own.
    cfg.MODEL.CARAFE.UP_GROUP = 1
    # Side and dilation of the convolution that predicts the kernels; the side is odd.
    cfg.MODEL.CARAFE.ENCODER_KERNEL = 3
    cfg.MODEL.CARAFE.ENCODER_DILATION = 1
    # Channels that the input is compressed to before the kernels are predicted.
    cfg.MODEL.CARAFE.COMPRESSED_CHANNELS = 64

    # How build_*_carafe_fpn_backbone upsamples: carafe, nearest, bilinear, deconv, pixel_shuffle.
    cfg.MODEL.FPN.UPSAMPLE = "carafe"
    # How MaskRCNNCarafeUpsampleHead upsamples: carafe, deconv (the stock head), nearest, bilinear.
    cfg.MODEL.ROI_MASK_HEAD.UPSAMPLE = "carafe"
    # How CarafeSemSegFPNHead upsamples: carafe, nearest, bilinear (the stock head), deconv,
    # pixel_shuffle.
    cfg.MODEL.SEM_SEG_HEAD.UPSAMPLE = "carafe"

    # Of train_net.py: keep weights and feature maps in the channels_last memory format.
    cfg.MODEL.CHANNELS_LAST = False
    # Of train_net.py: SGD, with the keys of Detectron2, or AdamW.
    cfg.SOLVER.OPTIMIZER = "SGD"


def load_config(config_file: str, overrides: Sequence[str] = ()) -> CN:
    """Builds the config of a command-line program.

    Args:
        config_file: a YAML file.
        overrides: keys and values in turn, e.g. ["SOLVER.BASE_LR", "0.01"].

    Returns:
        The frozen config. Without a GPU its device is the CPU, in float32.

    Raises:
        UserError: the file is missing or no YAML, or a key or value is not known to the config.
    """
    cfg = get_cfg()
    add_carafe_config(cfg)
    if not os.path.isfile(config_file):
        raise UserError(f"config file {config_file!r} does not exist; name one with --config-file")
    if config_file.endswith(".py"):
        raise UserError(
            f"{config_file} is a LazyConfig; this program takes the YAML file of its name"
        )
    try:
        cfg.merge_from_file(config_file)
        cfg.merge_from_list(list(overrides))
    except (AssertionError, KeyError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"config {config_file} {' '.join(overrides)}: {error}") from error
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("No GPU found: running on the CPU in float32.")
        cfg.MODEL.DEVICE = "cpu"
        cfg.SOLVER.AMP.ENABLED = False
    cfg.freeze()
    return cfg


def with_carafe_config(cfg: CN) -> CN:
    """The config itself, or a copy with default keys where ``add_carafe_config`` was not called.

    With it a project selects the CARAFE backbone by name after no more than ``import carafe_d2``.
    """
    if "CARAFE" in cfg.MODEL:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    add_carafe_config(cfg)
    return cfg


def upsampler_options(cfg: CN, upsample_key: str, choices: Sequence[str], channels: int) -> dict:
    """Reads which upsampler a part of the model uses, and its options.

    Args:
        cfg: a config with the keys of :func:`add_carafe_config`.
        upsample_key: the key under MODEL that names the upsampler, e.g. "FPN.UPSAMPLE".
        choices: the values that key may have.
        channels: channels of the feature map to be upsampled.

    Returns:
        Keyword arguments for :func:`carafe_d2.build_upsampler`.

    Raises:
        UserError: a value is out of its range; the message names the key.
    """
    section, key = upsample_key.split(".")
    name = cfg.MODEL[section][key]
    if name not in choices:
        raise UserError(f"MODEL.{upsample_key} must be one of {', '.join(choices)}, got {name!r}")
    if name != "carafe":
        return {"name": name}

    for option, value in cfg.MODEL.CARAFE.items():
        if value < 1 or (option.endswith("_KERNEL") and value % 2 == 0):
            wanted = "positive odd" if option.endswith("_KERNEL") else "positive"
            raise UserError(f"MODEL.CARAFE.{option} must be {wanted}, got {value}")
    up_group = cfg.MODEL.CARAFE.UP_GROUP
    if channels % up_group:
        raise UserError(
            f"MODEL.CARAFE.UP_GROUP = {up_group} must divide the {channels} channels that "
            f"MODEL.{upsample_key} works on"
        )
    return {"name": name, **{k.lower(): v for k, v in cfg.MODEL.CARAFE.items()}}
