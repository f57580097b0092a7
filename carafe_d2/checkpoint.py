"""Loading checkpoints, with errors that name the file and what is wrong with it."""

import os
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.utils.file_io import PathManager
from torch import Tensor

from . import mmdet
from .errors import UserError


class _Unread:
    """Stands for an object that a file holds beside its weights and that nobody needs."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


# MMDetection's files hold best scores as NumPy scalars, and those of an unfinished training the
# history of its losses. They can be passed over without running any of their code.
_HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Unread, name)
    for name in (
        "builtins.getattr",  # the history names its methods
        "mmengine.logging.history_buffer.HistoryBuffer",
        "numpy.dtype",
        "numpy.ndarray",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
    )
]

_KEY_OF_CONSTANT = {"pixel_mean": "MODEL.PIXEL_MEAN", "pixel_std": "MODEL.PIXEL_STD"}

# Blocks of each stage, and convolutions in a block, of the ResNets by their depth.
_RESNETS = {
    ((2, 2, 2, 2), 2): 18,
    ((3, 4, 6, 3), 2): 34,
    ((3, 4, 6, 3), 3): 50,
    ((3, 4, 23, 3), 3): 101,
    ((3, 8, 36, 3), 3): 152,
}


# What a pickle of weights needs. Whatever else a pickle names could run any code.
_OF_ARRAYS = {
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *(
        (f"numpy.{core}.multiarray", name)
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    ),
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in _OF_ARRAYS:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} was not allowed")
        return super().find_class(module, name)


class CarafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which also reads MMDetection's, and takes a checkpoint whole.

    MMDetection's are recognized by the names of their weights and converted on the way in. Weights
    have to be those of the model, all of them and no others: a checkpoint that fits in part would
    evaluate to figures that mean nothing. What :func:`torch.compile` and wrappers for several
    processes put in front of names does not count. No code of a file is run, a .pkl's neither.
    """

    def __init__(
        self,
        model,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        strict: bool = True,
        **checkpointables,
    ):
        """
        Args:
            model, save_dir, save_to_disk, **checkpointables: see
                :class:`detectron2.checkpoint.DetectionCheckpointer`.
            strict: False starts a training from whatever of a checkpoint fits the model; the log
                names what does not.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self._strict = strict

    def load(self, path: str, *args, **kwargs) -> dict:
        """Loads weights, and with ``checkpointables`` also training state.

        Args:
            path: a file, or an address that Detectron2's path manager knows (https, detectron2);
                empty leaves the model as it was initialized.
            *args, **kwargs: see :class:`fvcore.common.checkpoint.Checkpointer`.

        Returns:
            What the file holds beyond the weights and the state that was loaded.

        Raises:
            UserError: the file is missing, cannot be fetched, is no checkpoint, needs code of its
                own to be read, or its weights are not those of this model.
        """
        if path:
            # Detectron2's main branch takes this option in the path.
            filename = _fetch(path.removesuffix("?matching_heuristics=True"), self.path_manager)
            if not os.path.isfile(filename):
                raise UserError(
                    f"weights {path} do not exist; set MODEL.WEIGHTS to a checkpoint, or to '' to "
                    "start from random weights"
                )
        return super().load(path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict:
        load = super()._load_file
        if filename.endswith(".pkl"):
            _read(filename, lambda: _read_arrays(filename))  # so Detectron2 can read it safely
        checkpoint = _read(filename, lambda: load(filename))
        weights = mmdet.find_state_dict(checkpoint["model"])
        if weights is not None:
            return self._convert(filename, checkpoint["model"], weights)
        if isinstance(checkpoint["model"], Mapping) and "state_dict" in checkpoint["model"]:
            checkpoint["model"] = checkpoint["model"]["state_dict"]  # as Lightning and others save
        model = self.model.state_dict()
        check_is_state_dict(filename, checkpoint["model"])
        if not checkpoint.get("matching_heuristics", False):
            checkpoint["model"] = _unwrapped(filename, checkpoint["model"], model)
        _check_values(filename, checkpoint["model"], model)
        self._drop_constants(filename, checkpoint["model"], model)
        return checkpoint

    def _drop_constants(self, filename: str, weights: dict, model: Mapping[str, Tensor]) -> None:
        """Takes out what the config determines and old checkpoints hold; it has to be the same."""
        for name, constant in self.model.named_buffers():
            if name in model or name not in weights:
                continue
            value = torch.as_tensor(weights.pop(name)).flatten().float()
            expected = constant.flatten().float().cpu()
            if value.shape == expected.shape and torch.allclose(value, expected, rtol=1e-3):
                continue
            key = _KEY_OF_CONSTANT.get(name.split(".")[-1], "MODEL.ANCHOR_GENERATOR")
            problem = f"{name} is another in the file than {key} makes it"
            if self._strict:
                raise UserError(f"the weights are not those of the model: {problem}")
            self.logger.warning(f"{filename}: {problem}.")

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict:
        """Loads the last checkpoint, and that whole, if ``resume`` and there is one; else path."""
        self._strict |= resume and self.has_checkpoint()
        return super().resume_or_load(path, resume=resume)

    def _log_incompatible_keys(self, incompatible) -> None:
        if self._strict and (misfit := _incompatibility(incompatible, self.model.state_dict())):
            raise UserError(f"the weights are not those of the model: {misfit}")
        super()._log_incompatible_keys(incompatible)

    def _convert(self, filename: str, content: Mapping, weights: Mapping[str, Tensor]) -> dict:
        """What Detectron2 is to load of a file of MMDetection's."""
        try:
            converted = mmdet.to_detectron2(weights)
        except UserError as error:
            raise UserError(f"{filename}: {error}") from error
        self.logger.info(f"Read {len(weights)} weights of MMDetection {converted.layout}.")
        if beside := mmdet.beside_weights(content):
            self.logger.info(f"Not read: {', '.join(beside)}.")
        # Whatever else belongs to the geometry of 1.x, its anchors are half a stride off.
        legacy_geometry = any(
            isinstance(module, DefaultAnchorGenerator) and module.offset == 0.5
            for module in self.model.modules()
        )
        for difference in mmdet.differences(content, converted, legacy_geometry=legacy_geometry):
            self.logger.warning(difference)

        model = self.model.state_dict()
        _check_values(filename, converted.weights, model)
        misfit = _misfit(converted, model)
        if misfit and self._strict:
            raise UserError(f"{filename} does not fit the model: {misfit}")
        # Detectron2 names in a warning whatever the model has no place for, and what it lacks.
        fitting = {
            name: tensor
            for name, tensor in converted.weights.items()
            if name in model or not mmdet.is_counter(name)
        }
        unknown = {name: weights[name] for name in converted.unknown}
        return {
            "model": {**fitting, **unknown},
            "__author__": "MMDetection",
            "matching_heuristics": False,
            "model_settings": {"config": {}, "classes": mmdet.class_names(content)},
        }


