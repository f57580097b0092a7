"""Trains and evaluates detectors with CARAFE; the command line is that of Detectron2's scripts.

    python -m carafe_d2.train_net --config-file mask_rcnn_R50_FPN_carafe_1x.yaml

Differences from Detectron2's ``tools/train_net.py``: CARAFE's config keys and modules, checks of
config, data and weights before anything expensive starts, a data loader that resumes exactly, the
CPU when there is no GPU, processes started by torchrun beside those that ``--num-gpus`` starts, and
one clear line for a user's mistake.
"""

import contextlib
import functools
import logging
import os
import tempfile

import torch
from detectron2.engine import DefaultTrainer, TrainerBase, default_argument_parser, default_setup
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import inference_context, verify_results
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from .checkpoint import CarafeCheckpointer
from .config import check_config, find_config_file, load_config
from .data.build import build_test_loader, build_train_loader, check_datasets
from .data.checks import check_data
from .diagnosis import Reads, RecordingNode, named_mistakes, warn_of_idle_keys
from .engine import (
    build_checkpointer,
    build_trainer,
    launch,
    log_to,
    resume_or_load,
    share_buffers,
)
from .errors import UserError
from .evaluation import build_evaluator, check_evaluators
from .model_settings import ModelSettings
from .solver import build_lr_scheduler, build_optimizer, keep_settings, settings_of

logger = logging.getLogger(__name__)


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
        self.checkpointer = build_checkpointer(
            self, cfg.OUTPUT_DIR, model_settings=ModelSettings(cfg, cfg.DATASETS.TRAIN)
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())
        self.first_iteration = contextlib.nullcontext
        if cfg.TEST.AUG.ENABLED:
            self.register_hooks([EvalHook(0, self._test_with_augmentation)])

    def _test_with_augmentation(self):
        results = self.test_with_augmentation(self.cfg, self.model)
        self._last_eval_results.update(results)  # for TEST.EXPECTED_RESULTS
        return results

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
    def build_lr_scheduler(cls, cfg, optimizer):
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        return build_evaluator(dataset_name, output_folder, cfg)

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        share_buffers(model)
        return super().test(cfg, model, evaluators)

    @classmethod
    def test_with_augmentation(cls, cfg, model):
        """Evaluates with the augmentation of TEST.AUG; the metrics' names end in _TTA."""
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        model = getattr(model, "module", model)  # without the wrapper for several processes
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f"{name}_TTA": metrics for name, metrics in results.items()}

    def run_step(self):
        with self._guard():
            super().run_step()

    def after_step(self):
        with self._guard():
            super().after_step()

    def _guard(self):
        is_first = self.iter == self.start_iter
        return self.first_iteration() if is_first else contextlib.nullcontext()

    def resume_or_load(self, resume=True):
        optimizer = self._trainer.optimizer
        settings = settings_of(optimizer)
        try:
            self.start_iter = resume_or_load(
                self.checkpointer, self, self.cfg.MODEL.WEIGHTS, resume=resume
            )
        # What optimizers, schedules and hooks raise for the state of others.
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.checkpointer.get_checkpoint_file()} is of another training than this one "
                f"({type(error).__name__}: {error}); keep its MODEL.BACKBONE.FREEZE_AT and the "
                "keys under SOLVER that tell parameters apart, or start anew with MODEL.WEIGHTS"
            ) from error
        keep_settings(optimizer, self.scheduler, settings)

    def state_dict(self):
        # The trainer inside holds optimizer and gradient scaler; Detectron2 0.6 leaves them out.
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        if "_trainer" in state_dict:  # checkpoints of Detectron2's own trainers may lack it
            self._trainer.load_state_dict(state_dict["_trainer"])


def setup(args):
    """Builds the config from file and command line, and checks that its data is there."""
    cfg = RecordingNode.of(load_config(args.config_file, args.opts), Reads())
    check_config(cfg, eval_only=args.eval_only)
    check_datasets(cfg.DATASETS.TEST if args.eval_only else cfg.DATASETS.TRAIN + cfg.DATASETS.TEST)
    check_evaluators(cfg.DATASETS.TEST)
    log_to(cfg.OUTPUT_DIR)
    check_data(cfg, training=not args.eval_only)
    default_setup(cfg, args)
    return cfg


def predict_first_image(cfg, model):
    """Runs the model as an evaluation does, so that what fails there fails before a training."""
    if not cfg.DATASETS.TEST:
        return
    image = next(iter(Trainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])))
    model = getattr(model, "module", model)  # without the wrapper for several processes
    models = [model, *([GeneralizedRCNNWithTTA(cfg, model)] if cfg.TEST.AUG.ENABLED else [])]
    with inference_context(model), torch.no_grad():
        for each in models:
            each(image)


def rehearse(cfg, *, training):
    """Does once what the program does with a config, writing nothing that lasts."""
    if not training:
        predict_first_image(cfg, Trainer.build_model(cfg))
        return
    with tempfile.TemporaryDirectory() as folder, EventStorage() as storage:
        cfg.defrost()
        cfg.OUTPUT_DIR = folder
        trainer = Trainer(cfg)
        trainer.storage = storage
        predict_first_image(cfg, trainer.model)
        trainer.before_train()
        trainer.run_step()
        trainer.after_step()


def main(args):
    args.config_file = find_config_file(args.config_file)
    rehearsal = functools.partial(rehearse, training=not args.eval_only)
    names_mistakes = functools.partial(named_mistakes, args.config_file, args.opts, rehearsal)
    with names_mistakes():
        cfg = setup(args)
        if args.eval_only:
            model = Trainer.build_model(cfg)
            settings = ModelSettings(cfg, cfg.DATASETS.TEST)
            checkpointer = CarafeCheckpointer(model, cfg.OUTPUT_DIR, model_settings=settings)
            # resume_or_load would compare no settings with those of MODEL.WEIGHTS.
            last = args.resume and checkpointer.has_checkpoint()
            weights = checkpointer.get_checkpoint_file() if last else cfg.MODEL.WEIGHTS
            if not weights:
                logger.warning("MODEL.WEIGHTS is empty: what is evaluated are random weights.")
            checkpointer.load(weights)
            predict_first_image(cfg, model)
        else:
            trainer = Trainer(cfg)
            trainer.resume_or_load(resume=args.resume)
            trainer.first_iteration = names_mistakes
            predict_first_image(cfg, trainer.model)
        warn_of_idle_keys(args.config_file, args.opts, cfg, eval_only=args.eval_only)
    if not args.eval_only:
        return trainer.train()

    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_augmentation(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def run(argv=None):
    """The command line; see ``--help``."""
    launch(main, default_argument_parser().parse_args(argv))


if __name__ == "__main__":
    run()
