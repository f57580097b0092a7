"""Config keys of CARAFE models, and the checks that name the key when a value is wrong."""

import functools
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg

from .data.register import register_datasets
from .errors import UserError
from .upsample import NORMALIZERS

logger = logging.getLogger(__name__)

# In an installed wheel, and in a checkout.
CONFIG_FOLDERS = (Path(__file__).with_name("configs"), Path(__file__).parents[1] / "configs")


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
    # Channels that the input is compressed to before the kernels are predicted; 0: not at all.
    cfg.MODEL.CARAFE.COMPRESSED_CHANNELS = 64
    # What makes weights of the predictions: softmax, sigmoid, normalized_sigmoid, none.
    cfg.MODEL.CARAFE.NORMALIZER = "softmax"

    # The CARAFE downsamplers of pyramid and ResNet (CARAFE++); names as in the arguments of
    # CARAFEDownsamplePack.
    cfg.MODEL.CARAFE_DOWNSAMPLE = CN()
    # Side of the reassembly kernel, odd, and number of channel groups with kernels of their own.
    cfg.MODEL.CARAFE_DOWNSAMPLE.DOWN_KERNEL = 5
    cfg.MODEL.CARAFE_DOWNSAMPLE.DOWN_GROUP = 1
    # As in MODEL.CARAFE.
    cfg.MODEL.CARAFE_DOWNSAMPLE.ENCODER_KERNEL = 3
    cfg.MODEL.CARAFE_DOWNSAMPLE.ENCODER_DILATION = 1
    cfg.MODEL.CARAFE_DOWNSAMPLE.COMPRESSED_CHANNELS = 16
    cfg.MODEL.CARAFE_DOWNSAMPLE.NORMALIZER = "softmax"
    # How the stages of the ResNet of build_resnet_carafe_*_backbone halve the resolution: by the
    # strides of their first block's convolutions (""), or before that block by CARAFE (carafe).
    cfg.MODEL.RESNETS.DOWNSAMPLE = ""
    # How build_*_carafe_*_backbone makes extra levels, and the bottom-up path of a PAFPN its
    # coarser levels: by convolutions with a stride (""), or by CARAFE (carafe).
    cfg.MODEL.FPN.DOWNSAMPLE = ""

    # How build_*_carafe_fpn_backbone upsamples: carafe, nearest, bilinear, deconv, pixel_shuffle.
    cfg.MODEL.FPN.UPSAMPLE = "carafe"
    # How MaskRCNNCarafeUpsampleHead upsamples: carafe, nearest, bilinear, deconv (the stock head),
    # pixel_shuffle.
    cfg.MODEL.ROI_MASK_HEAD.UPSAMPLE = "carafe"
    # How CarafeSemSegFPNHead upsamples: carafe, nearest, bilinear (the stock head), deconv,
    # pixel_shuffle.
    cfg.MODEL.SEM_SEG_HEAD.UPSAMPLE = "carafe"
    # How the parts of UPerNetHead upsample, pyramid pooling, feature pyramid and fusion: carafe,
    # nearest, bilinear (the stock network), deconv, pixel_shuffle.
    cfg.MODEL.UPERNET = CN()
    cfg.MODEL.UPERNET.PPM_UPSAMPLE = "carafe"
    cfg.MODEL.UPERNET.FPN_UPSAMPLE = "carafe"
    cfg.MODEL.UPERNET.FUSE_UPSAMPLE = "carafe"
    # Weight of a loss on what the second coarsest of its maps alone predicts; 0: no such loss.
    cfg.MODEL.UPERNET.AUX_LOSS_WEIGHT = 0.0

    # How GlobalLocalInpainter and PartialConvInpainter upsample: carafe, nearest (stock partial
    # convolutions), bilinear, deconv (stock Global&Local), pixel_shuffle.
    cfg.MODEL.INPAINT = CN()
    cfg.MODEL.INPAINT.UPSAMPLE = "carafe"
    # Channels of the first convolutions; the others have multiples of them. Normalization.
    cfg.MODEL.INPAINT.CHANNELS = 64
    cfg.MODEL.INPAINT.NORM = "BN"
    # Side of the squares that are cut out of the resized images, in pixels.
    cfg.MODEL.INPAINT.CROP_SIZE = 256
    # Holes: a rectangle, whose least and greatest side are HOLE_SIZE, or irregular ones.
    cfg.MODEL.INPAINT.MASK = "rectangle"
    cfg.MODEL.INPAINT.HOLE_SIZE = (96, 128)
    # Of GlobalLocalInpainter: side of what the local discriminator sees; weight of the
    # discriminators' verdict; iterations of the completion network alone, and then of the
    # discriminators alone.
    cfg.MODEL.INPAINT.LOCAL_SIZE = 128
    cfg.MODEL.INPAINT.ADVERSARIAL_WEIGHT = 0.0004
    cfg.MODEL.INPAINT.COMPLETION_ITERS = 90000
    cfg.MODEL.INPAINT.DISCRIMINATOR_ITERS = 10000
    # Of PartialConvInpainter: how often its images are halved; whether the encoder's norms keep
    # their statistics; torchvision's VGG-16 for the losses of content and style, "" for neither.
    cfg.MODEL.INPAINT.NUM_LEVELS = 8
    cfg.MODEL.INPAINT.FREEZE_ENCODER_NORM = False
    cfg.MODEL.INPAINT.VGG_WEIGHTS = ""

    # The network of build_{torchvision,timm}_carafe_fpn_backbone by its name there, and whether to
    # load its ImageNet weights.
    cfg.MODEL.BACKBONE.MODEL = ""
    cfg.MODEL.BACKBONE.PRETRAINED = False
    # Datasets of your own in COCO's format: "NAME=ANNOTATIONS.json:IMAGES/"; for inpainting
    # "NAME=IMAGES/".
    cfg.DATASETS.REGISTER = ()

    # Of train_net.py: keep weights and feature maps in the channels_last memory format.
    cfg.MODEL.CHANNELS_LAST = False
    # Of train_net.py: SGD, with the keys of Detectron2, or AdamW.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Of train_net.py: with SOLVER.LR_SCHEDULER_NAME "WarmupPolyLR" the learning rate falls to zero
    # as this power of the share of iterations that are left.
    cfg.SOLVER.POLY_LR_POWER = 0.9


