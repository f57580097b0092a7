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
import socket
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer, TrainerBase
from detectron2.engine import launch as launch_on_gpus
from detectron2.engine.defaults import create_ddp_model
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
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
# Where rank 0 leaves the port of its store in torchrun's.
_PORT = "carafe_d2/port"


def launch(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Runs ``main(args)`` in every process of the training.

    When torchrun starts the processes again after one has failed, ``args.resume`` becomes True. A
    :class:`UserError` ends the program with one line and exit code 1.

    Args:
        main: a function that can be pickled.
        args: what :func:`detectron2.engine.default_argument_parser` parses.
    """
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        with _report_once(int(os.environ.get("LOCAL_RANK", 0))):
            _join_process_group(args)
            _run(main, args)
        distributed.destroy_process_group()
        return
    gpus = torch.cuda.device_count()
    with exit_on_user_error():
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


def _join_process_group(args: argparse.Namespace) -> None:
    """Makes this process the one of the group that its environment says it is."""
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = torch.cuda.device_count()
    if args.num_gpus > 1 or args.num_machines > 1:
        raise UserError(
            f"WORLD_SIZE says that {os.environ['WORLD_SIZE']} processes were started already, so "
            "--num-gpus and --num-machines have to go"
        )
    if gpus and local_size > gpus:
        raise UserError(
            f"{local_size} processes on this machine, but it has {gpus} GPUs; with "
            "CUDA_VISIBLE_DEVICES= they run on the CPU"
        )
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    store, rank, size = next(distributed.rendezvous("env://", timeout=DEFAULT_TIMEOUT))
    # torchrun counts neither the starts that another machine has caused, nor those for machines
    # that come or go.
    is_restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        is_restart |= rank == 0 and store.check([_PORT])
        store = _store_of_this_start(store, rank)
    distributed.init_process_group(
        "nccl" if gpus else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=DEFAULT_TIMEOUT,
    )
    # Detectron2's launch leaves the group of the processes on this machine there, too.
    comm._LOCAL_PROCESS_GROUP, _ = distributed.new_subgroups(local_size)
    if any(comm.all_gather(is_restart)) and not args.eval_only:
        args.resume = True


def _store_of_this_start(store: distributed.Store, rank: int) -> distributed.Store:
    """Opens a store that rank 0 serves, in place of torchrun's.

    torchrun keeps its store when it starts the processes again; they would find those before them
    in it and try to reach them (pytorch#135712). An earlier rank 0 has taken its own store along.
    """
    host = os.environ["MASTER_ADDR"]
    if rank == 0:
        own = distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        store.set(_PORT, str(own.port))
        return own
    while True:
        port = int(store.get(_PORT))
        try:
            socket.create_connection((host, port), timeout=10).close()
        except OSError:  # The port is that of an earlier start.
            time.sleep(0.1)
            continue
        return distributed.TCPStore(host, port, is_master=False, timeout=DEFAULT_TIMEOUT)


def _run(main: Callable, args: argparse.Namespace) -> None:
    # Detectron2 logs the traceback of whatever ends the training; a user's mistake needs none.
    logging.getLogger("detectron2.engine.train_loop").addFilter(
        lambda record: not (record.exc_info and isinstance(record.exc_info[1], UserError))
    )
    if not comm.is_main_process():
        logging.getLogger("carafe_d2").setLevel(logging.ERROR)
    with _report_once(comm.get_rank()):
        main(args)


@contextlib.contextmanager
def _report_once(rank: int) -> Iterator[None]:
    """Exits on a :class:`UserError`, the first process at once, and the others later."""
    with exit_on_user_error():
        try:
            yield
        except UserError:
            if rank:
                time.sleep(_PATIENCE)
            raise


def log_to(folder: str) -> None:
    """Sends what this package logs to where Detectron2's ``default_setup`` sends the rest."""
    setup_logger(folder, distributed_rank=comm.get_rank(), name="carafe_d2")


def build_trainer(
    model: nn.Module, data_loader, optimizer: torch.optim.Optimizer, *, amp: bool, **ddp
) -> SimpleTrainer:
    """Builds Detectron2's trainer of a model that all processes train together.

    Args:
        model, data_loader, optimizer: see :class:`detectron2.engine.SimpleTrainer`. A model that
            has ``turns`` is trained by a :class:`TurnsTrainer`.
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
    if turns := getattr(model, "turns", None):
        # In each turn the parameters of the other parts are left without a gradient.
        model = create_ddp_model(model, find_unused_parameters=True, **ddp)
        return TurnsTrainer(model, data_loader, optimizer, turns, amp=amp)
    trainer = AMPTrainer if amp else SimpleTrainer
    return trainer(create_ddp_model(model, **ddp), data_loader, optimizer)


class TurnsTrainer(AMPTrainer):
    """Trains the parts of a model in turns, such as a generator and its discriminators.

    Each part has losses, a backward and a step of its own in an iteration. One optimizer does for
    all of them what one for each would: it leaves alone what has no gradient, and keeps its state
    for each parameter. So schedule, checkpoints and resuming are those of any other training.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader,
        optimizer: torch.optim.Optimizer,
        turns: Callable[[int], Iterable[str]],
        *,
        amp: bool,
    ):
        """
        Args:
            model: called with a batch and the name of a part, returns the losses of that part,
                which have gradients for its parameters only.
            data_loader, optimizer: see :class:`detectron2.engine.SimpleTrainer`.
            turns: of an iteration, which parts are trained in it, one after the other.
            amp: whether to train in mixed precision.
        """
        scaler = torch.amp.GradScaler(enabled=amp)
        super().__init__(model, data_loader, optimizer, scaler)
        self._turns = turns

    def run_step(self) -> None:
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        metrics: dict[str, torch.Tensor] = {}
        for part in self._turns(self.iter):
            with torch.autocast("cuda", enabled=self.grad_scaler.is_enabled()):
                losses = self.model(data, part)
            self.optimizer.zero_grad()
            self.grad_scaler.scale(sum(losses.values())).backward()
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
            metrics |= losses
        self._write_metrics(metrics, data_time)


def build_checkpointer(trainer: TrainerBase, output_dir: str, **states: Any) -> CarafeCheckpointer:
    """Builds the checkpointer that saves a trainer, its model and the state of its data loader.

    Args:
        trainer: what is saved.
        output_dir: where to.
        **states: what else is to be saved, with ``state_dict`` and ``load_state_dict``.
    """
    states["trainer"] = weakref.proxy(trainer)
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
