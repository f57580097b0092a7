import pytest
import torch
from detectron2.config import get_cfg
from torch import nn

from carafe_d2 import add_carafe_config
from carafe_d2.errors import UserError
from carafe_d2.solver import build_lr_scheduler, build_optimizer


def config(*overrides):
    cfg = get_cfg()
    add_carafe_config(cfg)
    cfg.merge_from_list(["SOLVER.BASE_LR", "1.0", "SOLVER.MOMENTUM", "0.0", *overrides])
    return cfg


def step(cfg, gradients):
    """How far one optimizer step moves two scalar weights with the given gradients."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in gradients])
    optimizer = build_optimizer(cfg, model)
    for parameter, gradient in zip(model, gradients, strict=True):
        parameter.grad = torch.tensor([gradient])
    optimizer.step()
    return [-parameter.item() for parameter in model]


CLIP = ["SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "1.0"]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([], [3.0, 4.0]),
        ([*CLIP, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value"], [1.0, 1.0]),
        ([*CLIP, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"], [1.0, 1.0]),
        ([*CLIP, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"], [0.6, 0.8]),
    ],
    ids=["none", "value", "norm", "full_model"],
)
def test_gradient_clipping(keys, expected):
    assert step(config(*keys), [3.0, 4.0]) == pytest.approx(expected, rel=1e-5)


def test_full_model_clipping_leaves_small_gradients_alone():
    cfg = config(*CLIP, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model")
    assert step(cfg, [0.3, 0.4]) == pytest.approx([0.3, 0.4])


def test_adamw():
    cfg = config("SOLVER.OPTIMIZER", "AdamW")
    assert isinstance(build_optimizer(cfg, nn.Linear(2, 2)), torch.optim.AdamW)
    # Its first step is the learning rate in the direction of the gradient.
    assert step(cfg, [3.0, -4.0]) == pytest.approx([1.0, -1.0])


def test_unknown_optimizer_is_named():
    with pytest.raises(UserError, match=r"SOLVER\.OPTIMIZER must be SGD or AdamW, got 'Adam'"):
        build_optimizer(config("SOLVER.OPTIMIZER", "Adam"), nn.Linear(2, 2))


@pytest.mark.parametrize(("warmup", "at_5"), [(0, 0.95**0.5), (10, 0.5 * 0.9**0.5)])
def test_polynomial_schedule(warmup, at_5):
    """Also after a warm-up it falls as if there had been none, which ends at its value."""
    cfg = config("SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.POLY_LR_POWER", "0.5")
    cfg.merge_from_list(["SOLVER.MAX_ITER", "100", "SOLVER.WARMUP_ITERS", str(warmup)])
    cfg.SOLVER.WARMUP_FACTOR = 0.0
    scheduler = build_lr_scheduler(cfg, torch.optim.SGD([torch.zeros(1)], lr=1.0))
    expected = {0: 0.0 if warmup else 1.0, 5: at_5, 10: 0.9**0.5, 75: 0.5, 100: 0.0}
    for iteration, rate in expected.items():
        scheduler.last_epoch = iteration
        assert scheduler.get_lr() == pytest.approx([rate]), iteration


def test_wrong_power_is_named():
    cfg = config("SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.POLY_LR_POWER", "0.0")
    with pytest.raises(UserError, match=r"SOLVER\.POLY_LR_POWER must be positive, got 0\.0"):
        build_lr_scheduler(cfg, torch.optim.SGD([torch.zeros(1)], lr=1.0))
