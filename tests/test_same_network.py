"""Our detectors against the published ones.

What MMDetection computes from an image and a set of weights is written out here from its published
description, in plain PyTorch and without Detectron2: in the geometry of 2.x (2020 and later) and in
that of 1.x (2019). docs/fidelity.md lists constant by constant what is compared.
"""

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import build_model
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.structures import Boxes
from torch.nn import functional as F

from carafe_d2.config import load_config

CONFIGS = Path(__file__).parents[1] / "configs"
STRIDES = (4, 8, 16, 32, 64)
# The published models with fewer layers and channels, and fewer proposals and classes.
SMALL = [
    *("MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"),
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.FPN.OUT_CHANNELS", "32", "MODEL.CARAFE.COMPRESSED_CHANNELS", "16"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "64", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", "5"),
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", "300", "MODEL.RPN.POST_NMS_TOPK_TEST", "200"),
]
# Spread of what the predictors put out, so that no score, box shift or mask is like another.
SPREAD = {
    "proposal_generator.rpn_head.objectness_logits": 0.5,
    "proposal_generator.rpn_head.anchor_deltas": 0.15,
    "roi_heads.box_predictor.cls_score": 3.0,
    "roi_heads.box_predictor.bbox_pred": 1.0,
    "roi_heads.mask_head.predictor": 2.0,
}


def small_model(name, inputs):
    """A model with random weights, whose predictors are spread on the given inputs."""
    torch.manual_seed(0)
    model = build_model(load_config(str(CONFIGS / f"{name}.yaml"), SMALL)).eval()
    for parameter, weight in model.named_parameters():
        if parameter.endswith("content_encoder.weight"):
            weight.data.normal_(std=0.05)
    for layer, std in SPREAD.items():
        spread_outputs(model.get_submodule(layer), std)
    with torch.no_grad():
        model(inputs)
    return model


def spread_outputs(layer, std):
    """Gives the layer's outputs mean 0 and the given deviation when it runs for the first time."""

    def spread(layer, args, out):
        hook.remove()
        out = out.transpose(0, 1).flatten(1)
        scale = std / out.std(1)
        layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
        layer.bias.sub_(out.mean(1)).mul_(scale)
        return layer(*args)

    hook = layer.register_forward_hook(spread)


