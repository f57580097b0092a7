"""UPerNet for semantic segmentation, with a choice of upsamplers in each of its three parts."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from fvcore.nn import weight_init
from torch import Tensor, nn
from torch.nn import functional as F

from .config import upsampler_options, with_carafe_config
from .errors import UserError
from .upsample import UPSAMPLERS, build_upsampler


@SEM_SEG_HEADS_REGISTRY.register()
class UPerNetHead(nn.Module):
    """All of UPerNet that follows the backbone (Xiao et al., arXiv 1807.10221).

    Three parts upsample, each with an upsampler of its own choice, as in the section on semantic
    segmentation of arXiv 1905.02188:

    - Pyramid pooling averages the coarsest map over grids of several sizes. Each is interpolated to
      half the size of the map, upsampled by 2 and appended to the map, which becomes the coarsest
      level.
    - The feature pyramid adds the coarser level, upsampled by 2, to the lateral of the next finer.
    - Fusion begins with the coarsest level, upsamples by 2, appends the next finer level, and so on
      to the finest.

    With "bilinear", pooling and fusion interpolate to the full size in one step, as the official
    code of UPerNet does. From the finest level to the image class scores are interpolated.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        num_classes: int,
        conv_dims: int,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        norm: str = "",
        loss_weight: float = 1.0,
        aux_loss_weight: float = 0.0,
        ignore_value: int = 255,
        ppm_upsampler: dict | None = None,
        fpn_upsampler: dict | None = None,
        fuse_upsampler: dict | None = None,
    ):
        """
        Args:
            input_shape: channels and stride of the backbone's maps that are used; each has half the
                resolution of the one before, e.g. "res2" to "res5".
            num_classes: number of classes.
            conv_dims: channels of every convolution but the last.
            pool_scales: sides of the grids of pyramid pooling.
            norm: normalization of the convolutions, see :func:`detectron2.layers.get_norm`.
            loss_weight: weight of the loss.
            aux_loss_weight: weight of a loss on scores that the second coarsest map alone gives by
                a 3x3 and a 1x1 convolution; 0 for none, as in the official code of UPerNet.
            ignore_value: label of pixels without a class.
            ppm_upsampler: of pyramid pooling, arguments of :func:`carafe_d2.build_upsampler`;
                default is CARAFE's.
            fpn_upsampler: of the feature pyramid, likewise.
            fuse_upsampler: of the fusion, likewise.

        Raises:
            ValueError: there are less than two maps, or they do not each halve the resolution.
        """
        super().__init__()
        maps = sorted(input_shape.items(), key=lambda item: item[1].stride)
        strides = [shape.stride for _, shape in maps]
        if len(maps) < 2 or any(coarse != 2 * fine for fine, coarse in pairwise(strides)):
            raise ValueError(f"input_shape must each halve the resolution, got strides {strides}")
        self.in_features = [name for name, _ in maps]
        self.stride = strides[0]
        self.pool_scales = tuple(pool_scales)
        self.loss_weight = loss_weight
        self.aux_loss_weight = aux_loss_weight
        self.ignore_value = ignore_value

        def conv(in_channels: int, kernel_size: int) -> Conv2d:
            layer = Conv2d(
                in_channels,
                conv_dims,
                kernel_size,
                padding=kernel_size // 2,
                bias=not norm,
                norm=get_norm(norm, conv_dims),
                activation=F.relu,
            )
            weight_init.c2_msra_fill(layer)
            return layer

        def predictor() -> nn.Conv2d:
            layer = nn.Conv2d(conv_dims, num_classes, kernel_size=1)
            weight_init.c2_msra_fill(layer)
            return layer

        def upsamplers(options: dict | None, channels: Sequence[int]) -> nn.ModuleList:
            options = options or {"name": "carafe"}
            return nn.ModuleList(build_upsampler(channels=c, **options) for c in channels)

        # From the coarsest level on, in the order of use; None for interpolation in one step.
        in_one_step = {"name": "bilinear"}
        *finer, coarsest = [shape.channels for _, shape in maps]
        pools, steps = len(self.pool_scales), len(finer)
        self.ppm_upsample: nn.ModuleList | None = None
        self.fuse_upsample: nn.ModuleList | None = None
        if ppm_upsampler != in_one_step:
            self.ppm_upsample = upsamplers(ppm_upsampler, [coarsest] * pools)
        if fuse_upsampler != in_one_step:
            # The fusion has the channels of one level more after each step.
            channels = [levels * conv_dims for levels in range(1, steps + 1)]
            self.fuse_upsample = upsamplers(fuse_upsampler, channels)
        self.ppm_conv = nn.ModuleList(conv(coarsest, 1) for _ in range(pools))
        self.ppm_output = conv(coarsest + pools * conv_dims, 3)
        self.fpn_lateral = nn.ModuleList(conv(channels, 1) for channels in reversed(finer))
        self.fpn_upsample = upsamplers(fpn_upsampler, [conv_dims] * steps)
        self.fpn_output = nn.ModuleList(conv(conv_dims, 3) for _ in range(steps))
        self.fuse_output = conv((steps + 1) * conv_dims, 3)
        self.predictor = predictor()
        if aux_loss_weight:
            self.aux_predictor = nn.Sequential(conv(finer[-1], 3), nn.Dropout2d(0.1), predictor())

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        cfg = with_carafe_config(cfg)
        head = cfg.MODEL.SEM_SEG_HEAD
        maps = {name: input_shape[name] for name in head.IN_FEATURES}
        aux_loss_weight = cfg.MODEL.UPERNET.AUX_LOSS_WEIGHT
        if aux_loss_weight < 0:
            raise UserError(
                f"MODEL.UPERNET.AUX_LOSS_WEIGHT must be at least 0, got {aux_loss_weight}"
            )

        def upsampler(key: str, channels: int) -> dict:
            return upsampler_options(cfg, key, list(UPSAMPLERS), channels)

        coarsest = max(maps.values(), key=lambda shape: shape.stride).channels
        return {
            "input_shape": maps,
            "num_classes": head.NUM_CLASSES,
            "conv_dims": head.CONVS_DIM,
            "norm": head.NORM,
            "loss_weight": head.LOSS_WEIGHT,
            "aux_loss_weight": aux_loss_weight,
            "ignore_value": head.IGNORE_VALUE,
            "ppm_upsampler": upsampler("UPERNET.PPM_UPSAMPLE", coarsest),
            "fpn_upsampler": upsampler("UPERNET.FPN_UPSAMPLE", head.CONVS_DIM),
            "fuse_upsampler": upsampler("UPERNET.FUSE_UPSAMPLE", head.CONVS_DIM),
        }

    def forward(
        self, features: dict[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """
        Args:
            features: the backbone's maps (N, C, H, W) by name. Sides of the images that the strides
                do not divide work too: upsampled maps are cropped to the finer one that they meet.
            targets: in training, the class of every pixel of the images (N, H, W).

        Returns:
            In training None and the losses, else class scores (N, num_classes, H, W), for at least
            the size of the images, and no losses.
        """
        maps = [features[name] for name in self.in_features]
        scores = self.layers(maps)
        if not self.training:
            return _interpolate(scores, scale_factor=self.stride), {}
        assert targets is not None
        losses = {"loss_sem_seg": self.loss_weight * self._loss(scores, targets)}
        if self.aux_loss_weight:
            aux = _interpolate(self.aux_predictor(maps[-2]), size=scores.shape[-2:])
            losses["loss_sem_seg_aux"] = self.aux_loss_weight * self._loss(aux, targets)
        return None, losses

    def layers(self, maps: Sequence[Tensor]) -> Tensor:
        """Class scores (N, num_classes, H, W) in the size of the first of the backbone's maps."""
        *finer, coarsest = maps
        levels = [self._pool(coarsest)]
        top_down = levels[0]
        for i, x in enumerate(reversed(finer)):
            lateral = self.fpn_lateral[i](x)
            top_down = lateral + _crop(self.fpn_upsample[i](top_down), lateral)
            levels.append(self.fpn_output[i](top_down))

        if self.fuse_upsample is None:
            fine = [_interpolate(x, scale_factor=2**i) for i, x in enumerate(reversed(levels))]
            fused = torch.cat([_crop(x, levels[-1]) for x in fine], dim=1)
        else:
            fused = levels[0]
            for upsample, level in zip(self.fuse_upsample, levels[1:], strict=True):
                fused = torch.cat([level, _crop(upsample(fused), level)], dim=1)
        return self.predictor(self.fuse_output(fused))

    def _pool(self, x: Tensor) -> Tensor:
        """The coarsest level, of ``conv_dims`` channels in the size of the coarsest map."""
        size: Sequence[int] = x.shape[-2:]
        if self.ppm_upsample is not None:
            size = [(side + 1) // 2 for side in size]
        pools = [x]
        for i, scale in enumerate(self.pool_scales):
            pool = _interpolate(F.adaptive_avg_pool2d(x, scale), size=size)
            if self.ppm_upsample is not None:
                pool = _crop(self.ppm_upsample[i](pool), x)
            pools.append(self.ppm_conv[i](pool))
        return self.ppm_output(torch.cat(pools, dim=1))

    def _loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy at the pixels in the middle of the cells of the scores.

        The official code takes these as well; scores of 150 classes for every pixel would be most
        of what a training keeps in memory.
        """
        stride, (height, width) = self.stride, scores.shape[-2:]
        right, below = stride * width - targets.shape[-1], stride * height - targets.shape[-2]
        targets = F.pad(targets, (0, right, 0, below), value=self.ignore_value)
        targets = targets[:, stride // 2 :: stride, stride // 2 :: stride]
        return F.cross_entropy(scores.float(), targets, ignore_index=self.ignore_value)


def _interpolate(x: Tensor, **options) -> Tensor:
    return F.interpolate(x, mode="bilinear", align_corners=False, **options)


def _crop(x: Tensor, like: Tensor) -> Tensor:
    return x[..., : like.shape[-2], : like.shape[-1]]
