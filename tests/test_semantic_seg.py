import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model, build_sem_seg_head
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn import functional as F

from carafe_d2 import CARAFEPack, CarafeSemSegFPNHead, add_carafe_config, replace_upsampling
from carafe_d2.errors import UserError
from carafe_d2.upsample import UPSAMPLERS

SHAPES = {f"p{i}": ShapeSpec(channels=12, stride=2**i) for i in (2, 3, 4, 5, 6)}


def config(**keys):
    cfg = get_cfg()
    add_carafe_config(cfg)
    head = cfg.MODEL.SEM_SEG_HEAD
    head.NAME = "CarafeSemSegFPNHead"
    head.NUM_CLASSES = 5
    head.CONVS_DIM = 32
    for key, value in keys.items():
        setattr(head, key, value)
    return cfg


def build(**keys):
    return build_sem_seg_head(config(**keys), SHAPES)


def features(rows=16, columns=24):
    return {
        f"p{i}": torch.randn(2, 12, rows * 2 // 2 ** (i - 1), columns * 2 // 2 ** (i - 1))
        for i in (2, 3, 4, 5)
    }


@pytest.mark.parametrize("upsample", UPSAMPLERS)
def test_every_choice_puts_out_scores_at_the_common_stride(upsample):
    head = build(UPSAMPLE=upsample)
    assert head.layers(features()).shape == (2, 5, 16, 24)
    scores, losses = head.eval()(features())
    assert scores.shape == (2, 5, 64, 96)
    assert losses == {}


def test_bilinear_is_the_stock_head():
    stock, ours = build(NAME="SemSegFPNHead"), build(UPSAMPLE="bilinear")
    ours.load_state_dict(stock.state_dict())
    x, targets = features(), torch.randint(5, (2, 64, 96))
    torch.testing.assert_close(ours(x, targets), stock(x, targets), rtol=0, atol=0)
    torch.testing.assert_close(ours.eval()(x), stock.eval()(x), rtol=0, atol=0)


def test_weights_of_the_stock_head_load():
    missing, unexpected = build().load_state_dict(
        build(NAME="SemSegFPNHead").state_dict(), strict=False
    )
    assert unexpected == []
    # One upsampler for p3, two for p4, three for p5.
    assert {name.rsplit(".", 2)[0] for name in missing} == {
        *("p3.1", "p4.1", "p4.3", "p5.1", "p5.3", "p5.5")
    }


def test_every_step_of_two_is_a_carafe_of_its_own():
    """The head written out: convolution, group normalization, ReLU, CARAFE, level by level."""
    torch.manual_seed(0)
    head, x = build(), features()
    for module in head.modules():
        if isinstance(module, CARAFEPack):
            nn.init.normal_(module.content_encoder.weight)
    total = 0
    for name, steps in {"p2": 1, "p3": 1, "p4": 2, "p5": 3}.items():
        level, layers = x[name], iter(getattr(head, name))
        for _ in range(steps):
            conv = next(layers)
            level = F.conv2d(level, conv.weight, padding=1)
            level = F.relu(F.group_norm(level, 32, conv.norm.weight, conv.norm.bias))
            if name != "p2":
                level = next(layers)(level)
        total = total + level
    expected = F.conv2d(total, head.predictor.weight, head.predictor.bias)
    torch.testing.assert_close(head.layers(x), expected)


def test_replacing_the_upsampling_of_the_stock_head_gives_the_same_network():
    x, ours, stock = features(), build(), build(NAME="SemSegFPNHead")
    report = replace_upsampling(stock, (x,))
    assert [site.name for site in report.left_alone] == ["carafe_upsample.0"]  # the class scores
    stock.load_state_dict(ours.state_dict())
    assert torch.equal(stock.eval()(x)[0], ours.eval()(x)[0])


def test_common_stride_leaves_fewer_steps():
    cfg = config(IN_FEATURES=["p3", "p4"], COMMON_STRIDE=8)
    head = build_sem_seg_head(cfg, SHAPES)
    packs = [name for name, m in head.named_modules() if isinstance(m, CARAFEPack)]
    assert packs == ["p4.1"]
    assert head.eval()(features())[0].shape == (2, 5, 64, 96)


def test_every_parameter_gets_a_gradient():
    head = build()
    _, losses = head(features(), torch.randint(5, (2, 64, 96)))
    losses["loss_sem_seg"].backward()
    assert [name for name, p in head.named_parameters() if p.grad is None] == []


def test_head_without_config():
    head = CarafeSemSegFPNHead(
        {"p2": SHAPES["p2"], "p3": SHAPES["p3"]},
        num_classes=3,
        conv_dims=8,
        common_stride=4,
        upsampler={"name": "carafe", "up_kernel": 3},
    )
    assert head.p3[1].up_kernel == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.SEM_SEG_HEAD.UPSAMPLE", "lanczos"),
        ("MODEL.CARAFE.UP_KERNEL", 4),
        ("MODEL.CARAFE.UP_GROUP", 3),
    ],
)
def test_wrong_config_values_are_named(key, value):
    cfg = config()
    cfg.merge_from_list([key, value])
    with pytest.raises(UserError, match=f"{key}.*{value}"):
        build_sem_seg_head(cfg, SHAPES)


