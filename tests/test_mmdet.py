"""Checkpoints in the layouts of MMDetection, loaded into the models of configs/."""

import functools
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.modeling import build_model

from carafe_d2 import CarafeCheckpointer, mmdet
from carafe_d2.config import load_config
from carafe_d2.errors import UserError

# The modules of MMDetection 2.x and 3.x that have parameters, and those of Detectron2 that compute
# the same, written down from the sources of both. 1.x lacks "roi_head.".
RPN_AND_BOXES = [
    ("rpn_head.rpn_conv", "proposal_generator.rpn_head.conv"),
    ("rpn_head.rpn_cls", "proposal_generator.rpn_head.objectness_logits"),
    ("rpn_head.rpn_reg", "proposal_generator.rpn_head.anchor_deltas"),
    ("roi_head.bbox_head.fc_cls", "roi_heads.box_predictor.cls_score"),
    ("roi_head.bbox_head.fc_reg", "roi_heads.box_predictor.bbox_pred"),
    ("roi_head.bbox_head.shared_fcs.0", "roi_heads.box_head.fc1"),
    ("roi_head.bbox_head.shared_fcs.1", "roi_heads.box_head.fc2"),
]
MASKS = [
    *(
        (f"roi_head.mask_head.convs.{i}.conv", f"roi_heads.mask_head.mask_fcn{i + 1}")
        for i in range(4)
    ),
    ("roi_head.mask_head.conv_logits", "roi_heads.mask_head.predictor"),
]
MASK_DECONVOLUTION = [("roi_head.mask_head.upsample", "roi_heads.mask_head.deconv")]


def carafe(theirs, ours):
    return [
        (f"{theirs}.{name}", f"{ours}.{name}") for name in ("channel_compressor", "content_encoder")
    ]


def pyramid(convolutions, upsamplers, finest):
    """A pyramid of so many levels with lateral convolutions and so many CARAFEs."""
    pairs = []
    for i in range(convolutions):
        pairs.append((f"neck.lateral_convs.{i}.conv", f"backbone.fpn_lateral{finest + i}"))
        pairs.append((f"neck.fpn_convs.{i}.conv", f"backbone.fpn_output{finest + i}"))
    for i in range(upsamplers):
        pairs += carafe(f"neck.upsample_modules.{i}", f"backbone.fpn_upsample{finest + i}")
    return pairs


