"""RetinaNet with CARAFE in the feature pyramid, p3..p7."""

from carafe_d2 import CarafeFPN

from .retinanet_R50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

model.backbone._target_ = CarafeFPN
model.backbone.upsampler = dict(name="carafe")
model.backbone.num_extra_levels = 2  # p6 and p7
del model.backbone.top_block
train.output_dir = "output/lazy/retinanet_R50_FPN_carafe_1x"
