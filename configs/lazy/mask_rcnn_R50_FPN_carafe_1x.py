"""Mask R-CNN with CARAFE in the feature pyramid and in the mask head; 1000 test proposals."""

from carafe_d2 import CarafeFPN, MaskRCNNCarafeUpsampleHead

from .mask_rcnn_R50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

model.backbone._target_ = CarafeFPN
model.backbone.upsampler = dict(name="carafe")
del model.backbone.top_block  # this pyramid makes p6 itself
model.roi_heads.mask_head._target_ = MaskRCNNCarafeUpsampleHead
model.roi_heads.mask_head.upsampler = dict(name="carafe")
train.output_dir = "output/lazy/mask_rcnn_R50_FPN_carafe_1x"
