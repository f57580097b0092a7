"""Every YAML of configs/ is a model that trains and predicts; those for inpainting in inpaint/."""

import functools
import math
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from carafe_d2 import CARAFEDownsamplePack, CarafeFPN, CARAFEPack, CarafePAFPN, train_net
from carafe_d2.config import load_config
from carafe_d2.upsample import UPSAMPLERS

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
# Small enough for two CPU cores; says nothing of what a config selects.
SMALL = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "20"]


def config(name, *overrides):
    return load_config(str(CONFIGS[0].with_name(f"{name}.yaml")), [*SMALL, *overrides])


def train_and_predict(cfg):
    """One training step's gradients and one prediction; returns the model and the losses."""
    cfg.defrost()
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20  # for quickness
    torch.manual_seed(0)
    model = build_model(cfg)
    image = {"image": torch.randint(0, 256, (3, 64, 96)), "height": 64, "width": 96}
    instances = Instances((64, 96))
    instances.gt_boxes = Boxes(torch.tensor([[10.0, 10.0, 70.0, 60.0]]))
    instances.gt_classes = torch.tensor([1])
    instances.gt_masks = BitMasks(torch.ones(1, 64, 96, dtype=torch.bool))
    targets = {"instances": instances, "sem_seg": torch.randint(0, 54, (64, 96))}
    with EventStorage():
        losses = model([{**image, **targets}])
    sum(losses.values()).backward()
    with torch.no_grad():
        model.eval()([image])
    return model, losses


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if "inpaint" not in path.stem], ids=lambda path: path.stem
)
def test_config_trains_and_predicts(path):
    # Random weights make a frozen BN diverge.
    untrained = ["MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "0"]
    cfg = config(path.stem, *untrained, "MODEL.BACKBONE.PRETRAINED", "False")
    model, losses = train_and_predict(cfg)
    assert all(torch.isfinite(loss) for loss in losses.values())
    kind = path.stem.split("_")[0]
    has_masks = "mask" in path.stem or kind == "panoptic"
    assert ("loss_mask" in losses) == has_masks
    assert ("loss_sem_seg" in losses) == (kind in ("panoptic", "semantic", "upernet"))
    assert isinstance(model.backbone, CarafeFPN) == ("carafe" in path.stem and kind != "upernet")
    packs = [m for m in model.modules() if isinstance(m, CARAFEPack)]
    down = [m for m in model.modules() if isinstance(m, CARAFEDownsamplePack)]
    # In three stages of the ResNet, for p6, and four times in the bottom-up path.
    assert len(down) == 8 * isinstance(model.backbone, CarafePAFPN) == 8 * ("PAFPN" in path.stem)
    expected = 0
    if "carafe" in path.stem:
        pyramid = 3 if kind in ("semantic", "upernet") else 4
        # In UPerNet, 4 in pyramid pooling and 3 in the fusion.
        semantic_head = (7 if kind == "upernet" else 6) * ("loss_sem_seg" in losses)
        expected = pyramid + has_masks + semantic_head
    assert len(packs) == expected


@pytest.mark.parametrize("upsample", UPSAMPLERS)
def test_every_upsampler_trains_and_predicts(upsample):
    keys = ["MODEL.FPN.UPSAMPLE", upsample, "MODEL.ROI_MASK_HEAD.UPSAMPLE", upsample]
    model, losses = train_and_predict(config("shapes_mask_rcnn_R18_FPN_carafe", *keys))
    assert all(torch.isfinite(loss) for loss in losses.values())
    without_gradient = [name for name, p in model.named_parameters() if p.grad is None]
    assert without_gradient == []


@pytest.mark.parametrize("kind", ["faster", "mask"])
def test_2000_variants_differ_in_test_proposals_only(kind):
    base, variant = (config(f"{kind}_rcnn_R50_FPN_carafe_1x{s}") for s in ("", "_2000"))
    assert (base.MODEL.RPN.POST_NMS_TOPK_TEST, variant.MODEL.RPN.POST_NMS_TOPK_TEST) == (1000, 2000)
    for cfg in (base, variant):
        cfg.defrost()
        cfg.OUTPUT_DIR = ""
        cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 0
    assert base == variant


@pytest.mark.parametrize(
    "model", ["mask_rcnn_R50_FPN", "panoptic_fpn_R50", "semantic_R50_FPN", "upernet_R50_ade20k"]
)
def test_baselines_differ_in_the_upsamplers_only(model):
    baseline, carafe = (config(f"{model}{s}_1x") for s in ("", "_carafe"))
    for cfg in (baseline, carafe):
        cfg.defrost()
        cfg.OUTPUT_DIR = cfg.MODEL.BACKBONE.NAME = ""
        cfg.MODEL.ROI_MASK_HEAD.NAME = cfg.MODEL.SEM_SEG_HEAD.NAME = ""
        for part in ("PPM", "FPN", "FUSE"):
            cfg.MODEL.UPERNET[f"{part}_UPSAMPLE"] = ""
    assert baseline == carafe


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("panoptic_fpn_R50_1x", "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml"),
        ("semantic_R50_FPN_1x", "Misc/semantic_R_50_FPN_1x.yaml"),
    ],
)
def test_segmentation_baselines_are_detectron2s(name, published):
    try:
        file = model_zoo.get_config_file(published)
    except RuntimeError:
        pytest.skip("this Detectron2 comes without its configs")
    ours, theirs = config(name), load_config(file, SMALL)
    for cfg in (ours, theirs):
        cfg.defrost()
        cfg.OUTPUT_DIR = ""
    assert ours == theirs


