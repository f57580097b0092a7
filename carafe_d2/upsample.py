"""Upsampling modules: CARAFE and the methods its paper compares it with, built by name.

Nothing here needs Detectron2.
"""

from collections.abc import Callable
from numbers import Integral
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

from .ops import carafe, carafe_upsample
from .reference import carafe_naive


def check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, Integral) or size < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")
        if ("kernel" in name or name.startswith("k_")) and size % 2 == 0:
            raise ValueError(f"{name} must be odd, got {size}")


def xavier_init(
    module: nn.Module, gain: float = 1, bias: float = 0, distribution: str = "normal"
) -> None:
    """Xavier initialization as ``mmcv.ops.carafe.xavier_init``: the weight, and a constant bias.

    Args:
        module: its ``weight`` and ``bias`` are filled, so far as it has them.
        gain: factor of the weights' deviation.
        bias: value of the bias.
        distribution: "normal" or "uniform".

    Raises:
        ValueError: the distribution is neither.
    """
    fill = {"normal": nn.init.xavier_normal_, "uniform": nn.init.xavier_uniform_}
    if distribution not in fill:
        raise ValueError(f"distribution must be normal or uniform, got {distribution!r}")
    _fill(module, lambda weight: fill[distribution](weight, gain=gain), bias)


def normal_init(module: nn.Module, mean: float = 0, std: float = 1, bias: float = 0) -> None:
    """Normal initialization as ``mmcv.ops.carafe.normal_init``: the weight, and a constant bias.

    Args:
        module: its ``weight`` and ``bias`` are filled, so far as it has them.
        mean, std: mean and standard deviation of the weights.
        bias: value of the bias.
    """
    _fill(module, lambda weight: nn.init.normal_(weight, mean, std), bias)


def _fill(module: nn.Module, fill_weight: Callable[[Tensor], object], bias: float) -> None:
    if (weight := getattr(module, "weight", None)) is not None:
        fill_weight(weight)
    if (biases := getattr(module, "bias", None)) is not None:
        nn.init.constant_(biases, bias)


class CARAFE(nn.Module):
    """Reassembles features with given kernels: the operator :func:`carafe_d2.carafe` as a module.

    Args:
        kernel_size: side of the reassembly kernel, odd.
        group_size: number of channel groups, each with kernels of its own.
        scale_factor: upsampling ratio.

    Shapes:
        features (N, C, H, W) and masks (N, group_size * kernel_size**2, scale_factor * H,
        scale_factor * W) give (N, C, scale_factor * H, scale_factor * W).
    """

    _operator = staticmethod(carafe)

    def __init__(self, kernel_size: int, group_size: int, scale_factor: int):
        super().__init__()
        self.kernel_size = kernel_size
        self.group_size = group_size
        self.scale_factor = scale_factor

    def forward(self, features: Tensor, masks: Tensor) -> Tensor:
        return self._operator(features, masks, self.kernel_size, self.group_size, self.scale_factor)

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, group_size={self.group_size}, "
            f"scale_factor={self.scale_factor}"
        )


class CARAFENaive(CARAFE):
    """:class:`CARAFE` computed by its definition in plain PyTorch: slow, but runs anywhere."""

    _operator = staticmethod(carafe_naive)


NORMALIZERS = ("softmax", "sigmoid", "normalized_sigmoid", "none")


def check_options(normalizer: str, compressed_channels: int, **sizes: int) -> None:
    """Checks the arguments of :class:`CARAFEPack` and its like that do not depend on the map.

    Raises:
        ValueError: one is out of its range; the message names it.
    """
    check_sizes(**sizes)
    if compressed_channels != 0:
        check_sizes(compressed_channels=compressed_channels)
    if normalizer not in NORMALIZERS:
        names = ", ".join(NORMALIZERS)
        raise ValueError(f"normalizer must be one of {names}, got {normalizer!r}")


