"""Baseline: Faster R-CNN with the plain feature pyramid."""

from .mask_rcnn_R50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

for part in ("mask_in_features", "mask_pooler", "mask_head"):
    del model.roi_heads[part]
dataloader.train.mapper.use_instance_mask = False
train.output_dir = "output/lazy/faster_rcnn_R50_FPN_1x"
