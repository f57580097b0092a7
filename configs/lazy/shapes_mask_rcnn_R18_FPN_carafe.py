"""The quick start: a small Mask R-CNN with CARAFE in pyramid and mask head that learns the built-in
`shapes` dataset from random weights within minutes on two CPU cores."""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from .mask_rcnn_R50_FPN_carafe_1x import dataloader, model, optimizer, train

model.backbone.bottom_up.stem.norm = model.backbone.bottom_up.stages.norm = "BN"
model.backbone.bottom_up.stages.depth = 18
del model.backbone.bottom_up.stages.stride_in_1x1  # its blocks have no 1x1
model.backbone.bottom_up.freeze_at = 0  # nothing is pre-trained, so nothing is frozen and BN learns
model.backbone.out_channels = 64
model.backbone.norm = "BN"
model.proposal_generator.anchor_generator.sizes = [[32], [64], [96], [128], [192]]
model.proposal_generator.pre_nms_topk = model.proposal_generator.post_nms_topk = (100, 100)
model.roi_heads.num_classes = 6
model.roi_heads.batch_size_per_image = 24
model.roi_heads.positive_fraction = 0.5  # only positives teach the mask head
model.roi_heads.box_pooler.sampling_ratio = 2  # RoIAlign's gradient has one thread on the CPU
model.roi_heads.box_head.fc_dims = [256, 256]
model.roi_heads.box_predictor.test_topk_per_image = 20
model.roi_heads.mask_pooler.sampling_ratio = 1
model.roi_heads.mask_head.conv_dims = [64, 64, 64]

dataloader.train.dataset.names = "shapes_train"
dataloader.test.dataset.names = "shapes_val"
dataloader.train.mapper.instance_mask_format = "bitmask"  # masks with holes are RLE
dataloader.train.mapper.augmentations[0].short_edge_length = (128,)
dataloader.test.mapper.augmentations[0].short_edge_length = 128
dataloader.train.total_batch_size = 8
# The images are small; a worker would take one of two cores from the training.
dataloader.train.num_workers = 0

# learns faster from random weights than SGD does
optimizer = L(torch.optim.AdamW)(params=optimizer.params, lr=0.002, weight_decay=0.05, fused=True)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1, end_value=0),
    warmup_factor=0.001,
    warmup_length=100 / 650,
    warmup_method="linear",
)
train.init_checkpoint = ""
train.max_iter = 650
train.seed = 1
train.channels_last = True  # an eighth faster on the CPU
train.checkpointer.period = 200
train.output_dir = "output/lazy/shapes_mask_rcnn_R18_FPN_carafe"
