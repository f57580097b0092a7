"""MMDetection's checkpoints: recognized, and converted to Detectron2's layout and back.

The models are the same, so the conversion is one of names and of the order of rows; it is lossless.
Two layouts exist. That of MMDetection 2.x and 3.x keeps the RoI heads under ``roi_head`` and has
the background as the last class, like Detectron2. That of 1.x (2019) keeps them at the top, has the
background as the first class, and has rows for it also in box regression and mask prediction, which
no prediction uses. Names and orders come from the modules of MMDetection 1.x, 2.28 and 3.3.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from .errors import UserError

LAYOUTS = ("1.x", "2.x")

# More blocks in a stage, levels of a pyramid, and layers in a head than any model has.
_MOST_BLOCKS, _MOST_LAYERS = 100, 16
_CLASSES = "roi_heads.box_predictor.cls_score"
# What 1.x also predicts for the background, and how many rows each class has in it.
_ROWS_OF_A_CLASS = {"roi_heads.box_predictor.bbox_pred": 4, "roi_heads.mask_head.predictor": 1}
_ANCHOR_RATIOS = 3  # of RetinaNet's anchors, in all configs of either


@dataclasses.dataclass
class Converted:
    """A state dict of MMDetection in the layout of Detectron2."""

    weights: dict[str, Tensor]
    """Tensors by Detectron2's names."""
    layout: str
    """One of ``LAYOUTS``: that of the source."""
    background: dict[str, Tensor]
    """The rows for the background that only 1.x has, by Detectron2's names."""
    unknown: list[str]
    """Names in the source that nothing of Detectron2's corresponds to."""


def find_state_dict(content) -> Mapping[str, Tensor] | None:
    """The weights in what a file contains, if it is a checkpoint of MMDetection's, else None."""
    for key in ("model", "state_dict"):
        content = content.get(key, content) if isinstance(content, Mapping) else None
    if not isinstance(content, Mapping):
        return None
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        return None
    theirs = ("backbone.layer", "neck.", "rpn_head.", "roi_head.", "bbox_head.", "mask_head.")
    ours = ("backbone.bottom_up.", "proposal_generator.", "roi_heads.")
    if _any_starts_with(ours, content) or not _any_starts_with(theirs, content):
        return None
    return content


def to_detectron2(state_dict: Mapping[str, Tensor]) -> Converted:
    """Converts MMDetection's weights to the names and orders of Detectron2.

    Args:
        state_dict: weights of Faster R-CNN, Mask R-CNN or RetinaNet with a ResNet and a pyramid,
            FPN or FPN_CARAFE.

    Raises:
        UserError: the number of rows of the predictors is that of neither layout.
    """
    roi_heads = not _any_starts_with("bbox_head.retina_", state_dict)
    heads_at_the_top = _any_starts_with(("bbox_head.", "mask_head."), state_dict)
    layout = "1.x" if roi_heads and heads_at_the_top else "2.x"
    # In FPN_CARAFE every level has a lateral convolution.
    top_block = "neck.lateral_convs.3.conv.weight" not in state_dict
    modules = dict(_modules(layout, roi_heads=roi_heads, top_block=top_block))

    converted = Converted({}, layout, {}, [])
    for name, tensor in state_dict.items():
        new_name = _rename(name, modules)
        if new_name is None:
            converted.unknown.append(name)
        else:
            converted.weights[new_name] = tensor
    if layout == "1.x":
        _move_background_last(converted.weights, converted.background)
    _check_rows(converted.weights)
    _swap_anchor_order(converted.weights, ratio_major=True)
    return converted


