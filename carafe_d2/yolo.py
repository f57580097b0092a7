"""The two CARAFE modules that forks of YOLO carry, with the compiled operator inside.

Both are named CARAFE there. Arguments, names of parameters and numbers are the same here, so their
state dicts load. Either may also take the place of that class in a fork's own file; models that
were pickled whole then run with it.

Nothing here needs Ultralytics or Detectron2.
"""

import math
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from .ops import carafe_upsample
from .upsample import check_sizes


def _conv(c1: int, c2: int, kernel_size: int, act: nn.Module) -> nn.Sequential:
    """Convolution, batch norm, activation, by the names that YOLO's block has for them."""
    conv = nn.Conv2d(c1, c2, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(c2), act=act))


class BatchNormCARAFE(nn.Module):
    """The module with batch norm: ``CARAFE(c, k_enc=3, k_up=5, c_mid=64, scale=2)`` in forks.

    Kernels are predicted as in :class:`carafe_d2.CARAFEPack`, with a batch norm after each of the
    two convolutions, a SiLU between them and no biases. The parameters are those of ``comp.conv``,
    ``comp.bn``, ``enc.conv`` and ``enc.bn``.

    Args:
        c: channels of the input and of the output.
        k_enc: side of the encoder's convolution, odd.
        k_up: side of the reassembly kernel, odd.
        c_mid: channels between the convolutions.
        scale: upsampling ratio.

    Shapes:
        (N, c, H, W) gives (N, c, scale * H, scale * W).

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    def __init__(self, c: int, k_enc: int = 3, k_up: int = 5, c_mid: int = 64, scale: int = 2):
        super().__init__()
        check_sizes(c=c, k_enc=k_enc, k_up=k_up, c_mid=c_mid, scale=scale)
        self.scale = scale
        self.comp = _conv(c, c_mid, 1, nn.SiLU())
        self.enc: Any = _conv(c_mid, (scale * k_up) ** 2, k_enc, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        kernel_logits = self.enc(self.comp(x))
        # What forks have pickled has no k_up, and YOLO's own block for enc.
        k_up = math.isqrt(self.enc.conv.out_channels) // self.scale
        return carafe_upsample(x, kernel_logits, k_up, 1, self.scale)


class ProjectedCARAFE(nn.Module):
    """The module that can change channels: ``CARAFE(c1, c2, kernel_size=3, up_factor=2)`` in forks.

    The two convolutions that predict the kernels, ``down`` to a quarter of the channels and
    ``encoder``, are those of :class:`carafe_d2.CARAFEPack`; a 1x1 convolution ``out`` follows.

    Args:
        c1: channels of the input, at least 4.
        c2: channels of the output.
        kernel_size: side of the reassembly kernel and of the encoder's convolution, odd.
        up_factor: upsampling ratio.

    Shapes:
        (N, c1, H, W) gives (N, c2, up_factor * H, up_factor * W).

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    def __init__(self, c1: int, c2: int, kernel_size: int = 3, up_factor: int = 2):
        super().__init__()
        check_sizes(c1=c1, c2=c2, kernel_size=kernel_size, up_factor=up_factor)
        check_sizes(**{"a quarter of c1": c1 // 4})
        self.kernel_size = kernel_size
        self.up_factor = up_factor
        self.down = nn.Conv2d(c1, c1 // 4, 1)
        self.encoder = nn.Conv2d(
            c1 // 4, (up_factor * kernel_size) ** 2, kernel_size, padding=kernel_size // 2
        )
        self.out = nn.Conv2d(c1, c2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kernel_logits = self.encoder(self.down(x))
        return self.out(carafe_upsample(x, kernel_logits, self.kernel_size, 1, self.up_factor))
