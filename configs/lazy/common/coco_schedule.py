"""The 1x schedule: 12 epochs of 7330 iterations, a tenth after the 8th and after the 11th."""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler

optimizer = L(torch.optim.SGD)(
    # The training script puts the model in.
    params=L(get_default_optimizer_params)(base_lr="${..lr}", weight_decay_norm=0.0),
    lr=0.02,
    momentum=0.9,
    weight_decay=1e-4,
)

# Another train.max_iter stretches it.
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.1**2], milestones=[58640, 80630], num_updates=87960
    ),
    warmup_factor=0.001,
    warmup_length=500 / 87960,
    warmup_method="linear",
)
