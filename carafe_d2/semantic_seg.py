"""Semantic segmentation with a choice of upsamplers: the head of Panoptic FPN, and a backbone."""

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, SEM_SEG_HEADS_REGISTRY
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from torch import nn

from . import fpn, resnet  # no names: either may be what is being imported
from .config import upsampler_options, with_carafe_config
from .upsample import UPSAMPLERS, build_upsampler


@SEM_SEG_HEADS_REGISTRY.register()
class CarafeSemSegFPNHead(SemSegFPNHead):
    """Detectron2's head of Panoptic FPN with another upsampler in place of its bilinear x2 steps.

    The head brings every pyramid level to one stride by 3x3 convolutions, each followed by an
    upsampling by 2, and adds them up. With CARAFE in these steps it does what the paper does to
    the fusion of UperNet's levels ("FUSE" in the section on semantic segmentation of
    arXiv 1905.02188): levels grow by successive factors of 2, each with kernels of its own.

    The last step, from ``common_stride`` to the image, stays bilinear, as in the paper's UperNet:
    it enlarges class scores, on which there is no convolution any more that content could guide,
    and CARAFE by 4 would predict 400 kernel weights for every location.

    With "bilinear" this is the stock head, parameter names included.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        conv_dims: int,
        upsampler: dict | None = None,
        **kwargs,
    ):
        """
        Args:
            input_shape: channels and stride of the pyramid levels.
            conv_dims: channels of the convolutions, and of the maps that are upsampled.
            upsampler: arguments of :func:`carafe_d2.build_upsampler`; default is CARAFE's.
            **kwargs: see :class:`detectron2.modeling.meta_arch.semantic_seg.SemSegFPNHead`.
        """
        super().__init__(input_shape, conv_dims=conv_dims, **kwargs)
        for scale_head in self.scale_heads:
            for i, layer in enumerate(scale_head):
                if isinstance(layer, nn.Upsample):
                    scale_head[i] = build_upsampler(
                        channels=conv_dims, **(upsampler or {"name": "carafe"})
                    )

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        cfg = with_carafe_config(cfg)
        ret = super().from_config(cfg, input_shape)
        ret["upsampler"] = upsampler_options(
            cfg, "SEM_SEG_HEAD.UPSAMPLE", list(UPSAMPLERS), ret["conv_dims"]
        )
        return ret


@BACKBONE_REGISTRY.register()
def build_resnet_carafe_semantic_fpn_backbone(cfg, input_shape: ShapeSpec) -> "fpn.CarafeFPN":
    """ResNet with a CARAFE pyramid without extra levels: p2..p5 on res2..res5.

    For models that have no use for p6, such as a semantic segmentation head alone. An output
    convolution without a gradient would stop distributed training.

    Args:
        cfg: a Detectron2 config; keys of ``add_carafe_config`` that it lacks take their defaults.
        input_shape: channels of the images.
    """
    bottom_up = resnet.build_resnet_carafe_backbone(cfg, input_shape)
    return fpn.CarafeFPN(cfg, bottom_up, num_extra_levels=0)