def picture(height, width):
    """A smooth random image, (3, height, width), uint8."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    image = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return torch.from_numpy(image).permute(2, 0, 1)


# --- the published network ----------------------------------------------------------------------


class Published:
    """MMDetection's Mask R-CNN with CARAFE on an image, from the pyramid on.

    Args:
        weights: of our model; their names are all that is taken from it.
        pixel: 0 for the geometry of 2.x, where boxes name their edges, 1 for that of 1.x, where
            they name their first and last pixel.
    """

    def __init__(self, weights, pixel):
        self.weights = weights
        self.pixel = pixel

    def conv(self, name, x, **options):
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **options)

    def linear(self, name, x):
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def carafe(self, name, x):
        """Paper, equations 1 to 4, for k_up = 5, k_encoder = 3, sigma = 2 and one group."""
        n, c, h, w = x.shape
        logits = self.conv(f"{name}.channel_compressor", x)
        logits = self.conv(f"{name}.content_encoder", logits, padding=1)
        # A location's 100 logits are, for each of 25 taps, those of 2 x 2 output pixels.
        kernels = logits.view(n, 25, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).softmax(1)
        taps = F.unfold(x, 5, padding=2).view(n, c, 25, h, 1, w, 1)
        return (taps * kernels[:, None]).sum(2).reshape(n, c, 2 * h, 2 * w)

    def pyramid(self, c2, c3, c4, c5):
        laterals = [
            self.conv(f"backbone.fpn_lateral{level}", c)
            for level, c in enumerate((c2, c3, c4, c5), start=2)
        ]
        laterals.append(self.conv("backbone.fpn_lateral6", c5, stride=2, padding=1))
        for i in (4, 3, 2, 1):
            upsampled = self.carafe(f"backbone.fpn_upsample{i + 1}", laterals[i])
            h, w = laterals[i - 1].shape[-2:]
            laterals[i - 1] = laterals[i - 1] + upsampled[..., :h, :w]
        return [
            self.conv(f"backbone.fpn_output{level}", lateral, padding=1)
            for level, lateral in enumerate(laterals, start=2)
        ]

    def anchors(self, stride, height, width):
        """Of one level: (height * width * 3, 4)."""
        center = 0.5 * (stride - 1) if self.pixel else 0.0
        cell = []
        for ratio in (0.5, 1.0, 2.0):
            w, h = 8 * stride / math.sqrt(ratio), 8 * stride * math.sqrt(ratio)
            dx, dy = 0.5 * (w - self.pixel), 0.5 * (h - self.pixel)
            cell.append([center - dx, center - dy, center + dx, center + dy])
        cell = torch.tensor(cell)
        if self.pixel:
            cell = cell.round()
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        shifts = torch.stack([x, y, x, y], -1).view(-1, 1, 4) * stride
        return (shifts + cell).view(-1, 4)

    def decode(self, boxes, deltas, stds, height, width):
        """Boxes (N, 4) moved by deltas (N, 4) and clipped to the image."""
        dx, dy, dw, dh = (deltas * torch.tensor(stds)).unbind(-1)
        limit = abs(math.log(16 / 1000))
        dw, dh = dw.clamp(-limit, limit), dh.clamp(-limit, limit)
        w = boxes[:, 2] - boxes[:, 0] + self.pixel
        h = boxes[:, 3] - boxes[:, 1] + self.pixel
        cx = (boxes[:, 0] + boxes[:, 2]) / 2 + w * dx
        cy = (boxes[:, 1] + boxes[:, 3]) / 2 + h * dy
        half_w, half_h = (w * dw.exp() - self.pixel) / 2, (h * dh.exp() - self.pixel) / 2
        # 1.x also keeps the first pixel inside, so that a sliver is left of every box that lies
        # outside of the image; here such a box becomes empty, as it does in Detectron2.
        return torch.stack(
            [
                (cx - half_w).clamp(0, width),
                (cy - half_h).clamp(0, height),
                (cx + half_w).clamp(-self.pixel, width - self.pixel),
                (cy + half_h).clamp(-self.pixel, height - self.pixel),
            ],
            -1,
        )

    def nms(self, boxes, scores, threshold):
        """Indices of the boxes that are kept, best first."""
        order = scores.argsort(descending=True)
        kept = []
        while len(order):
            best, order = order[0], order[1:]
            kept.append(best)
            inner = torch.minimum(boxes[best, 2:], boxes[order, 2:]) + self.pixel
            inner = (inner - torch.maximum(boxes[best, :2], boxes[order, :2])).clamp(min=0)
            areas = (boxes[:, 2:] - boxes[:, :2] + self.pixel).prod(-1)
            intersection = inner.prod(-1)
            iou = intersection / (areas[best] + areas[order] - intersection)
            order = order[iou <= threshold]
        return torch.tensor([int(k) for k in kept], dtype=torch.long)

    def proposals(self, features, height, width, before_nms, after_nms):
        """The region proposals (N, 4) and their scores (N,)."""
        boxes, scores = [], []
        for stride, p in zip(STRIDES, features, strict=True):
            hidden = self.conv("proposal_generator.rpn_head.conv", p, padding=1).relu()
            logits = self.conv("proposal_generator.rpn_head.objectness_logits", hidden)
            deltas = self.conv("proposal_generator.rpn_head.anchor_deltas", hidden)
            level_scores = logits[0].permute(1, 2, 0).reshape(-1).sigmoid()
            level_scores, top = level_scores.topk(min(before_nms, len(level_scores)))
            anchors = self.anchors(stride, *p.shape[-2:])[top]
            deltas = deltas[0].permute(1, 2, 0).reshape(-1, 4)[top]
            level_boxes = self.decode(anchors, deltas, (1.0, 1.0, 1.0, 1.0), height, width)
            nonempty = (level_boxes[:, 2:] + self.pixel > level_boxes[:, :2]).all(-1)
            level_boxes, level_scores = level_boxes[nonempty], level_scores[nonempty]
            kept = self.nms(level_boxes, level_scores, 0.7)
            boxes.append(level_boxes[kept])
            scores.append(level_scores[kept])
        boxes, scores = torch.cat(boxes), torch.cat(scores)
        scores, top = scores.topk(min(after_nms, len(scores)))
        return boxes[top], scores

    def pooled(self, features, boxes, size):
        """RoI features (N, C, size, size) from the level that fits each box."""
        sides = (boxes[:, 2:] - boxes[:, :2] + self.pixel).prod(-1).sqrt()
        levels = torch.log2(sides / 56 + 1e-6).floor().clamp(0, 3)
        out = torch.zeros(len(boxes), features[0].shape[1], size, size)
        rois = F.pad(boxes, (1, 0))
        rois[:, 3:] += self.pixel
        for level, (stride, p) in enumerate(zip(STRIDES[:4], features[:4], strict=True)):
            out[levels == level] = torchvision.ops.roi_align(
                p,
                rois[levels == level],
                size,
                spatial_scale=1 / stride,
                sampling_ratio=2 if self.pixel else 0,
                aligned=not self.pixel,
            )
        return out

    def detections(self, features, proposals, height, width):
        """Boxes (N, 4), scores (N,) and classes (N,) at the size of the network's input."""
        hidden = self.pooled(features, proposals, 7).flatten(1)
        hidden = self.linear("roi_heads.box_head.fc1", hidden).relu()
        hidden = self.linear("roi_heads.box_head.fc2", hidden).relu()
        probabilities = self.linear("roi_heads.box_predictor.cls_score", hidden).softmax(-1)
        deltas = self.linear("roi_heads.box_predictor.bbox_pred", hidden)
        boxes, scores, classes = [], [], []
        for c in range(probabilities.shape[1] - 1):
            good = probabilities[:, c] > 0.05
            moved = self.decode(
                proposals[good],
                deltas[good, 4 * c : 4 * c + 4],
                (0.1, 0.1, 0.2, 0.2),
                height,
                width,
            )
            kept = self.nms(moved, probabilities[good, c], 0.5)
            boxes.append(moved[kept])
            scores.append(probabilities[good, c][kept])
            classes.append(torch.full_like(kept, c))
        boxes, scores, classes = torch.cat(boxes), torch.cat(scores), torch.cat(classes)
        scores, top = scores.topk(min(100, len(scores)))
        return boxes[top], scores, classes[top]

    def masks(self, features, boxes, classes):
        """Mask probabilities (N, 28, 28) of the predicted classes."""
        x = self.pooled(features, boxes, 14)
        for i in (1, 2, 3, 4):
            x = self.conv(f"roi_heads.mask_head.mask_fcn{i}", x, padding=1).relu()
        x = self.carafe("roi_heads.mask_head.upsample", x)
        x = self.conv("roi_heads.mask_head.predictor", x)
        return x[torch.arange(len(x)), classes].sigmoid()

    def in_original(self, boxes, masks, scales, height, width):
        """Boxes (N, 4) and masks (N, height, width) in the original image.

        Args:
            scales: how many times the network's input is as wide and as high.
        """
        if not self.pixel:
            boxes = boxes / torch.tensor([*scales, *scales])
            return boxes, torch.stack(
                [paste_by_edges(m, b, height, width) for m, b in zip(masks, boxes, strict=True)]
            )
        boxes = boxes / scales[1]
        pasted = torch.zeros(len(boxes), height, width, dtype=torch.bool)
        for mask, canvas, box in zip(masks, pasted, boxes, strict=True):
            x1, y1, x2, y2 = (int(v) for v in box)
            stretched = cv2.resize(mask.numpy(), (x2 - x1 + 1, y2 - y1 + 1))
            canvas[y1 : y2 + 1, x1 : x2 + 1] = torch.from_numpy(stretched > 0.5)
        # COCO's box is then x1, y1, x2 - x1 + 1, y2 - y1 + 1.
        return boxes + torch.tensor([0, 0, 1, 1]), pasted