def to_mmdet(
    weights: Mapping[str, Tensor],
    layout: str = "2.x",
    background: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Converts Detectron2's weights to the names and orders of MMDetection.

    Args:
        weights: as in ``Converted.weights``; what the config determines, such as the mean of the
            pixels in old checkpoints, is left out.
        layout: one of ``LAYOUTS``, the one to convert to.
        background: for 1.x the rows for the background, as in ``Converted.background``; without
            them they are zero. No prediction uses them.

    Returns:
        The state dict of MMDetection's model.

    Raises:
        UserError: something in weights has no place in MMDetection's models.
    """
    roi_heads = not _any_starts_with("head.", weights)
    pairs = _modules(layout, roi_heads=roi_heads, top_block=True)
    modules = {ours: theirs for theirs, ours in pairs}

    weights = dict(weights)
    for name in [name for name in weights if _is_constant(name)]:
        del weights[name]
    names = {name: new for name in weights if (new := _rename(name, modules)) is not None}
    unknown = [name for name in weights if name not in names]
    # Only batch normalization has the name "bn" in MMDetection.
    unknown += [
        name
        for name in weights
        if name.endswith(".norm.weight") and f"{name[:-6]}running_mean" not in weights
    ]
    if unknown:
        raise UserError(f"MMDetection's models have no place for {listed(unknown)}")
    _check_rows(weights)
    _swap_anchor_order(weights, ratio_major=False)
    if layout == "1.x":
        _move_background_first(weights, background)
    return {names[name]: tensor for name, tensor in weights.items()}


def differences(
    content: Mapping, converted: Converted, *, legacy_geometry: bool = False
) -> list[str]:
    """What the model of the checkpoint computes otherwise than the weights can tell.

    Args:
        content: the content of MMDetection's file.
        converted: its weights.
        legacy_geometry: whether the model that they are for has the geometry of 1.x.

    Returns:
        Sentences for the user, each with the config keys that account for the difference.
    """
    meta = content.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    config = str(meta.get("config") or meta.get("cfg") or "")
    version = str(meta.get("mmdet_version", ""))
    found = []
    if converted.layout == "1.x" or re.match(r"[01]\.", version):
        if not legacy_geometry:
            found.append(
                "MMDetection 1.x, of which these weights are, has another geometry of boxes; "
                "evaluate with the keys of configs/*_2019.yaml, first of all "
                "MODEL.META_ARCHITECTURE LegacyRCNN and MODEL.ANCHOR_GENERATOR.OFFSET 0.5."
            )
    elif legacy_geometry:
        found.append(
            "The model has the geometry of MMDetection 1.x, but these weights are of 2.x or 3.x; "
            "evaluate with a config that does not end in _2019."
        )
    if re.search(r"style\s*=\s*['\"]caffe['\"]", config):
        found.append(
            "The backbone is of 'caffe' style: evaluate with MODEL.RESNETS.STRIDE_IN_1X1 True and "
            "with the config's own mean and std, usually INPUT.FORMAT BGR, MODEL.PIXEL_MEAN "
            "[103.53,116.28,123.675], MODEL.PIXEL_STD [1.0,1.0,1.0]."
        )
    if "backbone.top_block.p7.weight" in converted.weights:
        found.append("Detectron2 applies a ReLU between p6 and p7, MMDetection's RetinaNet none.")
    return found


def class_names(content: Mapping) -> list[str] | None:
    """The names of the classes by label, if MMDetection's file holds them."""
    meta = content.get("meta")
    if not isinstance(meta, Mapping):
        return None
    dataset = meta.get("dataset_meta")  # of 3.x
    dataset = dataset if isinstance(dataset, Mapping) else {}
    names = dataset.get("classes") or dataset.get("CLASSES") or meta.get("CLASSES")
    return [*names] if isinstance(names, list | tuple) else None


def beside_weights(content: Mapping) -> list[str]:
    """What a file of either holds beside weights and meta information, such as an optimizer."""
    if not content.keys() & {"model", "state_dict"}:
        return []
    about = {"model", "state_dict", "meta", "mmdet", "__author__", "matching_heuristics"}
    return sorted(content.keys() - about)


def num_classes(weights: Mapping[str, Tensor]) -> int | None:
    """How many classes a detector tells apart, by its weights in Detectron2's layout."""
    if f"{_CLASSES}.bias" in weights:
        return len(weights[f"{_CLASSES}.bias"]) - 1  # without the background
    if "head.cls_score.bias" in weights and "head.bbox_pred.bias" in weights:
        return 4 * len(weights["head.cls_score.bias"]) // len(weights["head.bbox_pred.bias"])
    return None


def is_counter(name: str) -> bool:
    """Whether a weight only counts the batches that a batch normalization has seen."""
    return name.endswith(".num_batches_tracked")


def listed(names: Iterable[str]) -> str:
    """The first names, and how many there are."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _modules(layout: str, *, roi_heads: bool, top_block: bool) -> Iterator[tuple[str, str]]:
    """The names of a detector's modules in MMDetection and in Detectron2; a later pair counts."""
    yield from _convolution("backbone.", "backbone.bottom_up.stem.conv1", conv="conv1", norm="bn1")
    for stage, block in itertools.product((1, 2, 3, 4), range(_MOST_BLOCKS)):
        theirs, ours = (
            f"backbone.layer{stage}.{block}.",
            f"backbone.bottom_up.res{stage + 1}.{block}.",
        )
        for i in (1, 2, 3):
            yield from _convolution(theirs, f"{ours}conv{i}", conv=f"conv{i}", norm=f"bn{i}")
        yield from _convolution(theirs, f"{ours}shortcut", conv="downsample.0", norm="downsample.1")

    finest = 2 if roi_heads else 3
    for i in range(_MOST_LAYERS):
        yield from _convolution(f"neck.lateral_convs.{i}.", f"backbone.fpn_lateral{i + finest}")
        yield from _convolution(f"neck.fpn_convs.{i}.", f"backbone.fpn_output{i + finest}")
        # Both number an upsampler by the finer of its two levels.
        theirs, ours = f"neck.upsample_modules.{i}", f"backbone.fpn_upsample{i + finest}"
        yield theirs, ours  # deconvolution
        for name in ("channel_compressor", "content_encoder", "upsample_conv"):
            yield f"{theirs}.{name}", f"{ours}.{name}"

    if roi_heads:
        yield "rpn_head.rpn_conv", "proposal_generator.rpn_head.conv"
        yield "rpn_head.rpn_cls", "proposal_generator.rpn_head.objectness_logits"
        yield "rpn_head.rpn_reg", "proposal_generator.rpn_head.anchor_deltas"
        prefix = "" if layout == "1.x" else "roi_head."
        theirs, ours = f"{prefix}bbox_head.", "roi_heads.box_head."
        for i in range(_MOST_LAYERS):
            yield from _convolution(f"{theirs}shared_convs.{i}.", f"{ours}conv{i + 1}")
            yield f"{theirs}shared_fcs.{i}", f"{ours}fc{i + 1}"
        yield f"{theirs}fc_cls", "roi_heads.box_predictor.cls_score"
        yield f"{theirs}fc_reg", "roi_heads.box_predictor.bbox_pred"
        theirs, ours = f"{prefix}mask_head.", "roi_heads.mask_head."
        for i in range(_MOST_LAYERS):
            yield from _convolution(f"{theirs}convs.{i}.", f"{ours}mask_fcn{i + 1}")
        yield f"{theirs}upsample", f"{ours}deconv"
        for name in ("upsample.channel_compressor", "upsample.content_encoder"):
            yield theirs + name, ours + name
        yield f"{theirs}conv_logits", f"{ours}predictor"
    else:
        if top_block:  # p6 and p7 come from c5 and take no part in the top-down path
            yield "neck.fpn_convs.3.conv", "backbone.top_block.p6"
            yield "neck.fpn_convs.4.conv", "backbone.top_block.p7"
        for i in range(_MOST_LAYERS):  # Detectron2 counts the ReLUs in between
            yield f"bbox_head.cls_convs.{i}.conv", f"head.cls_subnet.{2 * i}"
            yield f"bbox_head.reg_convs.{i}.conv", f"head.bbox_subnet.{2 * i}"
        yield "bbox_head.retina_cls", "head.cls_score"
        yield "bbox_head.retina_reg", "head.bbox_pred"


def _convolution(
    theirs: str, ours: str, *, conv: str = "conv", norm: str = "bn"
) -> Iterator[tuple[str, str]]:
    """A convolution and its normalization, which Detectron2 has within the convolution."""
    yield theirs + conv, ours
    yield theirs + norm, f"{ours}.norm"


def _rename(name: str, modules: Mapping[str, str]) -> str | None:
    """The name of a parameter by the new names of modules; None if there is none for its own."""
    module, _, parameter = name.rpartition(".")
    return f"{modules[module]}.{parameter}" if module in modules else None


def _any_starts_with(prefixes: str | tuple[str, ...], names: Iterable[str]) -> bool:
    return any(name.startswith(prefixes) for name in names)


def _is_constant(name: str) -> bool:
    """Whether old checkpoints of Detectron2 hold it though the config determines it."""
    return name in ("pixel_mean", "pixel_std") or "anchor_generator.cell_anchors" in name


def _check_rows(weights: Mapping[str, Tensor]) -> None:
    """Checks that Detectron2's predictors agree on the number of classes or anchors."""
    deltas, scores = weights.get("head.bbox_pred.bias"), weights.get("head.cls_score.bias")
    if deltas is not None and scores is not None:
        anchors = len(deltas) // 4
        if len(deltas) % (4 * _ANCHOR_RATIOS) or len(scores) % anchors:
            raise UserError(
                f"RetinaNet predicts {len(scores)} scores and {len(deltas)} box deltas at a "
                f"location, which no number of anchors of {_ANCHOR_RATIOS} aspect ratios gives"
            )
    scores = weights.get(f"{_CLASSES}.bias")
    for module, rows in _ROWS_OF_A_CLASS.items():
        predictor = weights.get(f"{module}.bias")
        if scores is None or predictor is None:
            continue
        classes = len(scores) - 1
        if len(predictor) not in (rows, rows * classes):
            raise UserError(
                f"{module} has {len(predictor)} rows, where {classes} classes and the background "
                f"need {rows * classes}, or {rows} if it is class-agnostic"
            )


def _swap_anchor_order(weights: dict[str, Tensor], *, ratio_major: bool) -> None:
    """Swaps the order of RetinaNet's anchors at a location.

    MMDetection lists the scales of a ratio one after the other (ratio-major), Detectron2 the
    ratios of a scale.
    """
    if "head.bbox_pred.bias" not in weights:
        return
    anchors = len(weights["head.bbox_pred.bias"]) // 4
    outer = _ANCHOR_RATIOS if ratio_major else anchors // _ANCHOR_RATIOS
    for name in weights:
        if name.startswith(("head.cls_score.", "head.bbox_pred.")):
            grid = weights[name].unflatten(0, (outer, anchors // outer, -1))
            weights[name] = grid.transpose(0, 1).flatten(0, 2)


def _move_background_last(weights: dict[str, Tensor], background: dict[str, Tensor]) -> None:
    """Turns the classes of 1.x into Detectron2's, and sets aside the rows that it does not have."""
    for name, tensor in weights.items():
        module = name.rpartition(".")[0]
        rows = _ROWS_OF_A_CLASS.get(module)
        if module == _CLASSES:
            weights[name] = tensor.roll(-1, dims=0)
        elif rows and len(tensor) > rows:  # class-agnostic predictors have no background
            background[name], weights[name] = tensor[:rows].clone(), tensor[rows:].clone()


def _move_background_first(
    weights: dict[str, Tensor], background: Mapping[str, Tensor] | None
) -> None:
    """The reverse of :func:`_move_background_last`."""
    classes = len(weights.get(f"{_CLASSES}.bias", ())) - 1
    for name, tensor in weights.items():
        module = name.rpartition(".")[0]
        rows = _ROWS_OF_A_CLASS.get(module)
        if module == _CLASSES:
            weights[name] = tensor.roll(1, dims=0)
        elif rows and background is not None:
            weights[name] = torch.cat([background.get(name, tensor[:0]), tensor])
        elif rows and (len(tensor) > rows or classes == 1):
            weights[name] = torch.cat([torch.zeros_like(tensor[:rows]), tensor])