def read_checkpoint(path: str) -> dict:
    """Reads a .pth file of Detectron2 or MMDetection without running code from it.

    Args:
        path: a file, or an address that Detectron2's path manager knows.

    Returns:
        What the file contains, its tensors on the CPU.

    Raises:
        UserError: the file is missing, cannot be fetched, is unreadable or needs code of its own.
    """
    filename = _fetch(path, PathManager)
    if not os.path.isfile(filename):
        raise UserError(f"checkpoint {path} does not exist")
    return _read(filename, lambda: torch.load(filename, map_location="cpu", weights_only=True))


def _fetch(path: str, path_manager) -> str:
    """The file's path on this machine, where it is fetched to, and kept, if it is an address."""
    try:
        return path_manager.get_local_path(path)
    except Exception as error:  # the path handlers raise whatever their protocol raises
        raise UserError(f"cannot fetch the weights {path}: {error}") from error


def _read(filename: str, read: Callable[[], dict]) -> dict:
    """Calls ``read``, passing over the harmless objects in a file of MMDetection's."""
    try:
        try:
            return read()
        except pickle.UnpicklingError:
            with torch.serialization.safe_globals(_HARMLESS):
                content = read()
            if mmdet.find_state_dict(content) is None:
                raise
            return content
    except Exception as error:  # a spoilt file makes torch.load raise just about anything
        needs_code = re.search(r"GLOBAL (\S+) (?:was not|whose)", str(error))
        if needs_code:
            raise UserError(
                f"{filename} holds a {needs_code[1]}, and reading that could run code of the file; "
                "if it is one of MMDetection's, tools/model_converters/publish_model.py there "
                "keeps only its weights"
            ) from error
        # PyTorch says at some length what else one might do.
        lines = str(error).rpartition("WeightsUnpickler error:")[2].strip().splitlines()
        reason = lines[0].split(". ")[0] if lines else "the file ends too early"
        if start := _start_of(filename):
            reason = f"it starts with {start!r}"
        raise UserError(f"{filename} is not a readable checkpoint: {reason}") from error


def _start_of(filename: str) -> bytes:
    """The first bytes of a file that is neither zip nor pickle, such as a web page."""
    try:
        with open(filename, "rb") as file:
            start = file.read(16)
    except OSError:  # which says more than its bytes
        return b""
    return b"" if start.startswith((b"PK", b"\x80")) else start


def _read_arrays(filename: str):
    with open(filename, "rb") as file:
        return _ArrayUnpickler(file, encoding="latin1").load()


