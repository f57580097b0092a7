"""Inpainting by partial convolutions, with a choice of upsamplers."""

from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.layers import get_norm
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import with_carafe_config
from ..errors import UserError
from ..upsample import CARAFEPack, build_upsampler
from .losses import PerceptualLoss, total_variation
from .model import Inpainter, at_least, inpainter_options

# A map (N, C, H, W), zero where it is not valid, and which share of what each of its values was
# made from is valid (N, G, H, W): from 0 to 1, the same for each C / G channels in turn.
Masked = tuple[Tensor, Tensor]

_LEAST_SHARE = 1e-6


class PartialConv2d(nn.Module):
    """A convolution of the valid part of maps, after Liu et al. 2018, equation 1.

    What it sums is divided by the valid share of its window. Its output is valid where there is
    any, and zero elsewhere; whatever lies outside the map is not valid.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        norm: str = "",
        activation: nn.Module | None = None,
    ):
        """
        Args:
            in_channels: of all maps of the input together.
            out_channels: of the output.
            kernel_size: side of the kernel, odd.
            stride: as in a convolution.
            norm: normalization behind it, see :func:`detectron2.layers.get_norm`.
            activation: behind that.
        """
        super().__init__()
        self.stride, self.padding = stride, kernel_size // 2
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, self.padding, bias=False
        )
        nn.init.kaiming_normal_(self.conv.weight)
        self.bias = None if norm else nn.Parameter(torch.zeros(out_channels, 1, 1))
        self.norm = get_norm(norm, out_channels)
        self.activation = activation

    def forward(self, inputs: Sequence[Masked]) -> Masked:
        """
        Args:
            inputs: maps of one size; their channels are taken together.

        Returns:
            (N, out_channels, H', W'), and its validity (N, 1, H', W').
        """
        share = self._share(inputs)
        valid = (share > _LEAST_SHARE).float()
        x = self.conv(torch.cat([x for x, _ in inputs], dim=1)) / share.clamp(min=_LEAST_SHARE)
        if self.bias is not None:
            x = x + self.bias
        if self.norm is not None:
            x = self.norm(x * valid)
        if self.activation is not None:
            x = self.activation(x)
        return x * valid, valid

    @torch.no_grad()
    def _share(self, inputs: Sequence[Masked]) -> Tensor:
        """The share of what each window sums up that is valid, (N, 1, H', W')."""
        each = [x.shape[1] / mask.shape[1] * mask.float().sum(1, True) for x, mask in inputs]
        valid = torch.stack(each).sum(0)
        weight = self.conv.weight
        kernel = valid.new_full((1, 1, *weight.shape[2:]), 1 / weight[0].numel())
        with torch.autocast(valid.device.type, enabled=False):
            return F.conv2d(valid, kernel, stride=self.stride, padding=self.padding)


def upsample_masked(upsampler: nn.Module, masked: Masked) -> Masked:
    """Upsamples a map, and its validity the same way.

    With CARAFE the validity is reassembled with the kernels of the map: a value is valid where they
    gather anything valid. Interpolation does the same to both. Behind a deconvolution or sub-pixel
    convolution, each value is valid as that was which it lies in.
    """
    x, mask = masked
    if isinstance(upsampler, CARAFEPack):
        kernels = upsampler.predict(x)
        mask = mask.expand(-1, upsampler.up_group, -1, -1)
        with torch.no_grad():
            # No shares: divided by those, kernels that learn to lie outside the map cost nothing
            # until nothing valid is left, and nothing to learn from.
            mask = (upsampler.reassemble(mask, *kernels) > 0).to(mask.dtype)
        return upsampler.reassemble(x, *kernels), mask
    if isinstance(upsampler, nn.Upsample):
        return upsampler(x), upsampler(mask)
    x, mask = upsampler(x), F.interpolate(mask, scale_factor=2)
    return x * mask, mask


class PartialConvUNet(nn.Module):
    """The U-Net of Liu et al. 2018 (arXiv 1804.07723), table 4."""

    def __init__(
        self,
        *,
        channels: int = 64,
        num_levels: int = 8,
        norm: str = "BN",
        upsampler: dict | None = None,
        freeze_encoder_norm: bool = False,
    ):
        """
        Args:
            channels: of the first convolution; the others have up to eight times as many.
            num_levels: how often the images are halved.
            norm: normalization of all but the first and the last convolution.
            upsampler: arguments of :func:`carafe_d2.build_upsampler`; default is CARAFE's.
            freeze_encoder_norm: whether in training the encoder's norms keep their statistics.
        """
        super().__init__()
        self.freeze_encoder_norm = freeze_encoder_norm
        widths = [3, *(channels * min(2**i, 8) for i in range(num_levels))]
        kernels = [7, 5, 5, *[3] * num_levels]
        self.encoder = nn.ModuleList(
            PartialConv2d(
                widths[i],
                widths[i + 1],
                kernels[i],
                stride=2,
                norm=norm if i else "",
                activation=nn.ReLU(),
            )
            for i in range(num_levels)
        )
        self.upsample = nn.ModuleList(
            build_upsampler(channels=width, **(upsampler or {"name": "carafe"}))
            for width in reversed(widths[1:])
        )
        self.decoder = nn.ModuleList(
            PartialConv2d(
                widths[i + 1] + widths[i],
                widths[i],
                3,
                norm=norm if i else "",
                activation=nn.LeakyReLU(0.2) if i else None,
            )
            for i in reversed(range(num_levels))
        )

    def train(self, mode: bool = True):
        super().train(mode)
        if self.freeze_encoder_norm:
            self.encoder.eval()
        return self

    def forward(self, images: Tensor, valid: Tensor) -> Tensor:
        """
        Args:
            images: (N, 3, H, W), multiples of ``2**num_levels`` high and wide.
            valid: (N, 1, H, W), 0 where a pixel is missing.

        Returns:
            (N, 3, H, W).
        """
        maps = [(images * valid, valid)]
        for layer in self.encoder:
            maps.append(layer(maps[-1:]))
        x = maps.pop()
        for upsample, layer in zip(self.upsample, self.decoder, strict=True):
            x = layer([upsample_masked(upsample, x), maps.pop()])
        return x[0]


@META_ARCH_REGISTRY.register()
class PartialConvInpainter(Inpainter):
    """The model of "Image Inpainting for Irregular Holes Using Partial Convolutions" (Liu et al.,
    ECCV 2018) and its losses.

    Where CARAFE upsamples, the masks are updated with the same kernels, as in the section on
    inpainting of arXiv 1905.02188.
    """

    @configurable
    def __init__(self, *, network: nn.Module, perceptual: PerceptualLoss | None = None, **kwargs):
        """
        Args:
            network: a :class:`PartialConvUNet`.
            perceptual: computes the perceptual loss and those of style; None leaves these out.
            **kwargs: see :class:`~carafe_d2.inpaint.model.Inpainter`.
        """
        super().__init__(**kwargs)
        self.network = network
        self.perceptual = perceptual

    @classmethod
    def from_config(cls, cfg) -> dict:
        cfg = with_carafe_config(cfg)
        num_levels = at_least(cfg, "NUM_LEVELS", 1)
        options = inpainter_options(cfg, 2**num_levels, at_least(cfg, "CHANNELS", 1))
        upsampler = options.pop("upsampler")
        if upsampler.get("normalizer") in ("sigmoid", "none"):
            raise UserError(
                "MODEL.CARAFE.NORMALIZER must be softmax or normalized_sigmoid, for masks that are "
                f"updated with kernels which sum to one, got {upsampler['normalizer']!r}"
            )
        weights = cfg.MODEL.INPAINT.VGG_WEIGHTS
        return {
            "network": PartialConvUNet(
                channels=options.pop("channels"),
                num_levels=num_levels,
                norm=options.pop("norm"),
                upsampler=upsampler,
                freeze_encoder_norm=cfg.MODEL.INPAINT.FREEZE_ENCODER_NORM,
            ),
            "perceptual": PerceptualLoss(weights) if weights else None,
            **options,
        }

    def complete(self, images: Tensor, holes: Tensor) -> Tensor:
        return self.network(images, 1 - holes)

    def losses(self, images: Tensor, holes: Tensor, part: str) -> dict[str, Tensor]:
        completed = self.complete(images, holes).float()
        filled = self.fill(images, completed, holes)
        error = (completed - images).abs()
        losses = {
            "loss_valid": (error * (1 - holes)).mean(),
            "loss_hole": 6 * (error * holes).mean(),
            "loss_tv": 0.1 * total_variation(filled, holes),
        }
        if self.perceptual is not None:
            pixels = [x * self.pixel_std + self.pixel_mean for x in (completed, filled, images)]
            perceptual, style = self.perceptual(*pixels)
            losses |= {"loss_perceptual": 0.05 * perceptual, "loss_style": 120 * style}
        return losses