class KernelPrediction(nn.Module):
    """The kernel prediction module (paper, section 3.2), which up- and downsampling share.

    A 1x1 convolution ``channel_compressor``, and a convolution ``content_encoder`` whose output
    the normalizer makes kernels of.

    Args:
        channels: of the input.
        kernel, group: side of the reassembly kernels, and how many each pixel has.
        encoder_kernel, encoder_dilation, compressed_channels, normalizer: as in
            :class:`CARAFEPack`.
        scale: output pixels that a location of the encoder's output has along either axis.
        stride: of the encoder.
    """

    def __init__(
        self,
        channels: int,
        kernel: int,
        group: int,
        encoder_kernel: int,
        encoder_dilation: int,
        compressed_channels: int,
        normalizer: str,
        scale: int = 1,
        stride: int = 1,
    ):
        super().__init__()
        self.channels = channels
        self.encoder_kernel = encoder_kernel
        self.encoder_dilation = encoder_dilation
        self.compressed_channels = compressed_channels
        self.normalizer = normalizer
        self._kernel_shape = group, kernel**2
        self._scale = scale

        self.channel_compressor: nn.Module = nn.Identity()
        if compressed_channels:
            self.channel_compressor = nn.Conv2d(channels, compressed_channels, kernel_size=1)
        self.content_encoder = nn.Conv2d(
            compressed_channels or channels,
            group * kernel**2 * scale**2,
            kernel_size=encoder_kernel,
            stride=stride,
            padding=encoder_dilation * (encoder_kernel - 1) // 2,
            dilation=encoder_dilation,
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Initializes as published: the tiny encoder makes all kernels start as a plain mean."""
        xavier_init(self.channel_compressor, distribution="uniform")
        normal_init(self.content_encoder, std=0.001)

    def predict(self, x: Tensor) -> tuple[bool, Tensor]:
        """What the operators take: whether it is logits of a softmax, and these or the masks."""
        logits = self.content_encoder(self.channel_compressor(x))
        if self.normalizer in ("sigmoid", "none"):
            return False, self.masks(logits)
        if self.normalizer == "normalized_sigmoid":
            logits = F.logsigmoid(logits)  # the softmax of these is what is asked for
        return True, logits

    def masks(self, logits: Tensor) -> Tensor:
        """The kernels that an output of ``content_encoder`` stands for.

        Args:
            logits: (N, channels, H, W), the output.

        Returns:
            (N, channels / scale**2, scale * H, scale * W), as :func:`carafe_d2.carafe` or
            :func:`carafe_d2.carafe_downsample` takes them; scale is one in downsampling.
        """
        masks = _pixel_shuffle(logits, self._scale)
        if self.normalizer == "none":
            return masks
        if self.normalizer == "sigmoid":
            return masks.sigmoid()
        if self.normalizer == "normalized_sigmoid":
            masks = F.logsigmoid(masks)
        return masks.unflatten(1, self._kernel_shape).softmax(2).flatten(1, 2)


class CARAFEPack(KernelPrediction):
    """The CARAFE upsampler: predicts a kernel for every output pixel and reassembles with it.

    Kernel prediction module (paper, section 3.2): a 1x1 convolution compresses the channels, a
    convolution over their neighborhood puts out the kernels of ``scale_factor**2`` output pixels
    for each location, and a softmax makes every kernel sum to one. The content-aware reassembly
    module (section 3.3) applies them. The other normalizers, and no compressor, are the variants
    of the paper's ablation study.

    Args:
        channels: channels of the input and of the output; a multiple of ``up_group``.
        scale_factor: upsampling ratio.
        up_kernel: side of the reassembly kernel, odd (k_up).
        up_group: number of channel groups with kernels of their own.
        encoder_kernel: side of the content encoder's convolution, odd (k_encoder).
        encoder_dilation: dilation of that convolution.
        compressed_channels: channels between compressor and encoder (C_m); 0 leaves out the
            compressor.
        normalizer: what makes weights of the encoder's output, one of ``NORMALIZERS``: "softmax",
            "sigmoid", "normalized_sigmoid" (the sigmoids of a kernel, divided by their sum) or
            "none". Only with the first and the third does a kernel sum to one.

    Shapes:
        (N, channels, H, W) gives (N, channels, scale_factor * H, scale_factor * W).

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        channels: int,
        scale_factor: int,
        up_kernel: int = 5,
        up_group: int = 1,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
        compressed_channels: int = 64,
        normalizer: str = "softmax",
    ):
        check_sizes(channels=channels, scale_factor=scale_factor)
        check_options(
            normalizer,
            compressed_channels,
            up_kernel=up_kernel,
            up_group=up_group,
            encoder_kernel=encoder_kernel,
            encoder_dilation=encoder_dilation,
        )
        if channels % up_group:
            raise ValueError(f"up_group must divide channels = {channels}, got {up_group}")
        super().__init__(
            channels,
            up_kernel,
            up_group,
            encoder_kernel,
            encoder_dilation,
            compressed_channels,
            normalizer,
            scale=scale_factor,
        )
        self.scale_factor = scale_factor
        self.up_kernel = up_kernel
        self.up_group = up_group

    def forward(self, x: Tensor) -> Tensor:
        return self.reassemble(x, *self.predict(x))

    def reassemble(self, x: Tensor, fused: bool, kernels: Tensor) -> Tensor:
        """Upsamples a map with kernels that may have been predicted from another one.

        Args:
            x: (N, C, H, W); C need not be ``channels``, but a multiple of ``up_group``.
            fused, kernels: what :meth:`predict` gives.

        Returns:
            (N, C, scale_factor * H, scale_factor * W).
        """
        operator = carafe_upsample if fused else carafe
        return operator(x, kernels, self.up_kernel, self.up_group, self.scale_factor)


