"""CARAFE: Content-Aware ReAssembly of FEatures, for PyTorch and Detectron2.

Every name is loaded when it is first asked for (PEP 562), so the operator and the upsamplers cost
no more than PyTorch. Importing this package makes the backbones, the heads and the ``shapes``
dataset known to Detectron2 as soon as Detectron2 itself has its registries.
"""

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING

from .import_hooks import when_imported
from .version import __version__

if TYPE_CHECKING:
    from .checkpoint import CarafeCheckpointer
    from .config import add_carafe_config
    from .downsample import CARAFEDownsample, CARAFEDownsamplePack
    from .fpn import (
        CarafeFPN,
        CarafePAFPN,
        build_resnet_carafe_fpn_backbone,
        build_resnet_carafe_pafpn_backbone,
        build_retinanet_resnet_carafe_fpn_backbone,
    )
    from .inpaint.global_local import GlobalLocalInpainter
    from .inpaint.partial_conv import PartialConvInpainter
    from .legacy import LegacyAnchorGenerator, LegacyRCNN
    from .mask_head import MaskRCNNCarafeUpsampleHead
    from .ops import (
        DECOMPOSITIONS,
        carafe,
        carafe_downsample,
        carafe_downsample_softmax,
        carafe_upsample,
        flop_count_ops,
    )
    from .reference import carafe_downsample_naive, carafe_naive
    from .replace import replace_downsampling, replace_upsampling
    from .resnet import build_resnet_carafe_backbone, downsample_with_carafe
    from .semantic_seg import CarafeSemSegFPNHead, build_resnet_carafe_semantic_fpn_backbone
    from .upernet import UPerNetHead
    from .upsample import (
        CARAFE,
        CARAFENaive,
        CARAFEPack,
        LazyCARAFEPack,
        PixelShufflePack,
        build_upsampler,
    )
    from .yolo import BatchNormCARAFE, ProjectedCARAFE

_MODULE_OF = {
    "BatchNormCARAFE": "yolo",
    "CARAFE": "upsample",
    "CARAFEDownsample": "downsample",
    "CARAFEDownsamplePack": "downsample",
    "CARAFENaive": "upsample",
    "CARAFEPack": "upsample",
    "DECOMPOSITIONS": "ops",
    "LazyCARAFEPack": "upsample",
    "PixelShufflePack": "upsample",
    "ProjectedCARAFE": "yolo",
    "build_upsampler": "upsample",
    "carafe": "ops",
    "carafe_downsample": "ops",
    "carafe_downsample_naive": "reference",
    "carafe_downsample_softmax": "ops",
    "carafe_naive": "reference",
    "carafe_upsample": "ops",
    "flop_count_ops": "ops",
    "replace_downsampling": "replace",
    "replace_upsampling": "replace",
}
_DETECTRON2_MODULE_OF = {
    "CarafeCheckpointer": "checkpoint",
    "CarafeFPN": "fpn",
    "CarafePAFPN": "fpn",
    "CarafeSemSegFPNHead": "semantic_seg",
    "GlobalLocalInpainter": "inpaint.global_local",
    "LegacyAnchorGenerator": "legacy",
    "LegacyRCNN": "legacy",
    "MaskRCNNCarafeUpsampleHead": "mask_head",
    "PartialConvInpainter": "inpaint.partial_conv",
    "UPerNetHead": "upernet",
    "add_carafe_config": "config",
    "build_resnet_carafe_backbone": "resnet",
    "build_resnet_carafe_fpn_backbone": "fpn",
    "build_resnet_carafe_pafpn_backbone": "fpn",
    "build_resnet_carafe_semantic_fpn_backbone": "semantic_seg",
    "build_retinanet_resnet_carafe_fpn_backbone": "fpn",
    "downsample_with_carafe": "resnet",
}

__all__ = ["__version__", *_MODULE_OF]
if find_spec("detectron2"):
    __all__ += _DETECTRON2_MODULE_OF  # type: ignore[arg-type]


def _register_dataset() -> None:
    from .data import register_shapes

    register_shapes()


def _register_models() -> None:
    from . import backbones, fpn, legacy, mask_head, resnet, semantic_seg, upernet
    from .inpaint import global_local, partial_conv


when_imported("detectron2.data", _register_dataset)
when_imported("detectron2.modeling", _register_models)


def __getattr__(name: str):
    if name in _DETECTRON2_MODULE_OF and not find_spec("detectron2"):
        raise ImportError(
            f"carafe_d2.{name} needs Detectron2, which is not installed; "
            "python dev/install_detectron2.py in a checkout of carafe-d2 installs it"
        )
    module = _MODULE_OF.get(name) or _DETECTRON2_MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
