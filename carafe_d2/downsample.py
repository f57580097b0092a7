"""The downsampling half of CARAFE++ (Wang et al., TPAMI 2021, arXiv 2012.04733) as modules.

Nothing here needs Detectron2.
"""

from torch import Tensor

from .ops import carafe_downsample, carafe_downsample_softmax
from .upsample import CARAFE, KernelPrediction, check_options, check_sizes


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


class CARAFEDownsamplePack(KernelPrediction):
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
        compressed_channels: channels between compressor and encoder; 0 leaves out the compressor.
        normalizer: what makes weights of the encoder's output, as in :class:`CARAFEPack`.

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
        normalizer: str = "softmax",
    ):
        check_sizes(channels=channels, scale_factor=scale_factor)
        check_options(
            normalizer,
            compressed_channels,
            down_kernel=down_kernel,
            down_group=down_group,
            encoder_kernel=encoder_kernel,
            encoder_dilation=encoder_dilation,
        )
        if channels % down_group:
            raise ValueError(f"down_group must divide channels = {channels}, got {down_group}")
        super().__init__(
            channels,
            down_kernel,
            down_group,
            encoder_kernel,
            encoder_dilation,
            compressed_channels,
            normalizer,
            stride=scale_factor,
        )
        self.scale_factor = scale_factor
        self.down_kernel = down_kernel
        self.down_group = down_group

    def forward(self, x: Tensor) -> Tensor:
        fused, kernels = self.predict(x)
        operator = carafe_downsample_softmax if fused else carafe_downsample
        return operator(x, kernels, self.down_kernel, self.down_group, self.scale_factor)