MASK_CARAFE = carafe("roi_head.mask_head.upsample", "roi_heads.mask_head.upsample")
PYRAMID = pyramid(4, 0, finest=2)
CARAFE_PYRAMID = pyramid(5, 4, finest=2)
RETINANET_P6_P7 = [
    ("neck.fpn_convs.3.conv", "backbone.top_block.p6"),
    ("neck.fpn_convs.4.conv", "backbone.top_block.p7"),
]
RETINANET_HEAD = [
    *((f"bbox_head.cls_convs.{i}.conv", f"head.cls_subnet.{2 * i}") for i in range(4)),
    *((f"bbox_head.reg_convs.{i}.conv", f"head.bbox_subnet.{2 * i}") for i in range(4)),
    ("bbox_head.retina_cls", "head.cls_score"),
    ("bbox_head.retina_reg", "head.bbox_pred"),
]
DETECTORS = {
    "faster_rcnn_R50_FPN_1x": PYRAMID + RPN_AND_BOXES,
    "faster_rcnn_R50_FPN_carafe_1x": CARAFE_PYRAMID + RPN_AND_BOXES,
    "mask_rcnn_R50_FPN_1x": PYRAMID + RPN_AND_BOXES + MASKS + MASK_DECONVOLUTION,
    "mask_rcnn_R50_FPN_carafe_1x": CARAFE_PYRAMID + RPN_AND_BOXES + MASKS + MASK_CARAFE,
    "retinanet_R50_FPN_1x": pyramid(3, 0, finest=3) + RETINANET_P6_P7 + RETINANET_HEAD,
    "retinanet_R50_FPN_carafe_1x": pyramid(5, 4, finest=3) + RETINANET_HEAD,
}
# The modules of MMDetection 3.3's mask-rcnn_r50_fpn-carafe_1x_coco behind the backbone, with the
# shapes of their weights; each has a bias.
CONV_3X3 = [256, 256, 3, 3]
CARAFE_SHAPES = {"channel_compressor": [64, 256, 1, 1], "content_encoder": [100, 64, 3, 3]}
PUBLISHED_SHAPES = {
    **{f"neck.lateral_convs.{i}.conv": [256, 256 * 2**i, 1, 1] for i in range(4)},
    "neck.lateral_convs.4.conv": [256, 2048, 3, 3],
    **{f"neck.fpn_convs.{i}.conv": CONV_3X3 for i in range(5)},
    **{f"neck.upsample_modules.{i}.{k}": v for i in range(4) for k, v in CARAFE_SHAPES.items()},
    "rpn_head.rpn_conv": CONV_3X3,
    "rpn_head.rpn_cls": [3, 256, 1, 1],
    "rpn_head.rpn_reg": [12, 256, 1, 1],
    "roi_head.bbox_head.fc_cls": [81, 1024],
    "roi_head.bbox_head.fc_reg": [320, 1024],
    "roi_head.bbox_head.shared_fcs.0": [1024, 12544],
    "roi_head.bbox_head.shared_fcs.1": [1024, 1024],
    **{f"roi_head.mask_head.convs.{i}.conv": CONV_3X3 for i in range(4)},
    **{f"roi_head.mask_head.upsample.{k}": v for k, v in CARAFE_SHAPES.items()},
    "roi_head.mask_head.conv_logits": [80, 256, 1, 1],
}
CONFIGS = Path(__file__).parents[1] / "configs"
CLASSES = 5
assert_same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)
# Says nothing of which parameters a model has.
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "8"),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", "16", "MODEL.CARAFE.COMPRESSED_CHANNELS", "4"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", str(CLASSES), "MODEL.RETINANET.NUM_CLASSES", str(CLASSES)),
]


@functools.cache
def build(config, *overrides):
    """A small model of a config; tests share it and load weights of their own."""
    return build_model(load_config(str(CONFIGS / f"{config}.yaml"), [*SMALL, *overrides])).eval()


def resnet_modules(blocks, convolutions):
    """Pairs of the modules of a torchvision ResNet in MMDetection and in Detectron2."""
    yield "backbone.conv1", "backbone.bottom_up.stem.conv1"
    yield "backbone.bn1", "backbone.bottom_up.stem.conv1.norm"
    for stage, count in enumerate(blocks, start=1):
        for block in range(count):
            theirs = f"backbone.layer{stage}.{block}"
            ours = f"backbone.bottom_up.res{stage + 1}.{block}"
            for i in range(1, convolutions + 1):
                yield f"{theirs}.conv{i}", f"{ours}.conv{i}"
                yield f"{theirs}.bn{i}", f"{ours}.conv{i}.norm"
            if block == 0 and (stage > 1 or convolutions == 3):
                yield f"{theirs}.downsample.0", f"{ours}.shortcut"
                yield f"{theirs}.downsample.1", f"{ours}.shortcut.norm"


def module_pairs(config, blocks=(2, 2, 2, 2), convolutions=2):
    return [*resnet_modules(blocks, convolutions), *DETECTORS[config]]


def parameter_pairs(config, model):
    """Pairs of parameter names in MMDetection and in the model: all that the model has."""
    weights = model.state_dict()
    pairs = [
        (f"{theirs}.{kind}", f"{ours}.{kind}")
        for theirs, ours in module_pairs(config)
        for kind in ("weight", "bias", "running_mean", "running_var")
        if f"{ours}.{kind}" in weights
    ]
    assert {ours for _, ours in pairs} == weights.keys()
    return pairs