def load_config(config_file: str, overrides: Sequence[str] = ()) -> CN:
    """Builds the config of a command-line program.

    Args:
        config_file: a YAML file, or the name of one that comes with this package.
        overrides: keys and values in turn, e.g. ["SOLVER.BASE_LR", "0.01"].

    Returns:
        The frozen config. Without a GPU its device is the CPU, in float32.

    Raises:
        UserError: the file is missing or no YAML, or a key or value is not known to the config.
    """
    cfg = get_cfg()
    add_carafe_config(cfg)
    config_file = find_config_file(config_file)
    if config_file.endswith(".py"):
        raise UserError(
            f"{config_file} is a LazyConfig; this program takes the YAML file of its name"
        )
    try:
        own_keys(config_file)
        cfg.merge_from_file(config_file)
        cfg.merge_from_list(list(overrides))
    except UserError:
        raise
    except Exception as error:  # a file of any content makes the libraries raise just about that
        message = " ".join(str(error).split())
        # Of two sections all values would be listed.
        message = re.sub(r" with values \(.{200,}\)(?= for config key)", "", message)
        if isinstance(error, RecursionError):
            message = "its _BASE_ leads back to itself"
        elif isinstance(error, AttributeError | TypeError):
            message = f"it takes sections with keys, and in _BASE_ the path of a file ({message})"
        raise UserError(f"config {config_file} and its overrides: {message}") from error
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("No GPU found: running on the CPU in float32.")
        cfg.MODEL.DEVICE = "cpu"
        cfg.SOLVER.AMP.ENABLED = False
    register_datasets(cfg.DATASETS.REGISTER)
    cfg.freeze()
    return cfg


