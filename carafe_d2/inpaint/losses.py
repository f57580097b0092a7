"""The losses of inpainting by partial convolutions that are more than a difference of pixels."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint import read_checkpoint
from ..errors import UserError

# The convolutions in front of each of the first three poolings, by their numbers in torchvision.
_BLOCKS = ((0, 2), (5, 7), (10, 12, 14))
_KINDS = ("weight", "bias")


class PerceptualLoss(nn.Module):
    """Distances of images in the maps of the first three poolings of an ImageNet VGG-16.

    Its weights are no part of a state dict, and are not trained.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: str):
        """
        Args:
            weights: the file of torchvision's VGG-16, ``vgg16-397923af.pth``.

        Raises:
            UserError: there is no such file, or it holds other weights.
        """
        super().__init__()
        content = read_checkpoint(weights)
        names = [f"features.{i}.{kind}" for block in _BLOCKS for i in block for kind in _KINDS]
        # VGG-19 has one convolution more in the third block.
        if not content.keys() >= {*names} or "features.16.weight" in content:
            raise UserError(f"MODEL.INPAINT.VGG_WEIGHTS: {weights} is not torchvision's VGG-16")
        for name in names:
            self.register_buffer(name.replace(".", "_"), content[name], persistent=False)
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, completed: Tensor, filled: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            completed: what a model put out, RGB (N, 3, H, W), from 0 to 255.
            filled: the images, and that only in their holes.
            images: the true ones.

        Returns:
            The perceptual loss, and those of style, equations 3 to 5 of Liu et al. 2018: mean
            absolute differences of the maps, and of their autocorrelations.
        """
        x = (torch.cat([completed, filled, images]) - self.mean) / self.std
        perceptual = style = x.new_zeros(())
        for block in _BLOCKS:
            for i in block:
                weight, bias = (getattr(self, f"features_{i}_{kind}") for kind in _KINDS)
                x = F.relu(F.conv2d(x, weight, bias, padding=1))
            x = F.max_pool2d(x, 2)
            *ours, truth = x.chunk(3)
            perceptual = perceptual + sum(F.l1_loss(each, truth) for each in ours)
            *ours, truth = gram(x).chunk(3)
            style = style + sum(F.l1_loss(each, truth) for each in ours)
        return perceptual, style


def gram(x: Tensor) -> Tensor:
    """The autocorrelation (N, C, C) of maps (N, C, H, W), divided by C * H * W."""
    flat = x.flatten(2)
    return flat @ flat.transpose(1, 2) / flat[0].numel()


def total_variation(images: Tensor, holes: Tensor) -> Tensor:
    """Mean absolute differences of neighboring pixels in the holes and one pixel around them.

    Args:
        images: (N, 3, H, W).
        holes: (N, 1, H, W), 1 where a pixel is missing.
    """
    region = F.max_pool2d(holes, 3, stride=1, padding=1)
    total = images.new_zeros(())
    for dim in (2, 3):
        count = images.shape[dim] - 1
        pairs = [(x.narrow(dim, 0, count), x.narrow(dim, 1, count)) for x in (images, region)]
        (left, right), (left_inside, right_inside) = pairs
        total = total + ((left - right).abs() * left_inside * right_inside).sum()
    return total / images.numel()
