"""The geometry of MMDetection 1.x, in which the checkpoints of 2019 were trained.

There a box names its first and its last pixel, so that its width is x2 - x1 + 1. Put x2 + 1 in the
place of x2, and most of it is Detectron2's geometry, in which a box names its edges: box coding,
NMS and the level that a box is pooled from agree, and config keys set the anchors' offset and the
pooling. Left are the anchors, which are rounded, and how boxes and masks are brought to another
image size. This module has these; ``configs/*_2019.yaml`` select them.
"""

import torch
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, DefaultAnchorGenerator
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.nn import functional as F


@ANCHOR_GENERATOR_REGISTRY.register()
class LegacyAnchorGenerator(DefaultAnchorGenerator):
    """Anchors with corners on whole pixels; MODEL.ANCHOR_GENERATOR.OFFSET has to be 0.5."""

    def generate_cell_anchors(self, *args, **kwargs) -> Tensor:
        # They are rounded after they are moved to the middle of a cell, a whole pixel for every
        # even stride.
        return super().generate_cell_anchors(*args, **kwargs).round()


@META_ARCH_REGISTRY.register()
class LegacyRCNN(GeneralizedRCNN):
    """GeneralizedRCNN that resizes boxes and pastes masks like MMDetection 1.x.

    Its inputs and outputs are those of :class:`detectron2.modeling.GeneralizedRCNN`.
    """

    def forward(self, batched_inputs: list[dict]):
        if self.training:
            batched_inputs = [{**x, "instances": _resized_targets(x)} for x in batched_inputs]
        return super().forward(batched_inputs)

    def inference(self, batched_inputs, detected_instances=None, do_postprocess: bool = True):
        results = super().inference(batched_inputs, detected_instances, do_postprocess=False)
        if not do_postprocess:
            return results
        return [
            {"instances": _resize_results(r, x.get("height"), x.get("width"))}
            for r, x in zip(results, batched_inputs, strict=True)
        ]


def _resized_targets(inputs: dict) -> Instances:
    """The instances of a training image, with boxes that were resized as first and last pixels.

    Detectron2 resized their edges. Boxes that shrink to nothing are dropped, as in MMDetection.
    """
    image, instances = inputs["image"], inputs["instances"]
    scale = _scale(image.shape[-2:], inputs["height"], inputs["width"])
    boxes = instances.gt_boxes.tensor.clone()
    boxes[:, 2:] -= scale - 1
    instances = Instances(instances.image_size, **instances.get_fields())
    instances.gt_boxes = Boxes(boxes)
    return instances[instances.gt_boxes.nonempty()]


def _resize_results(results: Instances, height: int | None, width: int | None) -> Instances:
    """Brings one image's predictions to the size of the output.

    Args:
        results: predictions at the size that the network saw, with masks (N, 1, M, M).
        height, width: of the output; None is the size that the network saw.

    Returns:
        The predictions in the output's coordinates, with masks (N, height, width).
    """
    height, width = height or results.image_size[0], width or results.image_size[1]
    boxes = results.pred_boxes.tensor.clone()
    boxes[:, 2:] = (boxes[:, 2:] - 1).clamp(min=0)
    boxes /= _scale(results.image_size, height, width)

    resized = Instances((height, width), **results.get_fields())
    if results.has("pred_masks"):
        resized.pred_masks = _paste_masks(results.pred_masks[:, 0], boxes, height, width)
    boxes[:, 2:] += 1
    resized.pred_boxes = Boxes(boxes)
    return resized


def _scale(image_size: tuple[int, int], height: int, width: int) -> float:
    """The one factor for both axes; the shorter side is seldom rounded when images are resized."""
    return min(image_size) / min(height, width)


def _paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Stretches each mask over the whole pixels from the first to the last one of its box.

    Args:
        masks: probabilities (N, M, M).
        boxes: first and last pixels (N, 4), in the coordinates of the image.
        height, width: of the image.

    Returns:
        (N, height, width), bool.
    """
    pasted = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    for mask, image, (x1, y1, x2, y2) in zip(masks, pasted, boxes.int().tolist(), strict=True):
        region = image[y1 : y2 + 1, x1 : x2 + 1]
        size = (max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1))
        stretched = F.interpolate(mask[None, None], size=size, mode="bilinear")[0, 0]
        region[:] = stretched[: region.shape[0], : region.shape[1]] > 0.5
    return pasted
