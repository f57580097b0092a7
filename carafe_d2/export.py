"""Whole detectors for other runtimes: ONNX, AOTInductor, torch.export, TorchScript.

What is exported is the model from an image to its raw outputs. Post-processing, which brings boxes
and masks to the size of the original image, follows in Python; :class:`ExportedDetector` does it.
"""

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from detectron2.export import TracingAdapter
from detectron2.export.torchscript_patch import patch_builtin_len
from detectron2.modeling.meta_arch import panoptic_fpn
from detectron2.modeling.postprocessing import detector_postprocess, sem_seg_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn
from torch._prims_common import is_contiguous_or_false
from torch.overrides import TorchFunctionMode
from torchvision.ops import nms

from .errors import UserError
from .onnx import first_line, require_packages

Run = Callable[[Tensor], dict[str, Tensor]]

# ------------------------------------------------------------- a detector from tensor to tensors


@contextlib.contextmanager
def _without_postprocessing() -> Iterator[None]:
    """Detectron2's models put out what their heads predict, for the image as they are given it."""
    archs = "detectron2.modeling.meta_arch"
    with contextlib.ExitStack() as stack:
        for module in ("rcnn", "dense_detector", "panoptic_fpn"):
            name = f"{archs}.{module}.detector_postprocess"
            stack.enter_context(mock.patch(name, lambda instances, *_: instances))
        for module in ("panoptic_fpn", "semantic_seg"):
            name = f"{archs}.{module}.sem_seg_postprocess"
            crop = lambda logits, size, *_: logits[:, : size[0], : size[1]]  # noqa: E731
            stack.enter_context(mock.patch(name, crop))
        combine = f"{archs}.panoptic_fpn.combine_semantic_and_instance_outputs"
        stack.enter_context(mock.patch(combine, lambda *_: None))
        yield


def raw_outputs(model: nn.Module, inputs: list[dict]) -> dict[str, Any]:
    """What a model puts out for an image before post-processing.

    Args:
        model: one of Detectron2's meta-architectures, in evaluation mode.
        inputs: [{"image": (3, H, W)}].

    Returns:
        Some of "instances" and "proposals", each :class:`Instances` in the pixels of that image
        with masks as the mask head puts them out, and "sem_seg", logits (classes, H, W).
    """
    with _without_postprocessing():
        (outputs,) = model(inputs)
    return {name: value for name, value in outputs.items() if name != "panoptic_seg"}


class TensorDetector(nn.Module):
    """A detector from an image to tensors by name, as other runtimes see it.

    The names are those of the fields of Detectron2's instances, in alphabetical order, e.g.
    pred_boxes (D, 4), pred_classes (D,), pred_masks (D, 1, M, M), scores (D,); then sem_seg
    (classes, H, W), where the model has such outputs.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @property
    def example(self) -> Tensor:
        """An image whose sizes have no special relation to each other or to the strides."""
        model: Any = self.model
        divisor = max(model.backbone.size_divisibility, 32)
        return torch.zeros(3, 5 * divisor // 2, 7 * divisor // 2, device=model.device)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """
        Args:
            image: (3, H, W), from 0 to 255, in the order of channels of INPUT.FORMAT.
        """
        return _tensors(raw_outputs(self.model, [{"image": image}]))


def _tensors(outputs: dict[str, Any]) -> dict[str, Tensor]:
    tensors = {}
    for name, value in sorted(outputs.items()):
        fields = value.get_fields() if isinstance(value, Instances) else {name: value}
        for field, data in sorted(fields.items()):
            tensors[field] = data.tensor if isinstance(data, Boxes) else data
    return tensors


class ExportedDetector(nn.Module):
    """Runs what was exported, with Detectron2's post-processing, in the place of the model.

    Args:
        run: from an image (3, H, W) to tensors, as :class:`TensorDetector`.
        model: the model that was exported; only its settings count.
    """

    def __init__(self, run: Run, model: nn.Module):
        super().__init__()
        self._run = run
        self._device = model.device
        self._panoptic = isinstance(model, panoptic_fpn.PanopticFPN) and {
            "overlap_threshold": model.combine_overlap_thresh,
            "stuff_area_thresh": model.combine_stuff_area_thresh,
            "instances_score_thresh": model.combine_instances_score_thresh,
        }

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """Inputs and outputs of Detectron2's models."""
        return [self._detect(each) for each in batched_inputs]

    def _detect(self, inputs: Mapping) -> dict:
        image = inputs["image"]
        size = tuple(image.shape[-2:])
        height, width = inputs.get("height", size[0]), inputs.get("width", size[1])
        fields = self._run(image.to(self._device, torch.float32))
        outputs: dict[str, Any] = {}
        if (sem_seg := fields.pop("sem_seg", None)) is not None:
            outputs["sem_seg"] = sem_seg_postprocess(sem_seg, size, height, width)
        if fields:
            kind = "proposals" if "proposal_boxes" in fields else "instances"
            wrapped = {n: Boxes(t) if n.endswith("_boxes") else t for n, t in fields.items()}
            outputs[kind] = detector_postprocess(Instances(size, **wrapped), height, width)
        if self._panoptic:
            outputs["panoptic_seg"] = panoptic_fpn.combine_semantic_and_instance_outputs(
                outputs["instances"], outputs["sem_seg"].argmax(dim=0), **self._panoptic
            )
        return outputs


