"""The downsampling half of CARAFE++ (Wang et al., TPAMI 2021, arXiv 2012.04733) as modules.

Nothing here needs Detectron2.
"""

from torch import Tensor, nn

from .ops import carafe_downsample, carafe_downsample_softmax
from .upsample import CARAFE, check_sizes, init_kernel_prediction


class CARAFEDownsample(CARAFE):
    """Reassembles fewer pixels with given kernels: :func:`carafe_d2.carafe_downsample` as a module.

    Args:
        kernel_size: side of the reassembly kernel, odd.
        group_size: number of channel groups, each with kernels of its own.
        scale_factor: downsampling ratio.

    Shapes:
        features (N, C, H, W) and masks (N, group_size * kernel_size**2, ceil(H / scale_factor),
        ceil(W / scale_factor)) give (N, C, ceil(H / scale_factor), ceil(W / scale_factor)).
    """

    _operator = staticmethod(carafe_downsample)


class CARAFEDownsamplePack(nn.Module):
    """The CARAFE++ downsampler: predicts a kernel for every output pixel and reassembles with it.

    A 1x1 convolution compresses the channels, a convolution with a stride over their neighborhood
    puts out a kernel for each of the fewer pixels, a softmax makes it sum to one, and every pixel
    becomes the sum of its neighborhood with these weights.

    Args:
        channels: channels of the input and of the output; a multiple of ``down_group``.
        scale_factor: downsampling ratio.
        down_kernel: side of the reassembly kernel, odd.
        down_group: number of channel groups with kernels of their own.
        encoder_kernel: side of the content encoder's convolution, odd.
        encoder_dilation: dilation of that convolution.
        compressed_channels: channels between compressor and encoder.

    Shapes:
        (N, channels, H, W) gives (N, channels, ceil(H / scale_factor), ceil(W / scale_factor)), the
        size that a convolution with that stride and half its kernel as padding gives.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        channels: int,
        scale_factor: int,
        down_kernel: int = 5,
        down_group: int = 1,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
        compressed_channels: int = 16,
    ):
        super().__init__()
        check_sizes(
            channels=channels,
            scale_factor=scale_factor,
            down_kernel=down_kernel,
            down_group=down_group,
            encoder_kernel=encoder_kernel,
            encoder_dilation=encoder_dilation,
            compressed_channels=compressed_channels,
        )
        if channels % down_group:
            raise ValueError(f"down_group must divide channels = {channels}, got {down_group}")
        self.channels = channels
        self.scale_factor = scale_factor
        self.down_kernel = down_kernel
        self.down_group = down_group

        self.channel_compressor = nn.Conv2d(channels, compressed_channels, kernel_size=1)
        self.content_encoder = nn.Conv2d(
            compressed_channels,
            down_group * down_kernel**2,
            kernel_size=encoder_kernel,
            stride=scale_factor,
            padding=encoder_dilation * (encoder_kernel - 1) // 2,
            dilation=encoder_dilation,
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Initializes as CARAFE: the tiny encoder makes all kernels start as a plain mean."""
        init_kernel_prediction(self.channel_compressor, self.content_encoder)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.content_encoder(self.channel_compressor(x))
        return carafe_downsample_softmax(
            x, logits, self.down_kernel, self.down_group, self.scale_factor
        )
