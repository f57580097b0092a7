"""What the training scripts share: starting processes, and going on after an interruption.

The processes of a training are started in one of two ways. ``--num-gpus`` starts one for each GPU
by Detectron2's ``launch``. torchrun, or whatever else sets the variables of PyTorch's "env://"
(RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), starts them itself, on any number of machines, with
GPUs or without.
"""

import argparse
import contextlib
import logging
import os
import sys
import time
import uuid
import weakref
from collections.abc import Callable
from typing import Any

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer, TrainerBase
from detectron2.engine import launch as launch_on_gpus
from detectron2.engine.defaults import create_ddp_model
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch import distributed, nn
from torch.multiprocessing import ProcessExitedException
from torch.nn.parallel import DistributedDataParallel

from .checkpoint import CarafeCheckpointer
from .data.build import TrainLoader
from .errors import UserError, exit_on_user_error

logger = logging.getLogger("detectron2")

# Most mistakes are found by all processes at once. For so many seconds the others wait for the
# first one's message, and to be ended by what started them, before they come out with their own.
_PATIENCE = 5
# The key by which rank 0 tells the others which part of the store is theirs.
_PART = "carafe_d2"


def launch(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Runs ``main(args)`` in every process of the training.

    When torchrun starts the processes again after one has failed, ``args.resume`` becomes True. A
    :class:`UserError` ends the program with one line and exit code 1.

    Args:
        main: a function that can be pickled.
        args: what :func:`detectron2.engine.default_argument_parser` parses.
    """
    with exit_on_user_error():
        if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            _join_process_group(main, args)
            return
        gpus = torch.cuda.device_count()
        if args.num_gpus > max(gpus, 1):  # without a GPU the one process runs on the CPU
            raise UserError(
                f"--num-gpus {args.num_gpus}, but this machine has {gpus}; torchrun starts several "
                "processes on the CPU"
            )
        try:
            launch_on_gpus(
                _run,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(main, args),
            )
        except ProcessExitedException as error:
            if error.exit_code != 1:  # with 1 the process has said why
                raise
            sys.exit(1)


def _join_process_group(main: Callable, args: argparse.Namespace) -> None:
    """Makes this process the one of the group that its environment says it is, and runs main."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = torch.cuda.device_count()
    with _first_to_report(local_rank):
        if args.num_gpus > 1 or args.num_machines > 1:
            raise UserError(
                f"WORLD_SIZE says that {size} processes were started already, so --num-gpus and "
                "--num-machines have to go"
            )
        if gpus and local_size > gpus:
            raise UserError(
                f"{local_size} processes on this machine, but it has {gpus} GPUs; with "
                "CUDA_VISIBLE_DEVICES= they run on the CPU"
            )
    if gpus:
        torch.cuda.set_device(local_rank)
    store, rank, size = next(distributed.rendezvous("env://", timeout=DEFAULT_TIMEOUT))
    # torchrun counts neither the starts that another machine has caused, nor those for machines
    # that come or go.
    is_restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if rank == 0:
        is_restart |= store.check([_PART])
    distributed.init_process_group(
        "nccl" if gpus else "gloo",
        store=_unused_part(store, rank, size),
        rank=rank,
        world_size=size,
        timeout=DEFAULT_TIMEOUT,
    )

    # Detectron2's launch leaves the group of the processes on this machine there, too.
    machines = comm.all_gather(os.environ.get("GROUP_RANK", str(rank)))
    for machine in sorted(set(machines)):
        group = distributed.new_group([i for i, m in enumerate(machines) if m == machine])
        if machine == machines[rank]:
            comm._LOCAL_PROCESS_GROUP = group

    if any(comm.all_gather(is_restart)) and not args.eval_only:
        args.resume = True
    _run(main, args)
    distributed.destroy_process_group()


def _unused_part(store: distributed.Store, rank: int, size: int) -> distributed.Store:
    """Finds a part of the store that is new to all processes.

    torchrun keeps the store when it starts the processes again, and they would find in it, and try
    to reach, those before them. It gives them no number of the start that all of them know. So rank
    0 names the part, and the name counts once all others have taken it, each as the first of its
    rank: an earlier rank 0 is no longer there to see that.
    """
    if rank == 0:
        name = uuid.uuid4().hex
        store.set(_PART, name)
        for other in range(1, size):
            store.wait([f"{name}/taken/{other}"])
        store.set(f"{name}/complete", "")
        return distributed.PrefixStore(name, store)

    seen: str | None = None
    while True:
        if (current := store.get(_PART).decode()) != seen:
            seen = current
            is_first = store.add(f"{seen}/taken/{rank}", 1) == 1
        if is_first and store.check([f"{seen}/complete"]):
            return distributed.PrefixStore(seen, store)
        time.sleep(0.05)


def _run(main: Callable, args: argparse.Namespace) -> None:
    # Detectron2 logs the traceback of whatever ends the training; a user's mistake needs none.
    logging.getLogger("detectron2.engine.train_loop").addFilter(
        lambda record: not (record.exc_info and isinstance(record.exc_info[1], UserError))
    )
    if not comm.is_main_process():
        logging.getLogger("carafe_d2").setLevel(logging.ERROR)
    with exit_on_user_error(), _first_to_report(comm.get_rank()):
        main(args)


@contextlib.contextmanager
def _first_to_report(rank: int):
    """Lets a :class:`UserError` out of the first process at once, and out of the others later."""
    try:
        yield
    except UserError:
        if rank:
            time.sleep(_PATIENCE)
        raise


def build_trainer(
    model: nn.Module, data_loader, optimizer: torch.optim.Optimizer, *, amp: bool, **ddp
) -> SimpleTrainer:
    """Builds Detectron2's trainer of a model that all processes train together.

    Args:
        model, data_loader, optimizer: see :class:`detectron2.engine.SimpleTrainer`.
        amp: whether to train in mixed precision.
        **ddp: options of :func:`detectron2.engine.defaults.create_ddp_model`.

    Raises:
        UserError: the model is on the CPU, but the processes talk through GPUs.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and comm.get_world_size() > 1:
        if distributed.get_backend() == "nccl":
            raise UserError(
                "several processes train on the CPU only where they see no GPU; set "
                "CUDA_VISIBLE_DEVICES= to nothing"
            )
        ddp["device_ids"] = None  # by default that of a GPU
    trainer = AMPTrainer if amp else SimpleTrainer
    return trainer(create_ddp_model(model, **ddp), data_loader, optimizer)


def build_checkpointer(trainer: TrainerBase, output_dir: str) -> CarafeCheckpointer:
    """Builds the checkpointer that saves a trainer, its model and the state of its data loader."""
    states: dict[str, Any] = {"trainer": weakref.proxy(trainer)}
    if hasattr(trainer.data_loader, "state_dict"):  # Detectron2's has none
        states["data_loader"] = trainer.data_loader
    return CarafeCheckpointer(trainer.model, output_dir, strict=False, **states)


def resume_or_load(
    checkpointer: CarafeCheckpointer, trainer: TrainerBase, weights: str, *, resume: bool
) -> int:
    """Loads the last checkpoint if ``resume`` and there is one, and else the weights to start from.

    Args:
        checkpointer: one of :func:`build_checkpointer`.
        trainer: the trainer that it saves.
        weights: see :meth:`carafe_d2.CarafeCheckpointer.load`.
        resume: whether to go on from the last checkpoint.

    Returns:
        The iteration at which training has to start, 0 without a checkpoint.

    Raises:
        UserError: the processes do not find the same checkpoint.
    """
    if not resume and comm.is_main_process():
        _forget_earlier_training(checkpointer)
    checkpointer.resume_or_load(weights, resume=resume)
    start_iter = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    found = comm.all_gather(start_iter)
    if len(set(found)) > 1:
        raise UserError(
            f"the processes would resume at iterations {sorted(set(found))}: the output folder "
            f"{checkpointer.save_dir} must be on a file system that all machines share"
        )
    if isinstance(trainer.data_loader, TrainLoader):
        trainer.data_loader.start_iter = start_iter
    return start_iter


def _forget_earlier_training(checkpointer: CarafeCheckpointer) -> None:
    """Keeps a training that starts anew from resuming, when it is restarted, an earlier one."""
    may_restart = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    if may_restart and checkpointer.has_checkpoint():
        earlier = checkpointer.get_checkpoint_file()
        checkpointer.path_manager.rm(os.path.join(checkpointer.save_dir, "last_checkpoint"))
        logger.warning(f"Starting anew: --resume will no longer go on from {earlier}.")


def share_buffers(model: nn.Module) -> None:
    """Gives all processes the buffers of the first, whose model is the one that is saved.

    Batch normalization gathers its statistics in every process from that one's images. Before an
    evaluation they have to be shared, or each process evaluates another model.
    """
    if isinstance(model, DistributedDataParallel):
        for buffer in model.buffers():
            distributed.broadcast(buffer, src=0)