# ------------------------------------------------------------------------------- torch.export


class _FiniteValues(TorchFunctionMode):
    """Answers by yes whether values are finite, all that Detectron2's inference asks of its data.

    ``torch.jit.trace`` fixes the answer, too.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        asks = func is torch.isfinite or (args and getattr(args[0], "asks_if_finite", False))
        if asks and func is Tensor.__bool__:
            return True
        result = func(*args, **(kwargs or {}))
        if asks and func in (torch.isfinite, Tensor.all, Tensor.__and__):
            result.asks_if_finite = True
        return result


class _CopiedToReshape(TorchFunctionMode):
    """Copies what is reshaped, where its order may ask for it.

    To tell whether it does, torch.export would fix which of the sizes are 1.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.reshape, Tensor.flatten) and not is_contiguous_or_false(args[0]):
            args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        return func(*args, **(kwargs or {}))


def _padded(images: list[Tensor], size_divisibility: int = 0, pad_value: float = 0.0, **_):
    """:meth:`ImageList.from_tensors` of one image, without tensors of sizes."""
    (image,) = images
    divisor = max(size_divisibility, 1)
    height, width = image.shape[-2:]
    # ONNX rounds quotients toward zero, so that -(-side // divisor) would round down.
    below, right = ((side + divisor - 1) // divisor * divisor - side for side in (height, width))
    padded = F.pad(image, [0, right, 0, below], value=pad_value)
    return ImageList(padded[None], [(height, width)])


def _batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """:func:`torchvision.ops.batched_nms` by coordinates, for any number of boxes."""
    corners = torch.cat([boxes.flatten(), boxes.new_zeros(1)])
    least = corners.min()
    shifted = boxes + (idxs.to(boxes) * (corners.max() - least + 1))[:, None]
    # torchvision promises torch.export that two boxes are kept, so there are two that always are.
    apart = least - boxes.new_tensor([[3, 3, 2, 2], [5, 5, 4, 4]])
    keep = nms(torch.cat([shifted, apart]), F.pad(scores, [0, 2]), iou_threshold)
    return keep[keep < boxes.shape[0]]


def _adaptive_avg_pool2d(x: Tensor, output_size: int | tuple[int, int]) -> Tensor:
    """By matrices, as the translation to ONNX takes the windows of one size for all."""
    height, width = output_size if isinstance(output_size, tuple) else (output_size, output_size)
    for cells in (width, height):
        *others, pixels = x.shape
        x = x.reshape(-1, pixels).mm(_means(pixels, cells, x)).reshape(*others, cells).mT
    return x


def _means(pixels: int, cells: int, like: Tensor) -> Tensor:
    """The matrix (pixels, cells) that averages over the window of each cell."""
    pixel = torch.arange(pixels, device=like.device)[:, None]
    cell = torch.arange(cells, device=like.device)
    first, end = cell * pixels // cells, ((cell + 1) * pixels + cells - 1) // cells
    inside = ((pixel >= first) & (pixel < end)).to(like)
    return inside / inside.sum(dim=0)


def _conv2d(self, x: Tensor) -> Tensor:
    """Detectron2's :class:`Conv2d` without its question whether the batch is empty."""
    x = nn.Conv2d.forward(self, x)
    for layer in (self.norm, self.activation):
        x = x if layer is None else layer(x)
    return x


def _pooler_boxes(boxes: list[Boxes]) -> Tensor:
    """The boxes of one image with its number, 0, in front."""
    return F.pad(boxes[0].tensor, [1, 0])


@contextlib.contextmanager
def _exportable() -> Iterator[None]:
    """Detectron2 without what torch.export cannot follow: branches and sizes that depend on data.

    The results stay the same, for one image. As :func:`patch_builtin_len` does for tracing.
    """
    modeling = "detectron2.modeling"
    proposals = f"{modeling}.proposal_generator.proposal_utils"
    patches: dict[str, Any] = {
        "detectron2.structures.ImageList.from_tensors": staticmethod(_padded),
        # It makes a box of what is empty, for which it asks.
        "detectron2.structures.Boxes.__init__": lambda self, tensor: setattr(
            self, "tensor", tensor
        ),
        "detectron2.layers.Conv2d.forward": _conv2d,
        "torch.nn.functional.adaptive_avg_pool2d": _adaptive_avg_pool2d,
        f"{modeling}.poolers.convert_boxes_to_pooler_format": _pooler_boxes,
        f"{proposals}._is_tracing": lambda: True,
        **{
            f"{module}.batched_nms": _batched_nms
            for module in (
                proposals,
                f"{modeling}.roi_heads.fast_rcnn",
                f"{modeling}.meta_arch.retinanet",
                f"{modeling}.meta_arch.fcos",
            )
        },
    }
    with contextlib.ExitStack() as stack:
        for name, value in patches.items():
            stack.enter_context(mock.patch(name, value))
        for module in (proposals, f"{modeling}.meta_arch.dense_detector"):
            # Of a size that is known at run time, the builtin would fix which one is smaller.
            stack.enter_context(mock.patch(f"{module}.min", torch.sym_min, create=True))
        stack.enter_context(patch_builtin_len(["detectron2.structures.instances"]))
        # Or sizes of which something becomes one pixel, or is cropped or not, would be refused.
        config: Any = torch.fx.experimental._config
        stack.enter_context(config.patch(backed_size_oblivious=True))
        stack.enter_context(_CopiedToReshape())
        stack.enter_context(_FiniteValues())
        yield


def export_program(model: nn.Module) -> torch.export.ExportedProgram:
    """Exports a detector by torch.export, for one image of any size.

    CARAFE is one node of the program.

    Args:
        model: one of Detectron2's meta-architectures, in evaluation mode.

    Returns:
        The program of a :class:`TensorDetector`.

    Raises:
        UserError: a part of the model cannot be exported; the message names it.
    """
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        # AOTInductor takes the weights of 1x1 convolutions for contiguous even in channels_last,
        # and its masks are wrong then.
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    detector = TensorDetector(model).eval()
    sides = {1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    # Before it raises, torch.export prints all that it has read to stderr.
    silence = contextlib.redirect_stderr(io.StringIO())
    with _naming_the_part(model), silence, _exportable(), torch.no_grad():
        return torch.export.export(
            detector, (detector.example,), dynamic_shapes=(sides,), strict=False
        )


@contextlib.contextmanager
def _naming_the_part(model: nn.Module) -> Iterator[None]:
    """Turns an error inside a model into one line that says in which of its modules."""
    try:
        yield
    except Exception as error:
        names = {id(module): name for name, module in model.named_modules()}
        part: Any = model
        traceback = error.__traceback__
        while traceback:
            called = traceback.tb_frame.f_locals.get("self")
            part = called if names.get(id(called)) else part
            traceback = traceback.tb_next
        name = names[id(part)] or "the model"
        raise UserError(
            f"{name} ({type(part).__name__}) cannot be exported: {first_line(error)}"
        ) from error


# ----------------------------------------------------------------------- running what was exported


def run_onnx(path: str | Path) -> Run:
    """An ONNX file of :func:`carafe_d2.onnx.to_onnx` in ONNX Runtime, on the CPU.

    Raises:
        UserError: ONNX Runtime is missing.
    """
    require_packages("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    (image_name,) = (argument.name for argument in session.get_inputs())

    def run(image: Tensor) -> dict[str, Tensor]:
        outputs = session.run(None, {image_name: image.cpu().numpy()})
        return dict(zip(names, map(torch.from_numpy, outputs), strict=True))

    return run


def save_package(program: torch.export.ExportedProgram, path: str | Path) -> None:
    """Compiles a program by AOTInductor into a package, which runs without Python.

    CARAFE stays a call of the compiled operator: before a package is loaded, the library
    ``carafe_d2/_C.so`` has to be, and torchvision's.

    Args:
        program: of :func:`export_program`.
        path: ends in .pt2.

    Raises:
        UserError: it does not compile.
    """
    # Where the size of a batch depends on data, as that of masks does, the optimization chooses
    # channels_last, and a convolution reads what another one wrote in the wrong order.
    configs = {"layout_optimization": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torchvision's
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs=configs
            )
    except Exception as error:  # of two compilers, of any kind
        raise UserError(f"AOTInductor cannot compile it: {first_line(error)}") from error


def run_package(path: str | Path) -> Run:
    """A package of :func:`save_package`."""
    package = torch._inductor.aoti_load_package(str(path))
    return lambda image: package(image.contiguous())


# ----------------------------------------------------------------------------------- TorchScript


def trace(model: nn.Module, image: Tensor) -> tuple[torch.jit.ScriptModule, Run]:
    """Traces a detector as Detectron2's own ``export_model.py`` does.

    Args:
        model: one of Detectron2's meta-architectures, in evaluation mode.
        image: (3, H, W), in which something should be found.

    Returns:
        The traced model, which puts out a tuple, of an :class:`Instances` the fields in alphabetic
        order and then its image size; and what runs it and gives them their names.

    Raises:
        UserError: a part of the model cannot be traced; the message names it.
    """
    adapter = TracingAdapter(model, [{"image": image}], lambda m, inputs: [raw_outputs(m, inputs)])
    with _naming_the_part(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of every branch; Detectron2 minds those that matter
        traced = torch.jit.trace(adapter, (image,), check_trace=False)

    @torch.no_grad()
    def run(image: Tensor) -> dict[str, Tensor]:
        (outputs,) = adapter.outputs_schema(traced(image))
        return _tensors(outputs)

    return traced, run
