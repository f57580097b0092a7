"""Baseline: RetinaNet with the plain feature pyramid, p3..p7."""

from .common.coco_schedule import lr_multiplier, optimizer
from .common.data.coco import dataloader
from .common.models.retinanet import model
from .common.train import train

dataloader.train.mapper.use_instance_mask = False
optimizer.lr = 0.01
train.output_dir = "output/lazy/retinanet_R50_FPN_1x"