def _plain(name: str) -> str:
    """The name of a weight without what wrappers of modules put into it."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def _unwrapped(
    filename: str, weights: Mapping[str, Any], model: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Weights by the model's own names where these differ in no more than wrappers."""
    names = {_plain(name): name for name in model}
    if not any(_plain(name) in names for name in weights):
        found = mmdet.listed(weights) or "nothing"
        raise UserError(f"{filename} holds no weight of the model, but {found}")
    unwrapped: dict[str, Any] = {}
    for name, value in weights.items():
        plain = _plain(name)
        if name == "n_averaged":  # of torch.optim.swa_utils.AveragedModel, beside its module
            continue
        if (new := names.get(plain, plain)) in unwrapped:
            raise UserError(f"{filename} holds {plain} twice, once of them as {name}")
        unwrapped[new] = value
    return unwrapped


def _incompatibility(incompatible, model: Mapping[str, Tensor]) -> str | None:
    """Says what of a checkpoint did not fit the model, if anything counts."""
    for name, in_file, in_model in incompatible.incorrect_shapes:
        return f"{name} has shape {in_file} in the file and {in_model} in the model"
    missing = [name for name in incompatible.missing_keys if not mmdet.is_counter(name)]
    if missing:
        return f"the file lacks {mmdet.listed(missing)}"
    surplus = _surplus(incompatible.unexpected_keys, model)
    return f"the model has no place for {mmdet.listed(surplus)}" if surplus else None


def _surplus(names: Iterable[str], model: Mapping[str, Tensor]) -> list[str]:
    """Of the names in a file that the model lacks, those that matter for its predictions."""
    mask_head = "roi_heads.mask_head."
    without_masks = not any(name.startswith(mask_head) for name in model)  # boxes are the same
    return [
        name
        for name in names
        if not mmdet.is_counter(name) and not (without_masks and name.startswith(mask_head))
    ]


def check_is_state_dict(filename: str, weights) -> None:
    """Refuses what Detectron2 would take for weights, and then load nothing of."""
    if not isinstance(weights, Mapping):
        raise UserError(f"{filename} is no checkpoint: it holds a {type(weights).__name__}")
    for name, value in weights.items():
        is_array = isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
        if not isinstance(name, str) or not (is_array or isinstance(value, Tensor)):
            raise UserError(
                f"{filename} is no checkpoint of Detectron2's or MMDetection's: its {name!r} is "
                f"no weight but a {type(value).__name__}"
            )


def _check_values(filename: str, weights: Mapping[str, Any], model: Mapping[str, Tensor]) -> None:
    """Refuses what would be copied into the model and make it predict anything."""
    for name, value in weights.items():
        value = torch.as_tensor(value)
        if name in model and model[name].is_floating_point() and not value.is_floating_point():
            raise UserError(f"{filename}: {name} has the type {value.dtype}, which is no weight's")
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{filename}: {name} has values that are not finite")


def _misfit(converted: mmdet.Converted, model: Mapping[str, Tensor]) -> str | None:
    """Says how the weights of a checkpoint differ from those of a model, if they do."""
    weights = converted.weights
    if converted.unknown:
        return f"the model has no place for {mmdet.listed(converted.unknown)}"
    depths = _resnet_depth(weights), _resnet_depth(model)
    if None not in depths and depths[0] != depths[1]:
        return (
            f"its backbone is a ResNet-{depths[0]} and the model's a ResNet-{depths[1]}; "
            f"set MODEL.RESNETS.DEPTH to {depths[0]}"
        )
    classes = mmdet.num_classes(weights), mmdet.num_classes(model)
    if None not in classes and classes[0] != classes[1]:
        key = "ROI_HEADS" if any(name.startswith("roi_heads.") for name in model) else "RETINANET"
        return (
            f"it tells {classes[0]} classes apart and the model {classes[1]}; "
            f"set MODEL.{key}.NUM_CLASSES to {classes[0]}"
        )
    missing = [name for name in model if name not in weights and not mmdet.is_counter(name)]
    if missing:
        return f"it lacks {mmdet.listed(missing)}"
    if surplus := _surplus((name for name in weights if name not in model), model):
        return f"the model has no place for {mmdet.listed(surplus)}"
    for name, tensor in weights.items():
        if name in model and tensor.shape != model[name].shape:
            return (
                f"{name} has shape {tuple(tensor.shape)} in it and {tuple(model[name].shape)} in "
                "the model"
            )
    return None


def _resnet_depth(weights: Mapping[str, Tensor]) -> int | None:
    """The depth of the ResNet in weights by Detectron2's names, if it is a known one."""
    convolution = re.compile(r"backbone\.bottom_up\.res(\d)\.(\d+)\.conv(\d)\.weight")
    found = [match.groups() for match in map(convolution.fullmatch, weights) if match]
    if not found:
        return None
    blocks = Counter(stage for stage, _, conv in found if conv == "1")
    convolutions = max(int(conv) for _, _, conv in found)
    stages = (blocks["2"], blocks["3"], blocks["4"], blocks["5"])
    return _RESNETS.get((stages, convolutions))