def own_keys(config_file: str) -> dict[str, yaml.Node]:
    """The keys that a YAML file gives itself, with dots, and what it gives for them.

    Raises:
        UserError: it gives one twice, of which the first would be lost.
        yaml.YAMLError: it is no YAML.
    """
    keys: dict[str, yaml.Node] = {}

    def collect(node: yaml.Node, prefix: str) -> None:
        seen = set()
        for name, child in node.value:
            if name.value in seen:
                line = name.start_mark.line + 1
                raise UserError(f"config {config_file}, line {line}: {name.value} is given twice")
            seen.add(name.value)
            if isinstance(child, yaml.MappingNode):
                collect(child, f"{prefix}{name.value}.")
            else:
                keys[f"{prefix}{name.value}"] = child

    root = yaml.compose(Path(config_file).read_text())
    if isinstance(root, yaml.MappingNode):
        collect(root, "")
    return keys


def find_config_file(name: str) -> str:
    """The path of a config file: of the one that is there, or of this package's of that name.

    Args:
        name: a path, or the name of a config of this package, with or without "configs/" in front
            and ".yaml" at the end.

    Raises:
        UserError: there is neither.
    """
    if os.path.isfile(name):
        return name
    folder = next(folder for folder in CONFIG_FOLDERS if folder.is_dir())
    path = folder / f"{Path(name).name.removesuffix('.yaml')}.yaml"
    if not name or not path.is_file():
        raise UserError(f"config file {name!r} does not exist; name one with --config-file")
    return str(path)


# Keys of Detectron2's defaults that its own code does not read either, or that belong to a trainer
# other than ours. A value other than the default would do nothing.
WITHOUT_EFFECT: tuple[str, ...] = ("GLOBAL.HACK",)
_TASKS = ("bbox", "segm", "keypoints", "sem_seg", "panoptic_seg", "box_proposals", "inpainting")


def check_config(cfg: CN, *, eval_only: bool = False) -> None:
    """Checks what no part of the model sees, and what would fail only when a training is over.

    Args:
        cfg: a config with the keys of :func:`add_carafe_config`.
        eval_only: whether nothing is trained.

    Raises:
        UserError: names the key.
    """
    defaults = default_config()
    for key in WITHOUT_EFFECT:
        if value_of(cfg, key) != value_of(defaults, key):
            raise UserError(f"{key} = {value_of(cfg, key)!r} has no effect; leave it out")
    if cfg.SOLVER.AMP.ENABLED and not cfg.MODEL.DEVICE.startswith("cuda") and not eval_only:
        raise UserError(f"SOLVER.AMP.ENABLED needs a GPU, but MODEL.DEVICE is {cfg.MODEL.DEVICE!r}")
    if cfg.MODEL.CHANNELS_LAST and cfg.MODEL.KEYPOINT_ON and not eval_only:
        raise UserError("MODEL.CHANNELS_LAST: Detectron2's loss of keypoints does not work with it")
    channels = 1 if cfg.INPUT.FORMAT == "L" else 3
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        if len(cfg.MODEL[key]) != channels:
            raise UserError(
                f"MODEL.{key} must have {channels} numbers for INPUT.FORMAT {cfg.INPUT.FORMAT}, "
                f"got {list(cfg.MODEL[key])}"
            )
    if cfg.TEST.AUG.ENABLED and (
        cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN"
        or cfg.MODEL.KEYPOINT_ON
        or cfg.MODEL.LOAD_PROPOSALS
    ):
        raise UserError(
            "TEST.AUG.ENABLED: Detectron2's test-time augmentation is for GeneralizedRCNN without "
            "keypoints and without loaded proposals"
        )
    tasks = {*_TASKS, *(f"{task}_TTA" for task in _TASKS)}
    for expected in cfg.TEST.EXPECTED_RESULTS:
        if len(expected) != 4 or expected[0] not in tasks or isinstance(expected[2], str):
            raise UserError(
                f"TEST.EXPECTED_RESULTS must be like [['bbox', 'AP', 38.5, 0.2]], got {expected!r}"
            )
    check_folder("OUTPUT_DIR", cfg.OUTPUT_DIR)


