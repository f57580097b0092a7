#!/usr/bin/env python3
"""Trains and evaluates detectors with CARAFE from LazyConfigs, Detectron2's configs in Python.

    python tools/lazyconfig_train_net.py --num-gpus 8 \\
        --config-file configs/lazy/mask_rcnn_R50_FPN_carafe_1x.py \\
        train.max_iter=1000 model.backbone.upsampler.up_kernel=3

Differences from Detectron2's script of that name are those of ``train_net.py``.
"""

import contextlib

import torch
from detectron2.config import instantiate
from detectron2.engine import default_argument_parser, default_setup, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from carafe_d2 import CarafeCheckpointer
from carafe_d2.config import check_folder
from carafe_d2.data.build import check_datasets
from carafe_d2.data.checks import check_data
from carafe_d2.diagnosis import one_line, silence
from carafe_d2.engine import (
    build_checkpointer,
    build_trainer,
    launch,
    log_to,
    resume_or_load,
    share_buffers,
)
from carafe_d2.lazy_config import data_expectations, load_lazy_config


def build_model(cfg):
    model = instantiate(cfg.model).to(cfg.train.device)
    if cfg.train.get("channels_last"):
        model.to(memory_format=torch.channels_last)
    return model


def test(cfg, model):
    if "evaluator" not in cfg.dataloader:
        return {}
    share_buffers(model)
    results = inference_on_dataset(
        model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    )
    if comm.is_main_process():
        print_csv_format(results)
    return results


def trainer_of(cfg):
    model = build_model(cfg)
    cfg.optimizer.params.model = model
    return build_trainer(
        model,
        instantiate(cfg.dataloader.train),
        instantiate(cfg.optimizer),
        amp=cfg.train.amp.enabled,
        **cfg.train.ddp,
    )


def rehearse(cfg, *, training):
    """Does once what the program does with a config, writing nothing."""
    if not training:
        build_model(cfg)
        return
    with EventStorage() as storage:
        trainer = trainer_of(cfg)
        trainer.storage = storage
        trainer.run_step()


def train(cfg, trainer, resume):
    checkpointer = build_checkpointer(trainer, cfg.train.output_dir)
    is_main = comm.is_main_process()
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if is_main else None,
            hooks.EvalHook(cfg.train.eval_period, lambda: test(cfg, trainer.model)),
            hooks.PeriodicWriter(
                default_writers(cfg.train.output_dir, cfg.train.max_iter),
                period=cfg.train.log_period,
            )
            if is_main
            else None,
        ]
    )
    start_iter = resume_or_load(checkpointer, trainer, cfg.train.init_checkpoint, resume=resume)
    trainer.train(start_iter, cfg.train.max_iter)


def setup(args):
    """Builds the config from file and command line, and checks that its data is there."""
    cfg = load_lazy_config(args.config_file, args.opts, eval_only=args.eval_only)
    expected = data_expectations(cfg)
    trained = () if args.eval_only else expected.DATASETS.TRAIN
    check_datasets((*trained, *expected.DATASETS.TEST))
    check_folder("train.output_dir", cfg.train.output_dir)
    default_setup(cfg, args)
    log_to(cfg.train.output_dir)
    check_data(expected, training=not args.eval_only)
    return cfg


def main(args):
    def attempt(overrides):
        cfg = load_lazy_config(args.config_file, overrides, eval_only=args.eval_only)
        rehearse(cfg, training=not args.eval_only)

    with one_line(lambda cause: explain(cause, args.opts, attempt)):
        cfg = setup(args)
        model = build_model(cfg) if args.eval_only else None
        trainer = None if args.eval_only else trainer_of(cfg)
    if trainer:
        train(cfg, trainer, args.resume)
        return
    CarafeCheckpointer(model, save_dir=cfg.train.output_dir).resume_or_load(
        cfg.train.init_checkpoint, resume=args.resume
    )
    test(cfg, model)


def explain(cause, overrides, attempt):
    """The override without which an attempt succeeds, and why it fails with it."""
    for i in reversed(range(len(overrides))):
        with silence(), contextlib.suppress(Exception):
            attempt([*overrides[:i], *overrides[i + 1 :]])
            return f"{overrides[i]}: {cause}; without it, it works"
    return None


if __name__ == "__main__":
    launch(main, default_argument_parser().parse_args())
