"""Every YAML of configs/ is a model that trains and predicts."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from carafe_d2 import CarafeFPN, CARAFEPack
from carafe_d2.config import load_config

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
# Small enough for two CPU cores; says nothing of what a config selects.
SMALL = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "20"]
FPN_CHOICES = ["carafe", "nearest", "bilinear", "deconv", "pixel_shuffle"]
HEAD_CHOICES = ["carafe", "deconv", "nearest", "bilinear"]


def config(name, *overrides):
    return load_config(str(CONFIGS[0].with_name(f"{name}.yaml")), [*SMALL, *overrides])


def train_and_predict(cfg):
    """One training step's gradients and one prediction; returns the model and the losses."""
    torch.manual_seed(0)
    model = build_model(cfg)
    image = {"image": torch.randint(0, 256, (3, 96, 128)), "height": 96, "width": 128}
    instances = Instances((96, 128))
    instances.gt_boxes = Boxes(torch.tensor([[10.0, 20.0, 70.0, 80.0]]))
    instances.gt_classes = torch.tensor([1])
    instances.gt_masks = BitMasks(torch.ones(1, 96, 128, dtype=torch.bool))
    with EventStorage():
        losses = model([{**image, "instances": instances}])
    sum(losses.values()).backward()
    with torch.no_grad():
        model.eval()([image])
    return model, losses


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_trains_and_predicts(path):
    # Random weights make a frozen BN diverge.
    cfg = config(path.stem, "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "0")
    model, losses = train_and_predict(cfg)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert ("loss_mask" in losses) == ("mask" in path.stem)
    assert isinstance(model.backbone, CarafeFPN) == ("carafe" in path.stem)
    packs = [name for name, m in model.named_modules() if isinstance(m, CARAFEPack)]
    expected = 0
    if "carafe" in path.stem:
        expected = 4 + ("mask" in path.stem)
    assert len(packs) == expected


@pytest.mark.parametrize(
    ("pyramid", "head"),
    [(name, "carafe") for name in FPN_CHOICES] + [("carafe", name) for name in HEAD_CHOICES[1:]],
)
def test_every_upsampler_trains_and_predicts(pyramid, head):
    keys = ["MODEL.FPN.UPSAMPLE", pyramid, "MODEL.ROI_MASK_HEAD.UPSAMPLE", head]
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


def test_baselines_differ_in_the_upsamplers_only():
    baseline, carafe = (config(f"mask_rcnn_R50_FPN{s}_1x") for s in ("", "_carafe"))
    for cfg in (baseline, carafe):
        cfg.defrost()
        cfg.OUTPUT_DIR = cfg.MODEL.BACKBONE.NAME = cfg.MODEL.ROI_MASK_HEAD.NAME = ""
    assert baseline == carafe


@pytest.mark.parametrize("kind", ["faster", "mask"])
def test_recipe_is_that_of_the_published_models(kind):
    cfg = load_config(str(CONFIGS[0].with_name(f"{kind}_rcnn_R50_FPN_carafe_1x.yaml")))
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (16, 0.02, 90000)
    assert cfg.MODEL.RESNETS.DEPTH == 50
    assert not cfg.MODEL.RESNETS.STRIDE_IN_1X1
    assert cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.120, 57.375]
    assert cfg.MODEL.WEIGHTS.endswith("torchvision/R-50.pkl")
    assert cfg.DATASETS.TEST == ("coco_2017_val",)