def paste_by_edges(mask, box, height, width):
    """The mask's values at the centers of the image's pixels, bilinear, zero outside, >= 0.5."""
    x1, y1, x2, y2 = box.tolist()
    x = (torch.arange(width) + 0.5 - x1) / (x2 - x1) * 28 - 0.5
    y = (torch.arange(height) + 0.5 - y1) / (y2 - y1) * 28 - 0.5

    def weights(position):  # (pixels, 28): of each row or column of the mask
        return (1 - (position[:, None] - torch.arange(28)).abs()).clamp(min=0)

    return weights(y) @ mask @ weights(x).T >= 0.5


# --- ours against it ----------------------------------------------------------------------------

# Config and geometry. Neither side of the image is a multiple of 64.
MODELS = [("mask_rcnn_R50_FPN_carafe_1x", 0), ("mask_rcnn_R50_FPN_carafe_1x_2019", 1)]
ORIGINAL = (120, 165)
RESIZED = (240, 330)


@pytest.fixture(scope="module", params=MODELS, ids=["2.x", "1.x"])
def run(request):
    """Both models' results on one image."""
    name, pixel = request.param
    image = picture(*RESIZED)
    inputs = [{"image": image, "height": ORIGINAL[0], "width": ORIGINAL[1]}]
    model = small_model(name, inputs)
    published = Published(model.state_dict(), pixel)

    with torch.no_grad():
        images = model.preprocess_image(inputs)
        ours = {"image": images.tensor, "pyramid": list(model.backbone(images.tensor).values())}
        features = dict(zip(("p2", "p3", "p4", "p5", "p6"), ours["pyramid"], strict=True))
        ours["proposals"] = model.proposal_generator(images, features, None)[0][0]
        ours["instances"] = model(inputs)[0]["instances"]

        mean, std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])
        theirs = {"image": (image - mean[:, None, None]) / std[:, None, None]}
        theirs["image"] = F.pad(theirs["image"], (0, 384 - 330, 0, 256 - 240))[None]
        theirs["pyramid"] = published.pyramid(*model.backbone.bottom_up(theirs["image"]).values())
        proposals, scores = published.proposals(theirs["pyramid"], *RESIZED, 300, 200)
        theirs["proposals"], theirs["proposal_scores"] = proposals, scores
        detections = published.detections(theirs["pyramid"], proposals, *RESIZED)
        boxes, theirs["scores"], theirs["classes"] = detections
        masks = published.masks(theirs["pyramid"], boxes, theirs["classes"])
        scales = (RESIZED[1] / ORIGINAL[1], RESIZED[0] / ORIGINAL[0])
        theirs["boxes"], theirs["masks"] = published.in_original(boxes, masks, scales, *ORIGINAL)
    return model, published, ours, theirs