def random_state_dict(shapes):
    """Random weights, and for every running variance the counter of its batches."""
    generator = torch.Generator().manual_seed(0)
    state_dict = {}
    for name, shape in shapes.items():
        state_dict[name] = torch.rand(shape, generator=generator)
        if name.endswith("running_var"):
            state_dict[name.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    return state_dict


def synthetic(config, model, layout="2.x", background=True):
    """A state dict of MMDetection's for a model, and the pairs of its names with the model's."""
    pairs = parameter_pairs(config, model)
    shapes = {theirs: list(model.state_dict()[ours].shape) for theirs, ours in pairs}
    if layout == "1.x":
        pairs = [(theirs.removeprefix("roi_head."), ours) for theirs, ours in pairs]
        shapes = {theirs.removeprefix("roi_head."): shape for theirs, shape in shapes.items()}
        for name, rows in {"bbox_head.fc_reg": 4, "mask_head.conv_logits": 1}.items():
            for kind in ("weight", "bias"):
                if background and f"{name}.{kind}" in shapes:
                    shapes[f"{name}.{kind}"][0] += rows
    return random_state_dict(shapes), pairs


def load(model, state_dict, tmp_path, **meta):
    torch.save({"meta": meta, "state_dict": state_dict}, tmp_path / "mmdet.pth")
    CarafeCheckpointer(model).load(str(tmp_path / "mmdet.pth"))
    return model.state_dict()


def test_published_names_and_shapes_fit_the_config_as_it_is(tmp_path):
    shapes = {
        f"backbone.{name}": list(tensor.shape)
        for name, tensor in torchvision.models.resnet50().state_dict().items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }
    for module, shape in PUBLISHED_SHAPES.items():
        shapes |= {f"{module}.weight": shape, f"{module}.bias": shape[:1]}
    state_dict = random_state_dict(shapes)
    assert len(state_dict) == 382

    path = CONFIGS / "mask_rcnn_R50_FPN_carafe_1x.yaml"
    model = build_model(load_config(str(path), ["MODEL.DEVICE", "cpu"]))
    loaded = load(model, state_dict, tmp_path)
    pairs = dict(module_pairs("mask_rcnn_R50_FPN_carafe_1x", (3, 4, 6, 3), 3))
    for name in shapes:
        module, _, kind = name.rpartition(".")
        assert torch.equal(state_dict[name], loaded[f"{pairs[module]}.{kind}"]), name


@pytest.mark.parametrize("config", DETECTORS)
def test_every_weight_lands_in_its_place(config, tmp_path):
    model = build(config)
    state_dict, pairs = synthetic(config, model)
    loaded = load(model, state_dict, tmp_path)
    for theirs, ours in pairs:
        if not theirs.startswith("bbox_head.retina_"):  # whose rows change places
            assert torch.equal(state_dict[theirs], loaded[ours]), theirs


@pytest.mark.parametrize("config", [name for name in DETECTORS if "mask" in name])
def test_classes_of_1x_are_put_in_order(config, tmp_path):
    model = build(config)
    state_dict, pairs = synthetic(config, model, layout="1.x")
    loaded = load(model, state_dict, tmp_path)
    for theirs, ours in pairs:
        rows = state_dict[theirs]
        if theirs.startswith("bbox_head.fc_cls"):
            rows = torch.stack([*rows[1:], rows[0]])
        elif theirs.startswith("bbox_head.fc_reg"):
            rows = rows[4:]
        elif theirs.startswith("mask_head.conv_logits"):
            rows = rows[1:]
        assert torch.equal(rows, loaded[ours]), theirs


def test_class_agnostic_predictors_of_1x_have_no_background(tmp_path):
    config = "mask_rcnn_R50_FPN_carafe_1x"
    agnostic = ("ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "ROI_MASK_HEAD.CLS_AGNOSTIC_MASK")
    model = build(config, *(v for key in agnostic for v in (f"MODEL.{key}", "True")))
    state_dict, _ = synthetic(config, model, layout="1.x", background=False)
    loaded = load(model, state_dict, tmp_path)
    for theirs, ours in {
        "bbox_head.fc_reg.weight": "roi_heads.box_predictor.bbox_pred.weight",
        "mask_head.conv_logits.bias": "roi_heads.mask_head.predictor.bias",
    }.items():
        assert torch.equal(state_dict[theirs], loaded[ours])


@pytest.mark.parametrize(
    ("config", "scales"),
    [("retinanet_R50_FPN_1x", 3), ("retinanet_R50_FPN_carafe_1x", 3), ("retinanet_R50_FPN_1x", 2)],
)
def test_rows_of_retinanet_follow_the_order_of_the_anchors(config, scales, tmp_path):
    sizes = [32 * 2 ** (scale / scales) for scale in range(scales)]
    model = build(config, "MODEL.ANCHOR_GENERATOR.SIZES", str([sizes]))
    state_dict, _ = synthetic(config, model)
    loaded = load(model, state_dict, tmp_path)
    # MMDetection: all scales of the first ratio (height / width), then those of the second, ...
    theirs = [(size, ratio) for ratio in (0.5, 1.0, 2.0) for size in sizes]
    anchors = next(iter(model.anchor_generator.cell_anchors))
    width, height = (anchors[:, 2:] - anchors[:, :2]).T
    for ours, (size, ratio) in enumerate(zip((width * height).sqrt(), height / width, strict=True)):
        [row] = [
            i
            for i, (s, r) in enumerate(theirs)
            if abs(s / size - 1) < 0.01 and abs(r / ratio - 1) < 0.01
        ]
        for name, new_name, n in (
            ("retina_cls", "cls_score", CLASSES),
            ("retina_reg", "bbox_pred", 4),
        ):
            for kind in ("weight", "bias"):
                old = state_dict[f"bbox_head.{name}.{kind}"][row * n : row * n + n]
                assert torch.equal(loaded[f"head.{new_name}.{kind}"][ours * n : ours * n + n], old)


@pytest.mark.parametrize("layout", mmdet.LAYOUTS)
@pytest.mark.parametrize("config", DETECTORS)
def test_way_back_gives_the_same_bits(config, layout):
    two_scales = ["MODEL.ANCHOR_GENERATOR.SIZES", "[[32, 45]]"] if "retinanet" in config else []
    state_dict, _ = synthetic(config, build(config, *two_scales), layout)
    converted = mmdet.to_detectron2(state_dict)
    assert not converted.unknown
    assert_same(mmdet.to_mmdet(converted.weights, layout, converted.background), state_dict)


@pytest.mark.parametrize("layout", mmdet.LAYOUTS)
@pytest.mark.parametrize("config", [*DETECTORS, "shapes_mask_rcnn_R18_FPN_carafe"])
def test_detectron2_weights_come_back_from_mmdetection(config, layout):
    weights = build(config).state_dict()
    # Different rows, so that no wrong order goes unnoticed.
    weights = {n: torch.rand(w.shape) if w.is_floating_point() else w for n, w in weights.items()}
    state_dict = mmdet.to_mmdet(weights, layout)
    assert mmdet.find_state_dict({"state_dict": state_dict}) == state_dict
    assert_same(mmdet.to_detectron2(state_dict).weights, weights)


def test_layout_1x_gets_a_background_that_predicts_nothing():
    model = build("mask_rcnn_R50_FPN_carafe_1x")
    state_dict = mmdet.to_mmdet(model.state_dict(), "1.x")
    assert state_dict["bbox_head.fc_cls.weight"].shape == (CLASSES + 1, 8)
    assert state_dict["bbox_head.fc_reg.weight"].shape == (4 * CLASSES + 4, 8)
    assert not state_dict["bbox_head.fc_reg.weight"][:4].any()
    assert state_dict["mask_head.conv_logits.bias"].shape == (CLASSES + 1,)


@pytest.mark.parametrize(
    ("upsample", "parameters"),
    [
        ("deconv", {"weight", "bias"}),
        ("pixel_shuffle", {"upsample_conv.weight", "upsample_conv.bias"}),
        ("nearest", set()),
    ],
)
def test_other_upsamplers_of_the_pyramid(upsample, parameters):
    model = build("faster_rcnn_R50_FPN_carafe_1x", "MODEL.FPN.UPSAMPLE", upsample)
    state_dict = mmdet.to_mmdet(model.state_dict())
    prefix = "neck.upsample_modules.0."
    names = {n.removeprefix(prefix) for n in state_dict if n.startswith(prefix)}
    assert names == parameters
    assert_same(mmdet.to_detectron2(state_dict).weights, model.state_dict())


def test_modules_that_are_not_ours_are_named():
    state_dict = {
        "backbone.layer1.0.conv2.conv_offset.weight": torch.rand(1),
        "backbone.layer1.0.conv2.weight": torch.rand(1),
        "neck.lateral_convs.0.gn.weight": torch.rand(1),
        "roi_head.bbox_head.0.fc_cls.weight": torch.rand(1),
    }
    converted = mmdet.to_detectron2(state_dict)
    assert converted.unknown == [n for n in state_dict if n != "backbone.layer1.0.conv2.weight"]


@pytest.mark.parametrize(
    "name", ["backbone.fpn_lateral2.norm.weight", "proposal_generator.centerness.bias"]
)
def test_modules_that_mmdetection_lacks_are_refused(name):
    weights = build("faster_rcnn_R50_FPN_1x").state_dict()  # group normalization, and a module
    with pytest.raises(UserError, match=f"no place for {name}"):
        mmdet.to_mmdet({**weights, name: torch.rand(3)})


def test_rows_of_neither_layout_are_refused():
    config = "mask_rcnn_R50_FPN_carafe_1x"
    state_dict, _ = synthetic(config, build(config))
    state_dict["roi_head.bbox_head.fc_reg.bias"] = torch.rand(4 * CLASSES + 4)
    with pytest.raises(UserError, match=r"bbox_pred has 24 rows, where 5 classes .* need 20"):
        mmdet.to_detectron2(state_dict)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"state_dict": 1},
        {"state_dict": {"neck.lateral_convs.0.conv.weight": "no tensor"}},
        {"layer1.0.conv1.weight": torch.rand(1)},
        {"model": {"backbone.bottom_up.stem.conv1.weight": torch.rand(1)}},
        {"proposal_generator.a": torch.rand(1), "mask_head.b": torch.rand(1)},
    ],
    ids=["list", "no dict", "no tensors", "torchvision", "detectron2", "project of detectron2"],
)
def test_other_files_are_not_taken_for_mmdetection(content):
    assert mmdet.find_state_dict(content) is None


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "meta": {}}])
def test_bare_state_dicts_are_recognized_too(wrap):
    state_dict = {"neck.lateral_convs.0.conv.weight": torch.rand(1)}
    assert mmdet.find_state_dict(wrap(state_dict)) is state_dict


