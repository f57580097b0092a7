"""Mask R-CNN with CARAFE in pyramid and mask head as published in 2019."""

from .common.models.published_2019 import as_published_in_2019
from .mask_rcnn_R50_FPN_carafe_1x import dataloader, lr_multiplier, model, optimizer, train

as_published_in_2019(model, optimizer, lr_multiplier)
train.output_dir = "output/lazy/mask_rcnn_R50_FPN_carafe_1x_2019"