def test_normalized_and_padded_image(run):
    _, _, ours, theirs = run
    torch.testing.assert_close(ours["image"], theirs["image"])


def test_pyramid(run):
    _, _, ours, theirs = run
    for level, (p, published) in enumerate(zip(ours["pyramid"], theirs["pyramid"], strict=True)):
        assert p.shape[-2:] == (256 >> (level + 2), 384 >> (level + 2))
        torch.testing.assert_close(p, published, rtol=1e-4, atol=1e-5 * published.abs().max())


def assert_same_boxes(boxes, expected):
    """To a hundredth of a pixel; boxes of equal scores may come in any order."""
    assert boxes.shape == expected.shape
    distances = (boxes[:, None] - expected).abs().amax(-1)
    assert distances.amin(0).max() < 0.01
    assert distances.amin(1).max() < 0.01


def test_proposals(run):
    _, published, ours, theirs = run
    boxes = theirs["proposals"] + torch.tensor([0, 0, published.pixel, published.pixel])
    assert len(boxes) == 200
    assert len(theirs["proposal_scores"].unique()) > 190, "scores leave the order open"
    assert_same_boxes(ours["proposals"].proposal_boxes.tensor, boxes)
    scores = ours["proposals"].objectness_logits.sigmoid()
    torch.testing.assert_close(scores, theirs["proposal_scores"], rtol=1e-4, atol=1e-4)


def partners(instances, theirs):
    """For each published detection the index of ours at its place and of its class."""
    distances = (instances.pred_boxes.tensor - theirs["boxes"][:, None]).abs().amax(-1)
    distances += 1000 * (instances.pred_classes != theirs["classes"][:, None])
    nearest = distances.min(1)
    assert nearest.values.max() < 0.01
    assert sorted(nearest.indices.tolist()) == list(range(len(instances)))
    return nearest.indices