@pytest.mark.parametrize(
    ("config", "layout", "meta", "legacy_geometry", "expected"),
    [
        ("faster_rcnn_R50_FPN_1x", "2.x", {"mmdet_version": "2.0.0"}, False, None),
        ("faster_rcnn_R50_FPN_1x", "2.x", {"mmdet_version": "2.0.0"}, True, "not end in _2019"),
        ("faster_rcnn_R50_FPN_1x", "2.x", {"mmdet_version": "1.0rc1"}, False, "LegacyRCNN"),
        ("faster_rcnn_R50_FPN_1x", "1.x", {}, False, "LegacyRCNN"),
        ("faster_rcnn_R50_FPN_1x", "1.x", {}, True, None),
        ("faster_rcnn_R50_FPN_1x", "2.x", {"config": "style='caffe'"}, False, "STRIDE_IN_1X1"),
        ("faster_rcnn_R50_FPN_1x", "2.x", {"cfg": "style='pytorch'"}, False, None),
        ("retinanet_R50_FPN_1x", "2.x", {}, False, "ReLU"),
        ("retinanet_R50_FPN_carafe_1x", "2.x", {}, False, None),
    ],
)
def test_differences_beside_the_weights_are_said(config, layout, meta, legacy_geometry, expected):
    state_dict, _ = synthetic(config, build(config), layout)
    content = {"meta": meta, "state_dict": state_dict}
    converted = mmdet.to_detectron2(state_dict)
    found = mmdet.differences(content, converted, legacy_geometry=legacy_geometry)
    assert len(found) == (expected is not None)
    assert expected is None or expected in found[0]