def is_inpainting(cfg: CN) -> bool:
    """Whether the config's model is one of ``carafe_d2.inpaint``."""
    return cfg.MODEL.META_ARCHITECTURE in ("GlobalLocalInpainter", "PartialConvInpainter")


def check_folder(key: str, folder: str) -> None:
    """Makes a folder for output, and checks that files can be written to it.

    Raises:
        UserError: names the key, whose value is no such folder.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{key} {folder}: {error.strerror}") from error


def default_config() -> CN:
    """Detectron2's defaults with the keys of :func:`add_carafe_config`."""
    cfg = get_cfg()
    add_carafe_config(cfg)
    return cfg


def value_of(cfg: CN, key: str):
    """The value of a key with dots in it."""
    return functools.reduce(lambda node, name: node[name], key.split("."), cfg)


def keys_of(node: Mapping, prefix: str = "") -> Iterator[str]:
    """The keys of nested dicts, joined by dots."""
    for key, child in node.items():
        if isinstance(child, dict):
            yield from keys_of(child, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


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

    return {"name": name, **_carafe_options(cfg, "CARAFE", "UP_GROUP", upsample_key, channels)}


def downsampler_options(cfg: CN, downsample_key: str, channels: int) -> dict | None:
    """Reads whether a part of the model downsamples with CARAFE, and its options.

    Args:
        cfg: a config with the keys of :func:`add_carafe_config`.
        downsample_key: the key under MODEL that says so, e.g. "FPN.DOWNSAMPLE".
        channels: channels of the feature map to be downsampled.

    Returns:
        Keyword arguments for :class:`carafe_d2.CARAFEDownsamplePack`, or None for convolutions with
        a stride.

    Raises:
        UserError: a value is out of its range; the message names the key.
    """
    section, key = downsample_key.split(".")
    name = cfg.MODEL[section][key]
    if name not in ("", "carafe"):
        raise UserError(
            f"MODEL.{downsample_key} must be carafe, or empty for convolutions with a stride, "
            f"got {name!r}"
        )
    if not name:
        return None
    return _carafe_options(cfg, "CARAFE_DOWNSAMPLE", "DOWN_GROUP", downsample_key, channels)


def _carafe_options(cfg: CN, section: str, group: str, user: str, channels: int) -> dict:
    """The options of CARAFE in a section of MODEL, in small letters.

    Args:
        cfg: a config with the keys of :func:`add_carafe_config`.
        section: "CARAFE" or "CARAFE_DOWNSAMPLE".
        group: its key that has to divide the channels.
        user: the key under MODEL that asks for CARAFE.
        channels: channels of the feature map that it works on.

    Raises:
        UserError: a value is out of its range; the message names the key.
    """
    # One by one, or a config that records what is read of it would not know.
    options = {option: cfg.MODEL[section][option] for option in cfg.MODEL[section]}
    for option, value in options.items():
        if option == "NORMALIZER":
            is_right, wanted = value in NORMALIZERS, f"one of {', '.join(NORMALIZERS)}"
        elif option.endswith("_KERNEL"):
            is_right, wanted = value > 0 and value % 2 == 1, "positive odd"
        elif option == "COMPRESSED_CHANNELS":
            is_right, wanted = value >= 0, "positive, or 0 for no compressor"
        else:
            is_right, wanted = value > 0, "positive"
        if not is_right:
            raise UserError(f"MODEL.{section}.{option} must be {wanted}, got {value!r}")
    if channels % options[group]:
        raise UserError(
            f"MODEL.{section}.{group} = {options[group]} must divide the {channels} channels that "
            f"MODEL.{user} works on"
        )
    return {option.lower(): value for option, value in options.items()}
