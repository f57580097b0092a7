"""ResNets whose stages halve the resolution with CARAFE (CARAFE++, arXiv 2012.04733)."""

from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, ResNet, build_resnet_backbone
from torch import Tensor, nn

from .config import downsampler_options, with_carafe_config
from .downsample import CARAFEDownsamplePack


def downsample_with_carafe(resnet: ResNet, **options) -> ResNet:
    """Puts CARAFE in the place of the strides of a ResNet's stages; changes it in place.

    The first block of a stage with a stride gets a child ``downsample``, which the block's input
    goes through once, for residual branch and shortcut alike, and the strides of its convolutions
    become 1. Everything else keeps its name and shape, so weights of the strided network load.
    Where CARAFE's kernels take the pixel in the middle alone, a network with the strides in its
    1x1 convolutions computes what it did before.

    Args:
        resnet: of blocks that downsample by convolutions with the block's stride, as all blocks of
            Detectron2 do.
        **options: further arguments of :class:`carafe_d2.CARAFEDownsamplePack`.

    Returns:
        The same network.

    Raises:
        ValueError: a block has no such convolution, or an option is out of its range.
    """
    for stage in resnet.stages:
        block = stage[0]
        if block.stride == 1:
            continue
        stride = (block.stride, block.stride)
        layers = [m for m in block.modules() if getattr(m, "stride", None) == stride]
        if not layers:
            raise ValueError(f"{type(block).__name__} has no convolution with its stride")
        block.downsample = CARAFEDownsamplePack(block.in_channels, block.stride, **options)
        for layer in layers:
            layer.stride = (1, 1)
        block.register_forward_pre_hook(_downsample)
    return resnet


def _downsample(block: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return block.downsample(*inputs)  # type: ignore[operator]


@BACKBONE_REGISTRY.register()
def build_resnet_carafe_backbone(cfg, input_shape: ShapeSpec) -> ResNet:
    """Detectron2's ResNet; with MODEL.RESNETS.DOWNSAMPLE "carafe" its stages downsample with it.

    What downsamples is trained, whatever MODEL.BACKBONE.FREEZE_AT freezes around it.

    Args:
        cfg: a Detectron2 config; keys of ``add_carafe_config`` that it lacks take their defaults.
        input_shape: channels of the images.
    """
    cfg = with_carafe_config(cfg)
    resnet = build_resnet_backbone(cfg, input_shape)
    options = None
    for stage in resnet.stages:
        if stage[0].stride > 1:
            options = downsampler_options(cfg, "RESNETS.DOWNSAMPLE", stage[0].in_channels)
    return resnet if options is None else downsample_with_carafe(resnet, **options)