# What the published configs set; a dict tells the years apart.
RECIPE = {
    "MODEL.WEIGHTS": "detectron2://ImageNetPretrained/torchvision/R-50.pkl",
    "MODEL.BACKBONE.FREEZE_AT": 2,
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.FPN.OUT_CHANNELS": 256,
    "MODEL.FPN.UPSAMPLE": "carafe",
    "MODEL.ROI_MASK_HEAD.UPSAMPLE": "carafe",
    "MODEL.CARAFE.UP_KERNEL": 5,
    "MODEL.CARAFE.UP_GROUP": 1,
    "MODEL.CARAFE.ENCODER_KERNEL": 3,
    "MODEL.CARAFE.ENCODER_DILATION": 1,
    "MODEL.CARAFE.COMPRESSED_CHANNELS": 64,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
    "MODEL.ANCHOR_GENERATOR.OFFSET": {2019: 0.5, 2020: 0.0},
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.RPN.BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0),
    "MODEL.RPN.IOU_THRESHOLDS": [0.3, 0.7],
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 256,
    "MODEL.RPN.POSITIVE_FRACTION": 0.5,
    "MODEL.RPN.BOUNDARY_THRESH": {2019: 0, 2020: -1},
    "MODEL.RPN.SMOOTH_L1_BETA": {2019: 1 / 9, 2020: 0.0},
    "MODEL.RPN.NMS_THRESH": 0.7,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 2000,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": {2019: 2000, 2020: 1000},
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 1000,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 0,
    "MODEL.ROI_HEADS.NUM_CLASSES": 80,
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": [0.5],
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 512,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 0.25,
    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": True,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.05,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": 0.5,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 1024,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0),
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": False,
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": {2019: 1.0, 2020: 0.0},
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": {2019: "ROIAlign", 2020: "ROIAlignV2"},
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": {2019: 2, 2020: 0},
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 4,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 256,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 14,
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": {2019: "ROIAlign", 2020: "ROIAlignV2"},
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": {2019: 2, 2020: 0},
    "DATASETS.TRAIN": ("coco_2017_train",),
    "DATASETS.TEST": ("coco_2017_val",),
    "INPUT.FORMAT": "RGB",
    "INPUT.MIN_SIZE_TRAIN": (800,),
    "INPUT.MAX_SIZE_TRAIN": 1333,
    "INPUT.MIN_SIZE_TEST": 800,
    "INPUT.MAX_SIZE_TEST": 1333,
    "INPUT.RANDOM_FLIP": "horizontal",
    "INPUT.CROP.ENABLED": False,
    "SOLVER.OPTIMIZER": "SGD",
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.BASE_LR": 0.02,
    "SOLVER.MOMENTUM": 0.9,
    "SOLVER.NESTEROV": False,
    "SOLVER.WEIGHT_DECAY": 1e-4,
    "SOLVER.WEIGHT_DECAY_BIAS": None,
    "SOLVER.CLIP_GRADIENTS.ENABLED": {2019: True, 2020: False},
    "TEST.DETECTIONS_PER_IMAGE": 100,
}


