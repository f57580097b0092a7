"""CARAFE: Content-Aware ReAssembly of FEatures, for PyTorch and Detectron2.

The operator and the upsamplers need only PyTorch. Where Detectron2 is installed, importing this
package registers the backbones, the heads and the ``shapes`` dataset with it.
"""

import sys
from importlib.util import find_spec

from .version import __version__

# `python -m carafe_d2.collect_env` has to work where nothing else of the package can be imported.
_REPORTING = "carafe_d2.collect_env" in sys.orig_argv

if not _REPORTING:
    from .ops import DECOMPOSITIONS, carafe, carafe_upsample, flop_count_ops
    from .reference import carafe_naive
    from .replace import replace_upsampling
    from .upsample import CARAFE, CARAFENaive, CARAFEPack, PixelShufflePack, build_upsampler

__all__ = [
    "CARAFE",
    "DECOMPOSITIONS",
    "CARAFENaive",
    "CARAFEPack",
    "PixelShufflePack",
    "__version__",
    "build_upsampler",
    "carafe",
    "carafe_naive",
    "carafe_upsample",
    "flop_count_ops",
    "replace_upsampling",
]

_DETECTRON2_NAMES = [
    "CarafeCheckpointer",
    "CarafeFPN",
    "CarafeSemSegFPNHead",
    "LegacyAnchorGenerator",
    "LegacyRCNN",
    "MaskRCNNCarafeUpsampleHead",
    "add_carafe_config",
    "build_resnet_carafe_fpn_backbone",
    "build_resnet_carafe_semantic_fpn_backbone",
    "build_retinanet_resnet_carafe_fpn_backbone",
]

if find_spec("detectron2") and not _REPORTING:
    from .checkpoint import CarafeCheckpointer
    from .config import add_carafe_config
    from .data import register_shapes
    from .fpn import (
        CarafeFPN,
        build_resnet_carafe_fpn_backbone,
        build_retinanet_resnet_carafe_fpn_backbone,
    )
    from .legacy import LegacyAnchorGenerator, LegacyRCNN
    from .mask_head import MaskRCNNCarafeUpsampleHead
    from .semantic_seg import CarafeSemSegFPNHead, build_resnet_carafe_semantic_fpn_backbone

    __all__ += _DETECTRON2_NAMES
    register_shapes()
else:

    def __getattr__(name: str):
        if name in _DETECTRON2_NAMES:
            raise ImportError(
                f"carafe_d2.{name} needs Detectron2, which is not installed; "
                "python tools/install_detectron2.py installs it"
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