def _pixel_shuffle(x: Tensor, scale: int) -> Tensor:
    """``F.pixel_shuffle``, whose gradient fails for empty batches."""
    x = x.unflatten(1, (-1, scale, scale)).permute(0, 1, 4, 2, 5, 3)
    return x.flatten(4, 5).flatten(2, 3)


class _UncountedParameter(UninitializedParameter):
    """One that libraries can count before its size is known, as Ultralytics does: as nothing."""

    def numel(self) -> int:
        return 0


class LazyCARAFEPack(LazyModuleMixin, CARAFEPack):  # type: ignore[misc]
    """A :class:`CARAFEPack` that takes ``channels`` from its first input.

    A lazy module as PyTorch has them, e.g. :class:`torch.nn.LazyConv2d`: until the first forward,
    or until a state dict is loaded, the compressor's parameters are uninitialized. The first
    forward makes it a :class:`CARAFEPack`.

    Args:
        scale_factor, up_kernel, up_group, encoder_kernel, encoder_dilation, compressed_channels,
            normalizer: as in :class:`CARAFEPack`, but there has to be a compressor.

    Raises:
        ValueError: an argument is out of its range; the message names it.
        RuntimeError: of the first forward, where ``up_group`` does not divide the channels.
    """

    cls_to_become = CARAFEPack  # type: ignore[assignment]

    def __init__(
        self,
        scale_factor: int = 2,
        up_kernel: int = 5,
        up_group: int = 1,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
        compressed_channels: int = 64,
        normalizer: str = "softmax",
    ):
        check_sizes(up_group=up_group, compressed_channels=compressed_channels)
        super().__init__(
            channels=up_group,  # any that fits
            scale_factor=scale_factor,
            up_kernel=up_kernel,
            up_group=up_group,
            encoder_kernel=encoder_kernel,
            encoder_dilation=encoder_dilation,
            compressed_channels=compressed_channels,
            normalizer=normalizer,
        )
        self.channels = 0  # as in_channels of PyTorch's lazy convolutions
        self.channel_compressor = nn.LazyConv2d(compressed_channels, kernel_size=1)
        self.channel_compressor.weight = _UncountedParameter()
        self.channel_compressor.bias = _UncountedParameter()

    def initialize_parameters(self, x: Tensor) -> None:  # type: ignore[override]
        """Called before the first forward, with its input."""
        compressor = self.channel_compressor
        assert isinstance(compressor, nn.Conv2d)
        # With a state dict loaded before, it is initialized, and lazy all the same.
        if isinstance(compressor, nn.LazyConv2d) and compressor.has_uninitialized_params():
            compressor.initialize_parameters(x)
            xavier_init(compressor, distribution="uniform")
        self.channels = compressor.in_channels = compressor.weight.shape[1]