def published(kind, year):
    """The config of a published model as a user loads it."""
    suffix = {2019: "_2019", 2020: ""}[year]
    name = f"{kind}_rcnn_R50_FPN_carafe_1x{suffix}.yaml"
    return load_config(str(CONFIGS[0].with_name(name)))


@pytest.mark.parametrize("year", [2019, 2020])
@pytest.mark.parametrize("kind", ["faster", "mask"])
def test_recipe_is_that_of_the_published_models(kind, year):
    cfg = published(kind, year)
    assert (kind == "mask") == cfg.MODEL.MASK_ON
    for key, expected in RECIPE.items():
        value = functools.reduce(getattr, key.split("."), cfg)
        assert value == (expected[year] if isinstance(expected, dict) else expected), key


def test_gradients_of_2019_are_clipped_together():
    clip = published("faster", 2019).SOLVER.CLIP_GRADIENTS
    assert (clip.CLIP_TYPE, clip.CLIP_VALUE, clip.NORM_TYPE) == ("full_model", 35.0, 2.0)


@pytest.mark.parametrize(("year", "warmup_ratio"), [(2019, 1 / 3), (2020, 0.001)])
def test_schedule_is_that_of_the_published_models(year, warmup_ratio):
    """12 epochs, a tenth after epochs 8 and 11, linear warm-up over 500 iterations."""
    cfg = published("mask", year)
    epoch = math.ceil(117266 / cfg.SOLVER.IMS_PER_BATCH)  # images of COCO train2017 with objects
    assert 12 * epoch == cfg.SOLVER.MAX_ITER
    scheduler = build_lr_scheduler(cfg, torch.optim.SGD([torch.zeros(1)], lr=cfg.SOLVER.BASE_LR))
    expected = {
        0: 0.02 * warmup_ratio,
        250: 0.02 * (warmup_ratio + (1 - warmup_ratio) / 2),
        500: 0.02,
        8 * epoch - 1: 0.02,
        8 * epoch: 0.002,
        11 * epoch - 1: 0.002,
        11 * epoch: 0.0002,
        12 * epoch - 1: 0.0002,
    }
    for iteration, rate in expected.items():
        scheduler.last_epoch = iteration
        assert scheduler.get_lr() == pytest.approx([rate]), iteration


# Of the supplement of arXiv 1905.02188, and of the official code of UPerNet that it names.
UPERNET_RECIPE = {
    "MODEL.WEIGHTS": "detectron2://ImageNetPretrained/torchvision/R-50.pkl",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.NORM": "SyncBN",
    "MODEL.RESNETS.RES5_DILATION": 1,
    "MODEL.SEM_SEG_HEAD.NORM": "SyncBN",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 512,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 150,
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": 1.0,
    "MODEL.UPERNET.AUX_LOSS_WEIGHT": 0.0,
    "INPUT.MIN_SIZE_TRAIN": (300, 375, 450, 525, 600),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": "choice",
    "INPUT.MAX_SIZE_TRAIN": 1200,
    "INPUT.MIN_SIZE_TEST": 450,
    "INPUT.MAX_SIZE_TEST": 1200,
    "INPUT.RANDOM_FLIP": "horizontal",
    "INPUT.CROP.ENABLED": False,
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.BASE_LR": 0.02,
    "SOLVER.MOMENTUM": 0.9,
    "SOLVER.WEIGHT_DECAY": 1e-4,
    "SOLVER.WEIGHT_DECAY_BIAS": 0.0,
    "SOLVER.WEIGHT_DECAY_NORM": 0.0,
    "SOLVER.MAX_ITER": 20 * 5000,
}


def test_recipe_of_upernet():
    cfg = load_config("upernet_R50_ade20k_1x")
    for key, expected in UPERNET_RECIPE.items():
        assert functools.reduce(getattr, key.split("."), cfg) == expected, key
    scheduler = train_net.Trainer.build_lr_scheduler(
        cfg, torch.optim.SGD([torch.zeros(1)], lr=cfg.SOLVER.BASE_LR)
    )
    for iteration in (0, 1, 50000, 99999):
        scheduler.last_epoch = iteration
        assert scheduler.get_lr() == pytest.approx([0.02 * (1 - iteration / 100000) ** 0.9])
