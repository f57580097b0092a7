"""Mask head with a choice of upsamplers."""

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead

from .config import upsampler_options, with_carafe_config
from .errors import UserError
from .upsample import UPSAMPLERS, build_upsampler


@ROI_MASK_HEAD_REGISTRY.register()
class MaskRCNNCarafeUpsampleHead(MaskRCNNConvUpsampleHead):
    """Detectron2's mask head with another upsampler in place of its deconvolution.

    As published, no ReLU follows that upsampler. With "deconv" this is the stock head, ReLU and
    parameter names included.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        conv_dims: list[int],
        upsampler: dict | None = None,
        **kwargs,
    ):
        """
        Args:
            input_shape: shape of the pooled features.
            conv_dims: channels of the 3x3 convolutions and, last, of the upsampled features;
                only the deconvolution can change the number of channels.
            upsampler: arguments of :func:`carafe_d2.build_upsampler`; default is CARAFE's.
            **kwargs: see :class:`detectron2.modeling.roi_heads.mask_head.MaskRCNNConvUpsampleHead`.

        Raises:
            ValueError: the last of conv_dims differs from the channels before the upsampler.
        """
        super().__init__(input_shape, conv_dims=conv_dims, **kwargs)
        upsampler = upsampler or {"name": "carafe"}
        if upsampler["name"] == "deconv":
            return
        channels = [input_shape.channels, *conv_dims][-2]
        if conv_dims[-1] != channels:
            raise ValueError(
                f"upsampler {upsampler['name']!r} keeps the {channels} channels it is given, "
                f"but conv_dims asks for {conv_dims[-1]} after it"
            )
        # The head runs its children in order, so the predictor has to be put behind the upsampler.
        predictor = self.predictor
        del self.deconv, self.deconv_relu, self.predictor
        self.upsample = build_upsampler(channels=channels, **upsampler)
        self.add_module("predictor", predictor)

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec) -> dict:
        cfg = with_carafe_config(cfg)
        ret = super().from_config(cfg, input_shape)
        channels = [input_shape.channels, *ret["conv_dims"]][-2]
        ret["upsampler"] = upsampler_options(
            cfg, "ROI_MASK_HEAD.UPSAMPLE", list(UPSAMPLERS), channels
        )
        if ret["upsampler"]["name"] != "deconv" and ret["conv_dims"][-1] != channels:
            raise UserError(
                f"MODEL.ROI_MASK_HEAD.CONV_DIM = {ret['conv_dims'][-1]} must equal the {channels} "
                "channels of the pooled features when NUM_CONV is 0 and UPSAMPLE is not deconv"
            )
        return ret
