"""What the models published in 2019 have of their own: geometry and recipe of MMDetection 1.x."""

import torch

from carafe_d2 import LegacyAnchorGenerator, LegacyRCNN
from carafe_d2.solver import clipped_optimizer


def as_published_in_2019(model, optimizer, lr_multiplier):
    """Changes an R-CNN with CARAFE; carafe_d2/legacy.py says what that geometry is."""
    model._target_ = LegacyRCNN
    rpn, roi_heads = model.proposal_generator, model.roi_heads
    rpn.anchor_generator._target_ = LegacyAnchorGenerator
    rpn.anchor_generator.offset = 0.5  # anchors in the middle of their cell
    rpn.post_nms_topk = (2000, 1000)
    rpn.anchor_boundary_thresh = 0  # anchors that cross the image's border are not trained
    rpn.smooth_l1_beta = 1 / 9
    roi_heads.box_predictor.smooth_l1_beta = 1.0
    for pooler in roi_heads.keys() & {"box_pooler", "mask_pooler"}:
        roi_heads[pooler].pooler_type = "ROIAlign"  # half a pixel beside ROIAlignV2
        roi_heads[pooler].sampling_ratio = 2

    lr_multiplier.warmup_factor = 1 / 3
    optimizer._target_ = clipped_optimizer
    optimizer.optimizer_class = torch.optim.SGD
    optimizer.max_norm = 35.0  # of all gradients together
