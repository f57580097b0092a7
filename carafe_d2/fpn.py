"""Feature pyramids with a choice of up- and downsamplers, and their backbone builders."""

import math

from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.backbone import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from . import resnet  # no name of it: resnet itself may be what is being imported
from .config import downsampler_options, upsampler_options, with_carafe_config
from .downsample import CARAFEDownsamplePack
from .upsample import UPSAMPLERS, build_upsampler, xavier_init


def _conv(in_channels: int, out_channels: int, kernel_size: int, norm: str, stride: int = 1):
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


class CarafeFPN(Backbone):
    """Feature pyramid whose top-down path upsamples with CARAFE (paper, section 4.1).

    It differs from Detectron2's FPN in two ways. The upsampler is a choice. And the extra, coarsest
    levels take part in the top-down path: p6 is a stride-2 3x3 convolution on c5 (a further level
    one on the lateral before it), gets an output convolution like every level and is upsampled
    into p5.

    Lateral and output convolutions carry the names of Detectron2's FPN (``fpn_lateral2``,
    ``fpn_output2``); ``fpn_upsample2`` upsamples level 3 to be added to the lateral of level 2.

    Where CARAFE downsamples, too, ``fpn_downsample6`` halves the resolution of c5, and the 3x3
    convolution after it has no stride. It keeps name and shape.
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
        downsampler: dict | None = None,
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
            downsampler: further arguments of the :class:`carafe_d2.CARAFEDownsamplePack` that makes
                an extra level; default is a convolution with a stride.

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

        for i, level in enumerate(self._levels):
            if i < len(shapes):
                lateral = _conv(shapes[i].channels, out_channels, 1, norm)
            else:
                in_channels = shapes[-1].channels if i == len(shapes) else out_channels
                if downsampler is not None:
                    pack = CARAFEDownsamplePack(in_channels, 2, **downsampler)
                    self.add_module(f"fpn_downsample{level}", pack)
                stride = 2 if downsampler is None else 1
                lateral = _conv(in_channels, out_channels, 3, norm, stride)
            self.add_module(f"fpn_lateral{level}", lateral)
            self.add_module(f"fpn_output{level}", _conv(out_channels, out_channels, 3, norm))
        for level in self._levels[:-1]:
            self.add_module(
                f"fpn_upsample{level}",
                build_upsampler(channels=out_channels, **(upsampler or {"name": "carafe"})),
            )

    @classmethod
    def from_config(cls, cfg, bottom_up: Backbone, *, num_extra_levels: int = 1) -> dict:
        cfg = with_carafe_config(cfg)
        out_channels = cfg.MODEL.FPN.OUT_CHANNELS
        in_features = cfg.MODEL.FPN.IN_FEATURES
        # Of the first extra level, and of what follows it.
        for channels in (bottom_up.output_shape()[in_features[-1]].channels, out_channels):
            downsampler = downsampler_options(cfg, "FPN.DOWNSAMPLE", channels)
        return {
            "bottom_up": bottom_up,
            "in_features": in_features,
            "out_channels": out_channels,
            "num_extra_levels": num_extra_levels,
            "norm": cfg.MODEL.FPN.NORM,
            "fuse_type": cfg.MODEL.FPN.FUSE_TYPE,
            "upsampler": upsampler_options(cfg, "FPN.UPSAMPLE", list(UPSAMPLERS), out_channels),
            "downsampler": downsampler,
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
            if hasattr(self, f"fpn_downsample{level}"):
                source = self.get_submodule(f"fpn_downsample{level}")(source)
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


class CarafePAFPN(CarafeFPN):
    """:class:`CarafeFPN` with a bottom-up path after it (PANet, Liu et al., arXiv 1803.01534).

    The path starts from p2. From there each level is downsampled and added to the next, and every
    level but the first gets a 3x3 convolution, in the order of MMDetection's PAFPN: what goes on
    upwards is the sum, not what the convolution makes of it. ``pafpn_downsample3`` makes level 3 of
    level 2 and ``pafpn_output3`` is the convolution of level 3.

    The downsampling is a convolution with a stride, or CARAFE, which keeps the channels and so
    stands alone, just as it does in the top-down path.
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
        downsampler: dict | None = None,
    ):
        """
        Args:
            downsampler: further arguments of the :class:`carafe_d2.CARAFEDownsamplePack` that makes
                an extra level, and of those in the bottom-up path; default is a convolution with
                a stride for each.

        The others are those of :class:`CarafeFPN`.
        """
        super().__init__(
            bottom_up,
            in_features,
            out_channels,
            num_extra_levels=num_extra_levels,
            norm=norm,
            fuse_type=fuse_type,
            upsampler=upsampler,
            downsampler=downsampler,
        )
        for level in self._levels[1:]:
            downsample: nn.Module
            if downsampler is None:
                downsample = _conv(out_channels, out_channels, 3, norm, stride=2)
            else:
                downsample = CARAFEDownsamplePack(out_channels, 2, **downsampler)
            self.add_module(f"pafpn_downsample{level}", downsample)
            self.add_module(f"pafpn_output{level}", _conv(out_channels, out_channels, 3, norm))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """See :meth:`CarafeFPN.forward`."""
        outputs = super().forward(x)
        finest, *coarser = self._levels
        path = outputs[f"p{finest}"]
        for level in coarser:
            path = outputs[f"p{level}"] + self.get_submodule(f"pafpn_downsample{level}")(path)
            outputs[f"p{level}"] = self.get_submodule(f"pafpn_output{level}")(path)
        return outputs


@BACKBONE_REGISTRY.register()
def build_resnet_carafe_fpn_backbone(cfg, input_shape: ShapeSpec) -> CarafeFPN:
    """ResNet with a CARAFE pyramid of one extra level: p2..p6 on res2..res5.

    Args:
        cfg: a Detectron2 config; keys of ``add_carafe_config`` that it lacks take their defaults.
        input_shape: channels of the images.
    """
    return CarafeFPN(cfg, resnet.build_resnet_carafe_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_retinanet_resnet_carafe_fpn_backbone(cfg, input_shape: ShapeSpec) -> CarafeFPN:
    """ResNet with a CARAFE pyramid of two extra levels: p3..p7 on res3..res5, for RetinaNet.

    Args:
        cfg: a Detectron2 config; keys of ``add_carafe_config`` that it lacks take their defaults.
        input_shape: channels of the images.
    """
    return CarafeFPN(cfg, resnet.build_resnet_carafe_backbone(cfg, input_shape), num_extra_levels=2)


@BACKBONE_REGISTRY.register()
def build_resnet_carafe_pafpn_backbone(cfg, input_shape: ShapeSpec) -> CarafePAFPN:
    """ResNet with a CARAFE pyramid of one extra level and a bottom-up path: p2..p6 on res2..res5.

    Args:
        cfg: a Detectron2 config; keys of ``add_carafe_config`` that it lacks take their defaults.
        input_shape: channels of the images.
    """
    return CarafePAFPN(cfg, resnet.build_resnet_carafe_backbone(cfg, input_shape))
