"""What inpainting models share: their input, their output and their config."""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..config import upsampler_options, with_carafe_config
from ..errors import UserError
from ..upsample import UPSAMPLERS


class Inpainter(nn.Module):
    """A meta-architecture that fills the holes of images; subclasses say how.

    Shapes:
        Inside, images are (N, 3, H, W), normalized by mean and deviation of the pixels, and holes
        (N, 1, H, W) of the same type, 1 where a pixel is missing.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self, *, divisor: int, pixel_mean: Sequence[float], pixel_std: Sequence[float]
    ) -> None:
        """
        Args:
            divisor: what the sides of the images have to be multiples of.
            pixel_mean, pixel_std: of each channel of the images.
        """
        super().__init__()
        self.divisor = divisor
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict], part: str = "generator"):
        """
        Args:
            batched_inputs: for each image ``image`` (3, H, W) with values from 0 to 255, and
                ``mask`` (H, W), True where a pixel is missing; all of one size.
            part: in training, what of the model takes its turn, for models that have ``turns``.

        Returns:
            In training the losses of that part by name, else for each image ``inpainted``
            (3, H, W), the image with its hole filled, with values from 0 to 255.

        Raises:
            UserError: there are no masks, or a side of the images is no multiple of ``divisor``.
        """
        if "mask" not in batched_inputs[0]:
            raise UserError(
                "an inpainting model needs images with holes, and there are none here; "
                "tools/predict.py makes them"
            )
        pixels = torch.stack([each["image"].to(self.device) for each in batched_inputs])
        images = (pixels - self.pixel_mean) / self.pixel_std
        holes = torch.stack([each["mask"].to(self.device) for each in batched_inputs])
        holes = holes.unsqueeze(1).to(images.dtype)
        height, width = images.shape[-2:]
        if height % self.divisor or width % self.divisor:
            raise UserError(
                f"images of {width} x {height} pixels: this model needs sides that are multiples "
                f"of {self.divisor}"
            )
        if self.training:
            return self.losses(images, holes, part)
        filled = self.fill(images, self.complete(images, holes), holes)
        filled = (filled * self.pixel_std + self.pixel_mean).clamp(0, 255)
        # What is not missing stays to the bit.
        return [{"inpainted": each} for each in self.fill(pixels.to(filled.dtype), filled, holes)]

    @staticmethod
    def fill(images: Tensor, completed: Tensor, holes: Tensor) -> Tensor:
        """The images, and in their holes what a model completed."""
        return torch.where(holes > 0, completed.to(images.dtype), images)

    def complete(self, images: Tensor, holes: Tensor) -> Tensor:
        """What the model puts out for images, of which it sees nothing in the holes."""
        raise NotImplementedError

    def losses(self, images: Tensor, holes: Tensor, part: str) -> dict[str, Tensor]:
        """The losses of a part of the model by name."""
        raise NotImplementedError


def inpainter_options(cfg: CfgNode, divisor: int, channels: int) -> dict:
    """What every inpainting model takes of a config, checked.

    Args:
        cfg: a Detectron2 config; keys of ``add_carafe_config`` that it lacks take their defaults.
        divisor: what the sides of the model's images have to be multiples of.
        channels: of the maps with the least channels that are upsampled.

    Returns:
        ``channels``, ``norm`` and ``upsampler`` of the network, and the arguments of
        :class:`Inpainter`.

    Raises:
        UserError: names the key.
    """
    cfg = with_carafe_config(cfg)
    options = cfg.MODEL.INPAINT
    if options.CROP_SIZE < 1 or options.CROP_SIZE % divisor:
        raise UserError(
            f"MODEL.INPAINT.CROP_SIZE must be a multiple of {divisor} for this model, got "
            f"{options.CROP_SIZE}"
        )
    return {
        "channels": options.CHANNELS,
        "norm": options.NORM,
        "upsampler": upsampler_options(cfg, "INPAINT.UPSAMPLE", list(UPSAMPLERS), channels),
        "divisor": divisor,
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
    }


def at_least(cfg: CfgNode, key: str, least: int):
    """The value of a key under MODEL.INPAINT.

    Raises:
        UserError: it is less than ``least``; the message names the key.
    """
    value = cfg.MODEL.INPAINT[key]
    if value < least:
        raise UserError(f"MODEL.INPAINT.{key} must be at least {least}, got {value!r}")
    return value
