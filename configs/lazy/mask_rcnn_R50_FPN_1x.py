"""Baseline: Mask R-CNN with the plain feature pyramid and the deconvolution in the mask head."""

from .common.coco_schedule import lr_multiplier, optimizer
from .common.data.coco import dataloader
from .common.models.mask_rcnn_fpn import model
from .common.train import train

train.output_dir = "output/lazy/mask_rcnn_R50_FPN_1x"