class PixelShufflePack(nn.Module):
    """Sub-pixel convolution (Shi et al., CVPR 2016): a convolution, then a pixel shuffle.

    Args:
        channels: channels of the input and of the output.
        scale_factor: upsampling ratio.
        kernel_size: side of the convolution, odd.

    Shapes:
        (N, channels, H, W) gives (N, channels, scale_factor * H, scale_factor * W).

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    def __init__(self, channels: int, scale_factor: int, kernel_size: int = 3):
        super().__init__()
        check_sizes(channels=channels, scale_factor=scale_factor, kernel_size=kernel_size)
        self.scale_factor = scale_factor
        self.upsample_conv = nn.Conv2d(
            channels, channels * scale_factor**2, kernel_size, padding=(kernel_size - 1) // 2
        )
        xavier_init(self.upsample_conv, distribution="uniform")

    def forward(self, x: Tensor) -> Tensor:
        return _pixel_shuffle(self.upsample_conv(x), self.scale_factor)


def _deconv(channels: int, scale_factor: int, kernel_size: int = 3) -> nn.ConvTranspose2d:
    """A transposed convolution that puts out exactly ``scale_factor`` times the input's size."""
    padding = (kernel_size - scale_factor + 1) // 2
    output_padding = 2 * padding + scale_factor - kernel_size
    if padding < 0 or output_padding >= scale_factor:
        raise ValueError(f"kernel_size {kernel_size} cannot upsample exactly by {scale_factor}")
    deconv = nn.ConvTranspose2d(
        channels,
        channels,
        kernel_size,
        stride=scale_factor,
        padding=padding,
        output_padding=output_padding,
    )
    xavier_init(deconv, distribution="uniform")
    return deconv


UPSAMPLERS: dict[str, Callable[..., nn.Module]] = {
    "carafe": CARAFEPack,
    "nearest": lambda channels, scale_factor: nn.Upsample(scale_factor=scale_factor),
    "bilinear": lambda channels, scale_factor: nn.Upsample(
        scale_factor=scale_factor, mode="bilinear", align_corners=False
    ),
    "deconv": _deconv,
    "pixel_shuffle": PixelShufflePack,
}


def build_upsampler(name: str, channels: int, scale_factor: int = 2, **options: Any) -> nn.Module:
    """Builds an upsampler that keeps the number of channels.

    Args:
        name: one of ``UPSAMPLERS``: carafe, nearest, bilinear, deconv, pixel_shuffle.
        channels: channels of the input and of the output.
        scale_factor: upsampling ratio.
        **options: further arguments of that upsampler, e.g. those of :class:`CARAFEPack`.

    Returns:
        A module from (N, channels, H, W) to (N, channels, scale_factor * H, scale_factor * W).

    Raises:
        ValueError: the name is unknown, or an option is out of its range.
    """
    if name not in UPSAMPLERS:
        raise ValueError(f"upsampler must be one of {', '.join(UPSAMPLERS)}, got {name!r}")
    check_sizes(channels=channels, scale_factor=scale_factor)
    return UPSAMPLERS[name](channels, scale_factor, **options)
