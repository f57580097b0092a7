"""The optimizer and the learning rate schedule that a config describes."""

import logging

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from detectron2.solver import build_lr_scheduler as build_detectron2_lr_scheduler
from detectron2.solver import build_optimizer as build_sgd
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from fvcore.common.param_scheduler import PolynomialDecayParamScheduler
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from .errors import UserError

logger = logging.getLogger(__name__)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Builds the optimizer from the keys under SOLVER, those of Detectron2 and two more values.

    SOLVER.OPTIMIZER is "SGD" or "AdamW". SOLVER.CLIP_GRADIENTS.CLIP_TYPE is, beside Detectron2's
    "value" and "norm", "full_model": the gradients of all parameters together are scaled to a norm
    of at most CLIP_VALUE.

    Raises:
        UserError: SOLVER.OPTIMIZER is unknown.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    clip_full_model = clip.ENABLED and clip.CLIP_TYPE == "full_model"
    if clip_full_model:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False

    if cfg.SOLVER.OPTIMIZER == "SGD":
        optimizer = build_sgd(cfg, model)
    elif cfg.SOLVER.OPTIMIZER == "AdamW":
        params = get_default_optimizer_params(
            model, base_lr=cfg.SOLVER.BASE_LR, weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM
        )
        optimizer = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(
            params, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY, fused=True
        )
    else:
        raise UserError(f"SOLVER.OPTIMIZER must be SGD or AdamW, got {cfg.SOLVER.OPTIMIZER!r}")

    if clip_full_model:
        _clip_full_model(optimizer, clip.CLIP_VALUE, clip.NORM_TYPE)
    return optimizer


def _clip_full_model(optimizer: torch.optim.Optimizer, max_norm: float, norm_type: float) -> None:
    def clip_gradients(optimizer, args, kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)

    optimizer.register_step_pre_hook(clip_gradients)


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Builds the learning rate schedule from the keys under SOLVER, Detectron2's and one more.

    With SOLVER.LR_SCHEDULER_NAME "WarmupPolyLR", in iteration i of n the learning rate is its
    initial value times ``(1 - i / n) ** SOLVER.POLY_LR_POWER``, after a warm-up like Detectron2's.

    Raises:
        UserError: SOLVER.POLY_LR_POWER is not positive.
    """
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME != "WarmupPolyLR":
        return build_detectron2_lr_scheduler(cfg, optimizer)
    if solver.POLY_LR_POWER <= 0:
        raise UserError(f"SOLVER.POLY_LR_POWER must be positive, got {solver.POLY_LR_POWER}")
    multiplier = WarmupParamScheduler(
        PolynomialDecayParamScheduler(1.0, solver.POLY_LR_POWER),
        solver.WARMUP_FACTOR,
        min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
        solver.WARMUP_METHOD,
    )
    return LRMultiplier(optimizer, multiplier, max_iter=solver.MAX_ITER)


# The keys under SOLVER that set a value in an optimizer's groups of another name.
_KEYS = {"initial_lr": "BASE_LR"}


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict]:
    """The hyperparameters of each parameter group, to be kept by :func:`keep_settings`."""
    return [
        {key: value for key, value in group.items() if key not in ("params", "lr")}
        for group in optimizer.param_groups
    ]


def keep_settings(
    optimizer: torch.optim.Optimizer, scheduler: LRScheduler, settings: list[dict]
) -> None:
    """Gives a resumed optimizer the hyperparameters of the config rather than its checkpoint's.

    Loading an optimizer's state overwrites them, and a changed SOLVER.BASE_LR would do nothing.

    Args:
        optimizer: with the state of the checkpoint.
        scheduler: its learning rate scheduler, likewise.
        settings: what :func:`settings_of` gave before the checkpoint was loaded.

    Raises:
        UserError: the checkpoint is of another optimizer.
    """
    changed = {}
    for group, wanted in zip(optimizer.param_groups, settings, strict=True):
        if ("betas" in group) != ("betas" in wanted):
            raise UserError(
                "the training to resume has another optimizer; set SOLVER.OPTIMIZER to that, or "
                "start anew with MODEL.WEIGHTS"
            )
        for key in group.keys() & wanted.keys():
            if group[key] != wanted[key]:
                changed[f"SOLVER.{_KEYS.get(key, key.upper())}"] = f"{group[key]} to {wanted[key]}"
                group[key] = wanted[key]
    if not changed:
        return
    for key, change in sorted(changed.items()):
        logger.warning(f"Resuming with {key} changed from {change}.")
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    for group, lr in zip(optimizer.param_groups, scheduler.get_lr(), strict=True):
        group["lr"] = lr
