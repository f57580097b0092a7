"""The same model with 2000 test proposals."""

from .faster_rcnn_R50_FPN_carafe_1x import dataloader, lr_multiplier, model, optimizer, train

model.proposal_generator.pre_nms_topk = (2000, 2000)
model.proposal_generator.post_nms_topk = (1000, 2000)
train.output_dir = "output/lazy/faster_rcnn_R50_FPN_carafe_1x_2000"
