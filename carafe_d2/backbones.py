"""CARAFE pyramids on the backbones of torchvision and timm, by their names there."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from . import fpn  # no name of it: fpn itself may be what is being imported
from .config import with_carafe_config
from .errors import UserError


class FeatureBackbone(Backbone):
    """A classification network as a backbone: its last map of each stride, named as in ResNets.

    ``res2`` has stride 4, ``res3`` 8, ``res4`` 16, ``res5`` 32; what the network lacks is missing.
    """

    def __init__(self, features: nn.Module, shapes: dict[str, ShapeSpec]):
        """
        Args:
            features: maps images (N, C, H, W) to maps by the names of ``shapes``, or in that order.
            shapes: channels and stride of every map.
        """
        super().__init__()
        self.features = features
        self._out_features = list(shapes)
        self._out_feature_strides = {name: shape.stride for name, shape in shapes.items()}
        self._out_feature_channels = {name: shape.channels for name, shape in shapes.items()}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """
        Args:
            x: images (N, C, H, W).

        Returns:
            Maps by name, ``res<i>`` of (N, channels, H / 2**i, W / 2**i).
        """
        maps = self.features(x)
        return maps if isinstance(maps, dict) else dict(zip(self._out_features, maps, strict=True))


def torchvision_backbone(name: str, *, pretrained: bool = False) -> FeatureBackbone:
    """A classification network of torchvision as a backbone.

    Args:
        name: as :func:`torchvision.models.list_models` has it, e.g. "mobilenet_v2".
        pretrained: whether to load its default ImageNet weights, which are fetched if need be.

    Raises:
        UserError: there is no such network, or it puts out no maps of strides 4 to 32.
    """
    from torchvision import models
    from torchvision.models.feature_extraction import create_feature_extractor

    try:
        network = models.get_model(name, weights="DEFAULT" if pretrained else None)
    except ValueError as error:
        raise UserError(f"MODEL.BACKBONE.MODEL {name!r} is no network of torchvision") from error
    shapes: dict[str, ShapeSpec] = {}
    nodes: dict[str, str] = {}

    def record(node: str) -> Callable:
        def hook(_, __, output) -> None:
            stride = _stride(output)
            if stride in _LEVELS:
                shapes[_LEVELS[stride]] = ShapeSpec(channels=output.shape[1], stride=stride)
                nodes[_LEVELS[stride]] = node  # the last one counts

        return hook

    # A network's stages are its children, or theirs; a stage is done after its own children.
    stages = {name: m for name, m in network.named_modules() if name and name.count(".") < 2}
    _run(network, {stage: record(name) for name, stage in stages.items()})
    if not shapes:
        raise UserError(f"MODEL.BACKBONE.MODEL {name!r} puts out no maps for a feature pyramid")
    extractor = create_feature_extractor(network, {nodes[k]: k for k in shapes})
    return FeatureBackbone(extractor, shapes)


def timm_backbone(name: str, *, pretrained: bool = False) -> FeatureBackbone:
    """A network of timm as a backbone.

    Args:
        name: as ``timm.list_models()`` has it, e.g. "mobilenetv3_large_100".
        pretrained: whether to load its default weights, which are fetched if need be.

    Raises:
        UserError: timm is not installed, has no such network, or it has no maps of strides 4 to 32.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError("build_timm_carafe_fpn_backbone needs timm: pip install timm") from error
    try:
        network = timm.create_model(name, features_only=True, pretrained=pretrained)
    except RuntimeError as error:
        raise UserError(f"MODEL.BACKBONE.MODEL {name!r}: {error}") from error
    info: Any = network.feature_info
    chosen = {_LEVELS[r]: i for i, r in enumerate(info.reduction()) if r in _LEVELS}
    if not chosen:
        raise UserError(f"MODEL.BACKBONE.MODEL {name!r} puts out no maps for a feature pyramid")
    network = timm.create_model(
        name, features_only=True, pretrained=pretrained, out_indices=tuple(chosen.values())
    )
    info = network.feature_info
    shapes = {
        level: ShapeSpec(channels=c, stride=s)
        for level, c, s in zip(chosen, info.channels(), info.reduction(), strict=True)
    }
    return FeatureBackbone(network, shapes)


