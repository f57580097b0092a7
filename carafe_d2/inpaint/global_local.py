"""Globally and locally consistent image completion, with a choice of upsamplers."""

import torch
from detectron2.config import configurable
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling import META_ARCH_REGISTRY
from fvcore.nn import weight_init
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ..config import with_carafe_config
from ..errors import UserError
from ..upsample import build_upsampler
from .model import Inpainter, at_least, inpainter_options


def _conv(
    in_channels: int,
    out_channels: int,
    norm: str,
    kernel_size: int = 3,
    stride: int = 1,
    dilation: int = 1,
) -> Conv2d:
    layer = Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=dilation * (kernel_size // 2),
        dilation=dilation,
        bias=not norm,
        norm=get_norm(norm, out_channels),
        activation=F.relu,
    )
    weight_init.c2_msra_fill(layer)
    return layer


class CompletionNetwork(nn.Module):
    """The completion network of Iizuka et al. 2017, table 1: two steps of stride 2, dilated
    convolutions, two upsamplings.

    With "deconv" these are its 4x4 deconvolutions, which halve the channels. Any other upsampler
    keeps the channels, and the convolution behind it reduces them.
    """

    def __init__(self, *, channels: int = 64, norm: str = "BN", upsampler: dict | None = None):
        """
        Args:
            channels: of the first convolution; the others have up to four times as many.
            norm: normalization of the convolutions, see :func:`detectron2.layers.get_norm`.
            upsampler: arguments of :func:`carafe_d2.build_upsampler`; default is CARAFE's.
        """
        super().__init__()
        c = channels
        upsampler = upsampler or {"name": "carafe"}

        def upsample_and_conv(in_channels: int, out_channels: int) -> list[nn.Module]:
            if upsampler["name"] != "deconv":
                layer = build_upsampler(channels=in_channels, **upsampler)
                return [layer, _conv(in_channels, out_channels, norm)]
            half = in_channels // 2
            deconv = nn.ConvTranspose2d(in_channels, half, 4, 2, padding=1, bias=not norm)
            norms = [get_norm(norm, half)] if norm else []
            return [deconv, *norms, nn.ReLU(), _conv(half, out_channels, norm)]

        predictor = nn.Conv2d(c // 2, 3, kernel_size=3, padding=1)
        self.layers = nn.Sequential(
            _conv(4, c, norm, kernel_size=5),
            _conv(c, 2 * c, norm, stride=2),
            _conv(2 * c, 2 * c, norm),
            _conv(2 * c, 4 * c, norm, stride=2),
            *(_conv(4 * c, 4 * c, norm) for _ in range(2)),
            *(_conv(4 * c, 4 * c, norm, dilation=dilation) for dilation in (2, 4, 8, 16)),
            *(_conv(4 * c, 4 * c, norm) for _ in range(2)),
            *upsample_and_conv(4 * c, 2 * c),
            *upsample_and_conv(2 * c, c // 2),
            predictor,
            nn.Sigmoid(),
        )

    def forward(self, images: Tensor, holes: Tensor) -> Tensor:
        """
        Args:
            images: (N, 3, H, W), zeros in the holes; multiples of 4 high and wide.
            holes: (N, 1, H, W), 1 where a pixel is missing.

        Returns:
            (N, 3, H, W), from 0 to 1.
        """
        return self.layers(torch.cat([images, holes], dim=1))


class Discriminators(nn.Module):
    """The global and the local discriminator of Iizuka et al. 2017, table 2, and what joins them.

    Each halves its image by 5x5 convolutions down to four pixels a side.
    """

    def __init__(self, *, size: int, local_size: int, channels: int = 64, norm: str = "BN"):
        """
        Args:
            size: side of the images.
            local_size: side of the windows around the holes.
            channels: of the first convolutions; the others have up to eight times as many.
            norm: normalization of the convolutions, see :func:`detectron2.layers.get_norm`.
        """
        super().__init__()

        def network(size: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            in_channels, out_channels = 3, channels
            while size > 4:
                layers.append(_conv(in_channels, out_channels, norm, kernel_size=5, stride=2))
                in_channels, out_channels = out_channels, min(2 * out_channels, 8 * channels)
                size = (size + 1) // 2
            linear = nn.Linear(in_channels * size**2, 16 * channels)
            return nn.Sequential(*layers, nn.Flatten(), linear, nn.ReLU())

        self.of_image = network(size)
        self.of_window = network(local_size)
        self.predictor = nn.Linear(32 * channels, 1)

    def forward(self, images: Tensor, windows: Tensor) -> Tensor:
        """
        Args:
            images: (N, 3, size, size).
            windows: (N, 3, local_size, local_size), of the images.

        Returns:
            Logits (N, 1), high for what seems to be real.
        """
        return self.predictor(torch.cat([self.of_image(images), self.of_window(windows)], dim=1))


@META_ARCH_REGISTRY.register()
class GlobalLocalInpainter(Inpainter):
    """Completion network and discriminators of "Globally and Locally Consistent Image Completion"
    (Iizuka, Simo-Serra and Ishikawa, SIGGRAPH 2017), without its post-processing.

    The parts are trained in turns: first the completion network alone by the squared error in the
    holes, then the discriminators alone, then in every iteration the discriminators and, with a
    loss of theirs added, the completion network.
    """

    @configurable
    def __init__(
        self,
        *,
        completion: nn.Module,
        discriminators: nn.Module,
        local_size: int,
        adversarial_weight: float = 0.0004,
        completion_iters: int = 90000,
        discriminator_iters: int = 10000,
        **kwargs,
    ):
        """
        Args:
            completion: a :class:`CompletionNetwork`.
            discriminators: :class:`Discriminators`.
            local_size: side of the windows around the holes that the local one sees.
            adversarial_weight: weight of the discriminators' verdict in the completion's loss.
            completion_iters: iterations in which the completion network is trained alone.
            discriminator_iters: iterations after these in which the discriminators are.
            **kwargs: see :class:`~carafe_d2.inpaint.model.Inpainter`.
        """
        super().__init__(**kwargs)
        self.completion = completion
        self.discriminators = discriminators
        self.local_size = local_size
        self.adversarial_weight = adversarial_weight
        self.completion_iters = completion_iters
        self.discriminator_iters = discriminator_iters

    @classmethod
    def from_config(cls, cfg) -> dict:
        cfg = with_carafe_config(cfg)
        options = inpainter_options(cfg, 4, 2 * at_least(cfg, "CHANNELS", 2))
        channels, norm = options.pop("channels"), options.pop("norm")
        size, local_size = cfg.MODEL.INPAINT.CROP_SIZE, at_least(cfg, "LOCAL_SIZE", 1)
        if local_size > size:
            raise UserError(
                f"MODEL.INPAINT.LOCAL_SIZE must be at most CROP_SIZE, {size}, got {local_size}"
            )
        return {
            "completion": CompletionNetwork(
                channels=channels, norm=norm, upsampler=options.pop("upsampler")
            ),
            "discriminators": Discriminators(
                size=size, local_size=local_size, channels=channels, norm=norm
            ),
            "local_size": local_size,
            "adversarial_weight": at_least(cfg, "ADVERSARIAL_WEIGHT", 0),
            "completion_iters": at_least(cfg, "COMPLETION_ITERS", 0),
            "discriminator_iters": at_least(cfg, "DISCRIMINATOR_ITERS", 0),
            **options,
        }

    def turns(self, iteration: int) -> tuple[str, ...]:
        """The parts that are trained in an iteration, in this order."""
        if iteration < self.completion_iters:
            return ("completion",)
        if iteration < self.completion_iters + self.discriminator_iters:
            return ("discriminators",)
        return ("discriminators", "generator")

    def complete(self, images: Tensor, holes: Tensor) -> Tensor:
        completed = self.completion(images * (1 - holes), holes)
        return (255 * completed.float() - self.pixel_mean) / self.pixel_std

    def losses(self, images: Tensor, holes: Tensor, part: str) -> dict[str, Tensor]:
        if part == "discriminators":
            with torch.no_grad():
                filled = self.fill(images, self.complete(images, holes), holes)
            real, fake = (self._judge(each, holes, train=True) for each in (images, filled))
            return {"loss_discriminators": _loss(real, 1) + _loss(fake, 0)}
        completed = self.complete(images, holes)
        error = ((completed - images) ** 2 * holes).sum() / (3 * holes.sum())
        if part == "completion":
            return {"loss_hole": error}
        verdict = self._judge(self.fill(images, completed, holes), holes, train=False)
        return {"loss_hole": error, "loss_adversarial": self.adversarial_weight * _loss(verdict, 1)}

    def _judge(self, images: Tensor, holes: Tensor, train: bool) -> Tensor:
        """The discriminators' verdict; with ``train`` they get its gradient, too."""
        windows = windows_around(holes, images, self.local_size)
        if train:
            return self.discriminators(images, windows)
        fixed = {name: p.detach() for name, p in self.discriminators.named_parameters()}
        return functional_call(self.discriminators, fixed, (images, windows))


def _loss(logits: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def windows_around(holes: Tensor, images: Tensor, size: int) -> Tensor:
    """Cuts a window out of each image with its hole in the middle, as far as it lies inside.

    Args:
        holes: (N, 1, H, W), 1 where a pixel is missing.
        images: (N, C, H, W).
        size: side of the windows.

    Returns:
        (N, C, size, size).
    """
    corners = []
    for dim in (3, 2):  # which is taken together, so that rows are left, then columns
        line = holes.amax(dim).flatten(1)
        first, behind = line.argmax(1), line.shape[1] - line.flip(1).argmax(1)
        corner = (first + behind - size) // 2
        corners.append(corner.clamp(0, line.shape[1] - size).tolist())
    return torch.stack(
        [
            image[:, top : top + size, left : left + size]
            for image, top, left in zip(images, *corners, strict=True)
        ]
    )