def test_detections(run):
    _, _, ours, theirs = run
    assert len(theirs["boxes"]) > 20
    assert len(theirs["classes"].unique()) > 2
    scores = ours["instances"].scores[partners(ours["instances"], theirs)]
    torch.testing.assert_close(scores, theirs["scores"], rtol=1e-3, atol=1e-4)


def test_masks(run):
    _, _, ours, theirs = run
    masks = ours["instances"].pred_masks[partners(ours["instances"], theirs)]
    assert 0.005 < theirs["masks"].float().mean() < 0.5
    # A pixel whose probability is a hair's breadth from one half may differ.
    assert (masks != theirs["masks"]).float().mean() < 1e-4


def test_pyramid_of_a_size_that_is_no_multiple_of_64(run):
    model, published, _, _ = run
    image = torch.randn(1, 3, 202, 330)
    with torch.no_grad():
        ours = model.backbone(image).values()
        theirs = published.pyramid(*model.backbone.bottom_up(image).values())
    for p, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


def test_anchors(run):
    model, published, _, _ = run
    sizes = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    features = [torch.zeros(1, 1, *size) for size in sizes]
    ours = model.proposal_generator.anchor_generator(features)
    for anchors, stride, size in zip(ours, STRIDES, sizes, strict=True):
        expected = published.anchors(stride, *size)
        expected[:, 2:] += published.pixel
        torch.testing.assert_close(anchors.tensor, expected)


@pytest.mark.parametrize(
    ("head", "stds"),
    [("proposal_generator", (1.0,) * 4), ("roi_heads.box_predictor", (0.1, 0.1, 0.2, 0.2))],
)
def test_box_coding(run, head, stds):
    model, published, _, _ = run
    transform = model.get_submodule(head).box2box_transform
    boxes = torch.rand(1000, 4) * 100 + torch.tensor([100, 100, 220, 220])
    # Enlargements of up to e**10 are limited to 1000 / 16 on both sides.
    deltas = torch.cat([torch.randn(1000, 2), torch.rand(1000, 2) * 14 - 4], 1) / torch.tensor(stds)
    edges = torch.tensor([0, 0, published.pixel, published.pixel])
    moved = Boxes(transform.apply_deltas(deltas, boxes))
    moved.clip((400, 600))
    expected = published.decode(boxes - edges, deltas, stds, 400, 600) + edges
    torch.testing.assert_close(moved.tensor, expected, rtol=1e-5, atol=1e-3)


def test_levels_that_boxes_are_pooled_from(run):
    _, published, _, _ = run
    # Sides from 10 to 1280 pixels, and the very ones where levels change.
    sides = torch.cat([10 * 2 ** torch.linspace(0, 7, 1000), torch.tensor([112.0, 224.0, 448.0])])
    features = [torch.full((1, 1, 40, 40), float(level)) for level in range(4)]
    corners = torch.zeros(len(sides), 2)
    boxes = torch.cat([corners, corners + sides[:, None]], 1)
    edges = torch.tensor([0, 0, published.pixel, published.pixel])
    expected = published.pooled(features, boxes - edges, 1).flatten()
    assert expected[-3:].tolist() == [1, 2, 3]
    # Detectron2's own arguments: levels 2 to 5, and side 224 on level 4.
    levels = assign_boxes_to_levels([Boxes(boxes)], 2, 5, 224, 4)
    assert torch.equal(levels.float(), expected.round())


def test_resized_image():
    """Same size but for a pixel in rare cases, and the same picture to one gray level."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(100, 641, (2000, 2)).tolist()
    different = 0
    for height, width in sizes:
        scale = min(1333 / max(height, width), 800 / min(height, width))
        expected = int(height * scale + 0.5), int(width * scale + 0.5)
        ours = ResizeShortestEdge.get_output_shape(height, width, 800, 1333)
        assert np.abs(np.subtract(ours, expected)).max() <= 1
        different += tuple(ours) != expected
    assert different <= 5

    image = picture(427, 640).permute(1, 2, 0).numpy()
    ours = ResizeShortestEdge(800, 1333).get_transform(image).apply_image(image)
    theirs = cv2.resize(image, (1199, 800), interpolation=cv2.INTER_LINEAR)
    assert np.abs(ours.astype(int) - theirs).max() <= 1
