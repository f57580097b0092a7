"""MMDetection's checkpoints: recognized, and converted to Detectron2's layout and back.

The models are the same, so the conversion is one of names and of the order of rows; it is lossless.
Two layouts exist. That of MMDetection 2.x and 3.x keeps the RoI heads under ``roi_head`` and has
the background as the last class, like Detectron2. That of 1.x (2019) keeps them at the top, has the
background as the first class, and has rows for it also in box regression and mask prediction, which
no prediction uses. Names and orders come from the modules of MMDetection 1.x, 2.28 and 3.3.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from .errors import UserError

LAYOUTS = ("1.x", "2.x")

# Modules by their names in MMDetection and in Detectron2. {i} stands for a number that both names
# contain, {i+1} for the one after it; L is the finest level of the pyramid.
_BACKBONE = [
    ("backbone.conv1", "backbone.bottom_up.stem.conv1"),
    ("backbone.bn1", "backbone.bottom_up.stem.conv1.norm"),
    ("backbone.layer{s}.{b}.conv{c}", "backbone.bottom_up.res{s+1}.{b}.conv{c}"),
    ("backbone.layer{s}.{b}.bn{c}", "backbone.bottom_up.res{s+1}.{b}.conv{c}.norm"),
    ("backbone.layer{s}.{b}.downsample.0", "backbone.bottom_up.res{s+1}.{b}.shortcut"),
    ("backbone.layer{s}.{b}.downsample.1", "backbone.bottom_up.res{s+1}.{b}.shortcut.norm"),
]
_NECK = [
    ("neck.lateral_convs.{i}.conv", "backbone.fpn_lateral{i+L}"),
    ("neck.lateral_convs.{i}.bn", "backbone.fpn_lateral{i+L}.norm"),
    ("neck.fpn_convs.{i}.conv", "backbone.fpn_output{i+L}"),
    ("neck.fpn_convs.{i}.bn", "backbone.fpn_output{i+L}.norm"),
    # Both number an upsampler by the finer of its two levels.
    (
        "neck.upsample_modules.{i}.channel_compressor",
        "backbone.fpn_upsample{i+L}.channel_compressor",
    ),
    ("neck.upsample_modules.{i}.content_encoder", "backbone.fpn_upsample{i+L}.content_encoder"),
    ("neck.upsample_modules.{i}.upsample_conv", "backbone.fpn_upsample{i+L}.upsample_conv"),
    ("neck.upsample_modules.{i}", "backbone.fpn_upsample{i+L}"),  # deconvolution
]
# The plain pyramid of RetinaNet: p6 and p7 come from c5 and take no part in the top-down path.
_RETINANET_TOP_BLOCK = [
    ("neck.fpn_convs.3.conv", "backbone.top_block.p6"),
    ("neck.fpn_convs.4.conv", "backbone.top_block.p7"),
]
_RPN_HEAD = [
    ("rpn_head.rpn_conv", "proposal_generator.rpn_head.conv"),
    ("rpn_head.rpn_cls", "proposal_generator.rpn_head.objectness_logits"),
    ("rpn_head.rpn_reg", "proposal_generator.rpn_head.anchor_deltas"),
]
_ROI_HEADS = [
    ("bbox_head.shared_convs.{i}.conv", "roi_heads.box_head.conv{i+1}"),
    ("bbox_head.shared_convs.{i}.bn", "roi_heads.box_head.conv{i+1}.norm"),
    ("bbox_head.shared_fcs.{i}", "roi_heads.box_head.fc{i+1}"),
    ("bbox_head.fc_cls", "roi_heads.box_predictor.cls_score"),
    ("bbox_head.fc_reg", "roi_heads.box_predictor.bbox_pred"),
    ("mask_head.convs.{i}.conv", "roi_heads.mask_head.mask_fcn{i+1}"),
    ("mask_head.convs.{i}.bn", "roi_heads.mask_head.mask_fcn{i+1}.norm"),
    ("mask_head.upsample.channel_compressor", "roi_heads.mask_head.upsample.channel_compressor"),
    ("mask_head.upsample.content_encoder", "roi_heads.mask_head.upsample.content_encoder"),
    ("mask_head.upsample", "roi_heads.mask_head.deconv"),
    ("mask_head.conv_logits", "roi_heads.mask_head.predictor"),
]
_RETINANET_HEAD = [
    # Detectron2 counts the ReLUs in between.
    *((f"bbox_head.cls_convs.{i}.conv", f"head.cls_subnet.{2 * i}") for i in range(8)),
    *((f"bbox_head.reg_convs.{i}.conv", f"head.bbox_subnet.{2 * i}") for i in range(8)),
    ("bbox_head.retina_cls", "head.cls_score"),
    ("bbox_head.retina_reg", "head.bbox_pred"),
]

_FIELD = re.compile(r"\{(\w)(?:\+(\d))?\}")
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
    if any(map(_startswith(ours), content)) or not any(map(_startswith(theirs), content)):
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
    roi_heads = not any(map(_startswith("bbox_head.retina_"), state_dict))
    heads_at_the_top = any(map(_startswith(("bbox_head.", "mask_head.")), state_dict))
    layout = "1.x" if roi_heads and heads_at_the_top else "2.x"
    # In FPN_CARAFE every level has a lateral convolution.
    top_block = "neck.lateral_convs.3.conv.weight" not in state_dict
    table = _table(layout, roi_heads=roi_heads, top_block=top_block)

    converted = Converted({}, layout, {}, [])
    for name, tensor in state_dict.items():
        new_name = _translate(name, table)
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
    roi_heads = not any(map(_startswith("head."), weights))
    table = _table(layout, roi_heads=roi_heads, top_block=True)
    table = [(ours, theirs) for theirs, ours in table]

    weights = dict(weights)
    for name in [name for name in weights if _is_constant(name)]:
        del weights[name]
    names = {name: new for name in weights if (new := _translate(name, table)) is not None}
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


def _table(layout: str, *, roi_heads: bool, top_block: bool) -> list[tuple[str, str]]:
    """The modules of a detector in MMDetection and in Detectron2; the first match counts."""
    neck = [(theirs, ours.replace("L", "2" if roi_heads else "3")) for theirs, ours in _NECK]
    if roi_heads:
        prefix = "" if layout == "1.x" else "roi_head."
        heads = [*_RPN_HEAD, *((prefix + theirs, ours) for theirs, ours in _ROI_HEADS)]
    else:
        neck = [*_RETINANET_TOP_BLOCK, *neck] if top_block else neck
        heads = _RETINANET_HEAD
    return [*_BACKBONE, *neck, *heads]


def _translate(name: str, table: list[tuple[str, str]]) -> str | None:
    """Renames a parameter by a table from one name to another; None if no row applies."""
    module, _, parameter = name.rpartition(".")
    for source, target in table:
        match = _pattern(source).fullmatch(module)
        if match:
            offsets = {letter: int(offset or 0) for letter, offset in _FIELD.findall(source)}
            numbers = {letter: int(n) - offsets[letter] for letter, n in match.groupdict().items()}

            def number(field: re.Match, numbers: dict[str, int] = numbers) -> str:
                return str(numbers[field[1]] + int(field[2] or 0))

            return f"{_FIELD.sub(number, target)}.{parameter}"
    return None


@functools.cache
def _pattern(template: str) -> re.Pattern:
    return re.compile(_FIELD.sub(r"(?P<\1>\\d+)", template.replace(".", r"\.")))


def _startswith(prefixes: str | tuple[str, ...]) -> Callable[[str], bool]:
    return lambda name: name.startswith(prefixes)


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