# ----------------------------------------------------------------------- whole models


BACKBONES = {
    "SemanticSegmentor": "build_resnet_carafe_semantic_fpn_backbone",
    "PanopticFPN": "build_resnet_carafe_fpn_backbone",
}


def tiny_model(architecture):
    cfg = config()
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.MASK_ON = architecture == "PanopticFPN"
    cfg.MODEL.BACKBONE.NAME = BACKBONES[architecture]
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNCarafeUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 16
    torch.manual_seed(0)
    return build_model(cfg)


def image(height, width):
    """Class 1 above class 2, the lower half's left an object; the last columns are not labeled."""
    pixels = torch.zeros(3, height, width)
    pixels[:, : height // 2] = 255.0
    target = torch.full((height, width), 2)
    target[: height // 2] = 1
    target[:, -5:] = 255
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor([[0.0, height / 2, width / 2, height]]))
    instances.gt_classes = torch.tensor([1])
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[:, height // 2 :, : width // 2] = True
    instances.gt_masks = BitMasks(mask)
    return {"image": pixels, "sem_seg": target, "instances": instances}


@pytest.mark.parametrize(
    ("architecture", "divisibility"), [("SemanticSegmentor", 32), ("PanopticFPN", 64)]
)
def test_tiny_models_train_and_predict(architecture, divisibility):
    """Images of different sizes, which are no multiples of what the pyramid divides by."""
    model = tiny_model(architecture)
    assert model.backbone.size_divisibility == divisibility
    images = [image(72, 100), image(96, 61)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    with EventStorage():
        for _ in range(3):
            step = model(images)
            optimizer.zero_grad()
            sum(step.values()).backward()
            optimizer.step()
            losses.append(step["loss_sem_seg"].item())
    assert losses[2] < losses[0]
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert ("loss_mask" in step) == (architecture == "PanopticFPN")

    with torch.no_grad():
        outputs = model.eval()([{**images[0], "height": 144, "width": 200}, images[1]])
    assert [o["sem_seg"].shape for o in outputs] == [(5, 144, 200), (5, 96, 61)]
    if architecture == "PanopticFPN":
        assert outputs[0]["panoptic_seg"][0].shape == (144, 200)


def test_padding_is_not_trained():
    """What is padded to a multiple of 32 has the loss of the image alone."""
    model = tiny_model("SemanticSegmentor").eval()
    single = image(60, 50)
    targets = torch.full((1, 64, 64), 255)
    targets[:, :60, :50] = single["sem_seg"]
    pixels = (single["image"] - model.pixel_mean) / model.pixel_std
    scores, _ = model.sem_seg_head(model.backbone(F.pad(pixels, (0, 14, 0, 4))[None]))
    expected = F.cross_entropy(scores[:, :, :60, :50], single["sem_seg"][None], ignore_index=255)
    model.train()
    for module in model.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with EventStorage():
        loss = model([single])["loss_sem_seg"]
    torch.testing.assert_close(loss, expected)
