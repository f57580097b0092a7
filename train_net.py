#!/usr/bin/env python3
"""Trains and evaluates detectors with CARAFE; the command line is that of Detectron2's scripts.

Differences from Detectron2's ``tools/train_net.py``: CARAFE's config keys and modules, a data
loader that resumes exactly, the CPU when there is no GPU, and one clear line for a user's mistake.
"""

import logging
import os
import weakref

import torch
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from detectron2.evaluation import COCOEvaluator, verify_results
from detectron2.utils import comm

from carafe_d2 import CarafeCheckpointer
from carafe_d2.config import load_config
from carafe_d2.data.build import build_test_loader, build_train_loader, check_datasets
from carafe_d2.errors import UserError, exit_on_user_error
from carafe_d2.solver import build_optimizer


class Trainer(DefaultTrainer):
    """Detectron2's trainer with CARAFE's checkpointer and a data loader that resumes exactly."""

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
        return COCOEvaluator(dataset_name, output_dir=output_folder)

    def build_hooks(self):
        # One of the hooks saves with the checkpointer, so it has to be in place before them.
        self.checkpointer = CarafeCheckpointer(
            self.model, self.cfg.OUTPUT_DIR, strict=False, trainer=weakref.proxy(self)
        )
        return super().build_hooks()

    def resume_or_load(self, resume=True):
        super().resume_or_load(resume)
        self.data_loader.start_iter = self.start_iter

    def state_dict(self):
        # The trainer inside holds optimiser and gradient scaler; Detectron2 0.6 leaves them out.
        inside = {"_trainer": self._trainer.state_dict(), "seed": self.data_loader.seed}
        return {**super().state_dict(), **inside}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        # Checkpoints of Detectron2's own trainers may lack either.
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])
        self.data_loader.seed = state_dict.get("seed", self.data_loader.seed)

    def train(self):
        # Detectron2 logs the traceback of whatever ends the training; a user's mistake needs none.
        logging.getLogger("detectron2.engine.train_loop").addFilter(
            lambda record: not (record.exc_info and isinstance(record.exc_info[1], UserError))
        )
        return super().train()


def setup(args):
    """Builds the config from file and command line, and checks that its data is there."""
    cfg = load_config(args.config_file, args.opts)
    check_datasets(cfg.DATASETS.TEST if args.eval_only else cfg.DATASETS.TRAIN + cfg.DATASETS.TEST)
    default_setup(cfg, args)
    return cfg


@exit_on_user_error()
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


def check_num_gpus(num_gpus):
    """Without a GPU the one process that --num-gpus 1, the default, starts runs on the CPU."""
    available = torch.cuda.device_count()
    if num_gpus > max(available, 1):
        raise UserError(f"--num-gpus {num_gpus}, but this machine has {available}")


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    with exit_on_user_error():
        check_num_gpus(args.num_gpus)
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