_LEVELS = {4: "res2", 8: "res3", 16: "res4", 32: "res5"}
_SIDE = 256  # of the image that shows what a network puts out


def _stride(output) -> int:
    """The stride of a map (N, C, H, W) of the image of side ``_SIDE``; 0 for anything else."""
    if not isinstance(output, Tensor) or output.dim() != 4 or output.shape[-1] in (0, 1):
        return 0
    height, width = output.shape[-2:]
    return _SIDE // width if height == width and _SIDE % width == 0 else 0


def _run(network: nn.Module, hooks: Mapping[nn.Module, Callable]) -> None:
    """Runs a network once with forward hooks on some of its modules."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    training = network.training
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, _SIDE, _SIDE))
    network.train(training)
    for handle in handles:
        handle.remove()


def _freeze(network: nn.Module, freeze_at: int) -> None:
    """Freezes what computes maps of stride 2**freeze_at and finer; 0 freezes nothing."""

    def freeze(module: nn.Module, _, output) -> None:
        if 0 < _stride(output) <= 2**freeze_at:
            module.requires_grad_(False)

    if freeze_at > 0:
        leaves = [module for module in network.modules() if not [*module.children()]]
        _run(network, dict.fromkeys(leaves, freeze))


def _build(cfg, backbone: Callable[..., FeatureBackbone]) -> "fpn.CarafeFPN":
    cfg = with_carafe_config(cfg)
    if not cfg.MODEL.BACKBONE.MODEL:
        raise UserError("MODEL.BACKBONE.MODEL is empty; name a network, e.g. mobilenet_v2")
    bottom_up = backbone(cfg.MODEL.BACKBONE.MODEL, pretrained=cfg.MODEL.BACKBONE.PRETRAINED)
    missing = set(cfg.MODEL.FPN.IN_FEATURES) - set(bottom_up.output_shape())
    if missing:
        raise UserError(
            f"MODEL.FPN.IN_FEATURES asks for {', '.join(sorted(missing))}, but "
            f"{cfg.MODEL.BACKBONE.MODEL} has {', '.join(bottom_up.output_shape())}"
        )
    _freeze(bottom_up, cfg.MODEL.BACKBONE.FREEZE_AT)
    if cfg.MODEL.RESNETS.NORM == "FrozenBN":
        bottom_up = FrozenBatchNorm2d.convert_frozen_batchnorm(bottom_up)
    retinanet = cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    return fpn.CarafeFPN(cfg, bottom_up, num_extra_levels=2 if retinanet else 1)


@BACKBONE_REGISTRY.register()
def build_torchvision_carafe_fpn_backbone(cfg, input_shape: ShapeSpec) -> "fpn.CarafeFPN":
    """A CARAFE pyramid on the torchvision network that MODEL.BACKBONE.MODEL names.

    Args:
        cfg: a Detectron2 config. MODEL.BACKBONE.PRETRAINED loads the network's ImageNet weights,
            MODEL.BACKBONE.FREEZE_AT n freezes what computes maps of stride 2**n and finer, and
            MODEL.RESNETS.NORM "FrozenBN" all batch normalization. For RetinaNet the pyramid
            has two extra levels, else one.
        input_shape: channels of the images, 3.
    """
    return _build(cfg, torchvision_backbone)


@BACKBONE_REGISTRY.register()
def build_timm_carafe_fpn_backbone(cfg, input_shape: ShapeSpec) -> "fpn.CarafeFPN":
    """A CARAFE pyramid on the timm network that MODEL.BACKBONE.MODEL names.

    Args:
        cfg, input_shape: see :func:`build_torchvision_carafe_fpn_backbone`.
    """
    return _build(cfg, timm_backbone)
