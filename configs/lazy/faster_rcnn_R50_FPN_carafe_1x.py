"""Faster R-CNN with CARAFE in the feature pyramid; 1000 test proposals."""

from carafe_d2 import CarafeFPN

from .faster_rcnn_R50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

model.backbone._target_ = CarafeFPN
model.backbone.upsampler = dict(name="carafe")
del model.backbone.top_block  # this pyramid makes p6 itself
train.output_dir = "output/lazy/faster_rcnn_R50_FPN_carafe_1x"
