#!/usr/bin/env python3
"""Trains and evaluates detectors with CARAFE; the command line is that of Detectron2's scripts.

Differences from Detectron2's ``tools/train_net.py``: CARAFE's config keys and modules, a data
loader that resumes exactly, the CPU when there is no GPU, processes started by torchrun beside
those that ``--num-gpus`` starts, and one clear line for a user's mistake.
"""

import os

import torch
from detectron2.engine import (
    DefaultTrainer,
    TrainerBase,
    default_argument_parser,
    default_setup,
)
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from carafe_d2 import CarafeCheckpointer
from carafe_d2.config import load_config
from carafe_d2.data.build import build_test_loader, build_train_loader, check_datasets
from carafe_d2.engine import (
    build_checkpointer,
    build_trainer,
    launch,
    resume_or_load,
    share_buffers,
)
from carafe_d2.evaluation import build_evaluator, check_evaluators
from carafe_d2.solver import build_optimizer


class Trainer(DefaultTrainer):
    """Detectron2's trainer with CARAFE's checkpointer and a data loader that resumes exactly."""

    def __init__(self, cfg):
        TrainerBase.__init__(self)  # DefaultTrainer's lets several processes train on GPUs only
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        self._trainer = build_trainer(
            model, data_loader, optimizer, amp=cfg.SOLVER.AMP.ENABLED, broadcast_buffers=False
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = build_checkpointer(self, cfg.OUTPUT_DIR)
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        if cfg.MODEL.CHANNELS_LAST:
            model.to(memory_format=torch.channels_last)
        return model

    @classmethod
    def build_optimizer(cls, cfg, model):
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        return build_evaluator(dataset_name, output_folder)

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        share_buffers(model)
        return super().test(cfg, model, evaluators)

    def resume_or_load(self, resume=True):
        self.start_iter = resume_or_load(
            self.checkpointer, self, self.cfg.MODEL.WEIGHTS, resume=resume
        )

    def state_dict(self):
        # The trainer inside holds optimizer and gradient scaler; Detectron2 0.6 leaves them out.
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        if "_trainer" in state_dict:  # checkpoints of Detectron2's own trainers may lack it
            self._trainer.load_state_dict(state_dict["_trainer"])


def setup(args):
    """Builds the config from file and command line, and checks that its data is there."""
    cfg = load_config(args.config_file, args.opts)
    check_datasets(cfg.DATASETS.TEST if args.eval_only else cfg.DATASETS.TRAIN + cfg.DATASETS.TEST)
    check_evaluators(cfg.DATASETS.TEST)
    default_setup(cfg, args)
    return cfg


def main(args):
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        CarafeCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    launch(main, default_argument_parser().parse_args())
