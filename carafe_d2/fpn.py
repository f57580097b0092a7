"""Feature pyramid with a choice of upsamplers, and its registered backbone builders."""

import math

from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.backbone import BACKBONE_REGISTRY, Backbone, build_resnet_backbone
from torch import Tensor

from .config import upsampler_options, with_carafe_config
from .upsample import UPSAMPLERS, build_upsampler, xavier_init


class CarafeFPN(Backbone):
    """Feature pyramid whose top-down path upsamples with CARAFE (paper, section 4.1).

    It differs from Detectron2's FPN in two ways. The upsampler is a choice. And the extra, coarsest
    levels take part in the top-down path: p6 is a stride-2 3x3 convolution on c5 (a further level
    one on the lateral before it), gets an output convolution like every level and is upsampled
    into p5.

    Lateral and output convolutions carry the names of Detectron2's FPN (``fpn_lateral2``,
    ``fpn_output2``); ``fpn_upsample2`` upsamples level 3 to be added to the lateral of level 2.
    """

    @configurable
    def __init__(
        self,
        bottom_up: Backbone,
        in_features: list[str],
        out_channels: int,
        *,
        num_extra_levels: int = 1,
        norm: str = "",
        fuse_type: str = "sum",
        upsampler: dict | None = None,
    ):
        """
        Args:
            bottom_up: the network that puts out ``in_features``.
            in_features: its feature maps from fine to coarse, e.g. ["res2", "res3", "res4",
                "res5"], each of half the resolution of the one before.
            out_channels: channels of every pyramid level.
            num_extra_levels: levels beyond the last of ``in_features``.
            norm: normalization of lateral and output convolutions, see
                :func:`detectron2.layers.get_norm`.
            fuse_type: "sum" or "avg", how lateral and upsampled features are joined.
            upsampler: arguments of :func:`carafe_d2.build_upsampler`; default is CARAFE's.

        Raises:
            ValueError: in_features are not each half the resolution of the one before, or
                fuse_type is unknown.
        """
        super().__init__()
        shapes = [bottom_up.output_shape()[f] for f in in_features]
        strides = [shape.stride for shape in shapes]
        if strides != [strides[0] * 2**i for i in range(len(strides))]:
            raise ValueError(f"in_features must each halve the resolution, got strides {strides}")
        if fuse_type not in ("sum", "avg"):
            raise ValueError(f"fuse_type must be sum or avg, got {fuse_type!r}")

        self.bottom_up = bottom_up
        self._in_features = list(in_features)
        self._fuse_type = fuse_type
        finest = int(math.log2(strides[0]))
        self._levels = list(range(finest, finest + len(in_features) + num_extra_levels))
        self._out_features = [f"p{level}" for level in self._levels]
        self._out_feature_strides = {f"p{level}": 2**level for level in self._levels}
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)

        def conv(in_channels: int, kernel_size: int, stride: int = 1) -> Conv2d:
            layer = Conv2d(
                in_channels,
                out_channels,
                kernel_size,
                stride=stride,
                padding=(kernel_size - 1) // 2,
                bias=norm == "",
                norm=get_norm(norm, out_channels),
            )
            xavier_init(layer, distribution="uniform")
            return layer

        laterals = [conv(shape.channels, kernel_size=1) for shape in shapes]
        for i in range(num_extra_levels):
            in_channels = shapes[-1].channels if i == 0 else out_channels
            laterals.append(conv(in_channels, kernel_size=3, stride=2))
        for level, lateral in zip(self._levels, laterals, strict=True):
            self.add_module(f"fpn_lateral{level}", lateral)
            self.add_module(f"fpn_output{level}", conv(out_channels, kernel_size=3))
        for level in self._levels[:-1]:
            self.add_module(
                f"fpn_upsample{level}",
                build_upsampler(channels=out_channels, **(upsampler or {"name": "carafe"})),
            )

    @classmethod
    def from_config(cls, cfg, bottom_up: Backbone, *, num_extra_levels: int = 1) -> dict:
        cfg = with_carafe_config(cfg)
        out_channels = cfg.MODEL.FPN.OUT_CHANNELS
        return {
            "bottom_up": bottom_up,
            "in_features": cfg.MODEL.FPN.IN_FEATURES,
            "out_channels": out_channels,
            "num_extra_levels": num_extra_levels,
            "norm": cfg.MODEL.FPN.NORM,
            "fuse_type": cfg.MODEL.FPN.FUSE_TYPE,
            "upsampler": upsampler_options(cfg, "FPN.UPSAMPLE", list(UPSAMPLERS), out_channels),
        }

    @property
    def size_divisibility(self) -> int:
        """Image sides padded to a multiple of this make every level twice the size of the next."""
        return 2 ** self._levels[-1]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """
        Args:
            x: images (N, 3, H, W). Sides that are no multiple of ``size_divisibility`` work too:
                upsampled maps are cropped to the lateral they join.

        Returns:
            Pyramid levels by name from fine to coarse; ``p<i>`` is (N, out_channels, H / 2**i,
            W / 2**i).
        """
        bottom_up = self.bottom_up(x)
        inputs = [bottom_up[f] for f in self._in_features]
        laterals: list[Tensor] = []
        for i, level in enumerate(self._levels):
            # The first extra level starts from the last backbone map, further ones from the
            # lateral before them.
            source = inputs[min(i, len(inputs) - 1)] if i <= len(inputs) else laterals[-1]
            laterals.append(self.get_submodule(f"fpn_lateral{level}")(source))

        outputs = {}
        top_down = laterals[-1]
        for level, lateral in zip(self._levels[::-1], laterals[::-1], strict=True):
            if level != self._levels[-1]:
                upsampled = self.get_submodule(f"fpn_upsample{level}")(top_down)
                top_down = lateral + upsampled[..., : lateral.shape[-2], : lateral.shape[-1]]
                if self._fuse_type == "avg":
                    top_down = top_down / 2
            outputs[f"p{level}"] = self.get_submodule(f"fpn_output{level}")(top_down)
        return {name: outputs[name] for name in self._out_features}


@BACKBONE_REGISTRY.register()
def build_resnet_carafe_fpn_backbone(cfg, input_shape: ShapeSpec) -> CarafeFPN:
    """ResNet with a CARAFE pyramid of one extra level: p2..p6 on res2..res5.

    Args:
        cfg: a Detectron2 config; keys of ``add_carafe_config`` that it lacks take their defaults.
        input_shape: channels of the images.
    """
    return CarafeFPN(cfg, build_resnet_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_retinanet_resnet_carafe_fpn_backbone(cfg, input_shape: ShapeSpec) -> CarafeFPN:
    """ResNet with a CARAFE pyramid of two extra levels: p3..p7 on res3..res5, for RetinaNet.

    Args:
        cfg: a Detectron2 config; keys of ``add_carafe_config`` that it lacks take their defaults.
        input_shape: channels of the images.
    """
    return CarafeFPN(cfg, build_resnet_backbone(cfg, input_shape), num_extra_levels=2)
