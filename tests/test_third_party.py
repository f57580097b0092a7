"""CARAFE in the models of other packages: what they do with a model goes on to work."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torchvision.io import write_png
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from carafe_d2 import replace_downsampling, replace_upsampling
from carafe_d2.upsample import KernelPrediction

DOCS = Path(__file__).parents[1] / "docs" / "operator.md"
EXAMPLES = [(torch.rand(1, 3, 64, 128),), (torch.rand(1, 3, 128, 64),)]


def names(report):
    return [site.name for site in report]


def packs_of(model):
    return [module for module in model.modules() if isinstance(module, KernelPrediction)]


def first_tensor(output):
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output


# ----------------------------------------------------------------------- Ultralytics


def batch_of(task):
    """Two images of 64 x 64 with an object each, as the losses of a task take them."""
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.6], [0.3, 0.4, 0.5, 0.5]])
    if task == "obb":
        boxes = torch.cat([boxes, torch.tensor([[0.1], [0.7]])], 1)
    return {
        "img": torch.rand(2, 3, 64, 64),
        "batch_idx": torch.tensor([0.0, 1.0]),
        "cls": torch.zeros(2, 1),
        "bboxes": boxes,
        "masks": torch.ones(2, 16, 16),
        "sem_masks": torch.zeros(2, 16, 16, dtype=torch.long),
        "keypoints": torch.rand(2, 17, 3),
    }


def build_yolo(ultralytics, name):
    torch.manual_seed(0)
    yolo = ultralytics.YOLO(f"{name}.yaml")
    yolo.model.args = ultralytics.cfg.get_cfg()
    return yolo


def train_a_step(model, task):
    """One step with the model's own loss; returns the packs that it has not changed."""
    packs = packs_of(model)
    before = copy.deepcopy(packs)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    loss, _ = model.train().loss(batch_of(task))
    loss.sum().backward()
    optimizer.step()
    pairs = zip(packs, before, strict=True)
    return [p for p, q in pairs if torch.equal(p.content_encoder.bias, q.content_encoder.bias)]


@pytest.mark.filterwarnings("ignore")  # of tracing, which the export does
@pytest.mark.parametrize("name", ["yolo11n", "yolo26n-seg"])
def test_ultralytics(name, ultralytics, tmp_path, monkeypatch):
    from ultralytics.utils.torch_utils import ModelEMA

    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    yolo = build_yolo(ultralytics, name)
    model = yolo.model
    before = {n: dict(vars(m)) for n, m in model.named_modules()}
    report = replace_upsampling(model, EXAMPLES)
    expected = ["model.11", "model.14"]
    if "seg" in name:
        proto = "model.23.proto"
        expected = [f"{proto}.upsample", *expected, f"{proto}.carafe_upsample.0"]
    assert names(report) == expected
    for site in report:
        for key in {"f", "i", "type", "np"} & before.get(site.name, {}).keys():
            assert getattr(model.get_submodule(site.name), key) == before[site.name][key]

    assert train_a_step(model, yolo.task) == []
    ema = ModelEMA(model)
    ema.update(model)
    x = torch.rand(1, 3, 96, 64)
    with torch.no_grad():
        expected = first_tensor(model.eval()(x))
        # The first average is nearly the model itself.
        torch.testing.assert_close(first_tensor(ema.ema(x)), expected, rtol=1e-3, atol=1e-3)
        yolo.ckpt = {}
        yolo.save("model.pt")
        loaded = ultralytics.YOLO("model.pt")
        assert len(packs_of(loaded.model)) == len(packs_of(model))
        half = copy.deepcopy(model).half().float()  # as it is saved
        expected = first_tensor(half(x))
        torch.testing.assert_close(first_tensor(loaded.model.float().eval()(x)), expected)
        half.fuse(verbose=False)
        fused = first_tensor(half(x))
        torch.testing.assert_close(fused, expected, rtol=1e-3, atol=1e-3)
        script = torch.jit.load(loaded.export(format="torchscript", imgsz=(96, 64)))
        torch.testing.assert_close(first_tensor(script(x)), fused, rtol=1e-3, atol=1e-3)
        session = onnxruntime.InferenceSession(loaded.export(format="onnx", imgsz=(96, 64)))
        found = torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
        torch.testing.assert_close(found, fused, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("yolov5n", "yolov5n-p6", "yolov6n", "yolov8n", "yolov8n-ghost", "yolov9t", "yolov9e"),
        *("yolov10n", "yolo12n", "yolo26n", "yolo26n-p2", "yolov8n-seg", "yolo11n-seg"),
        *("yolov9c-seg", "yolo12n-seg", "yolov8n-pose", "yolo11n-pose", "yolo26n-pose"),
        *("yolov8n-obb", "yolo11n-obb", "yolo26n-obb"),
    ],
)
def test_more_of_ultralytics(name, ultralytics):
    yolo = build_yolo(ultralytics, name)
    report = replace_upsampling(yolo.model, EXAMPLES)
    assert len(report) >= 2
    assert train_a_step(yolo.model, yolo.task) == []
    x = torch.rand(1, 3, 128, 192)
    with torch.no_grad():
        expected = first_tensor(yolo.model.eval()(x))
        found = first_tensor(yolo.model.fuse(verbose=False)(x))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_documented_trainer(ultralytics, tmp_path, monkeypatch):
    """The one of docs/operator.md trains, and starts from weights with CARAFE again."""
    (code,) = re.findall(r"```python\n([^`]*CarafeTrainer[^`]*)```", DOCS.read_text())
    namespace = {"__name__": "example"}
    exec(code.replace("640", "64"), namespace)
    monkeypatch.chdir(tmp_path)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for i in range(4):
        write_png(torch.full((3, 64, 64), 60 * i, dtype=torch.uint8), f"images/{i}.png")
        (tmp_path / "labels" / f"{i}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    data = f"path: {tmp_path}\ntrain: images\nval: images\nnames: [square]\n"
    (tmp_path / "data.yaml").write_text(data)
    options = {"data": "data.yaml", "epochs": 1, "imgsz": 64, "batch": 2, "workers": 0}
    options |= {"device": "cpu", "plots": False, "project": str(tmp_path), "name": "run"}
    yolo = ultralytics.YOLO("yolo11n.yaml")
    yolo.train(trainer=namespace["CarafeTrainer"], **options)
    best = ultralytics.YOLO("run/weights/best.pt")
    assert len(packs_of(best.model)) == 2
    again = yolo.trainer.get_model("yolo11n.yaml", weights=best.model)
    for pack, trained in zip(packs_of(again), packs_of(best.model), strict=True):
        torch.testing.assert_close(pack.state_dict(), trained.float().state_dict())


# ---------------------------------------------------------- segmentation_models_pytorch

SEGMENTATION = {
    "unet": [f"decoder.blocks.{i}.carafe_upsample.0" for i in range(5)],
    "unetplusplus": [
        f"decoder.blocks.x_{i}_{j}.carafe_upsample.0"
        for j in range(5)
        for i in range(j + 1)
        if i == 0 or j < 4
    ],
    "manet": [f"decoder.blocks.{i}.carafe_upsample.0" for i in range(5)],
    "linknet": [f"decoder.blocks.{i}.block.1.0" for i in range(5)],
    "fpn": [
        *(f"decoder.seg_blocks.0.block.{i}.carafe_upsample.0" for i in range(3)),
        *(f"decoder.seg_blocks.1.block.{i}.carafe_upsample.0" for i in range(2)),
        "decoder.seg_blocks.2.block.0.carafe_upsample.0",
        *(f"decoder.p{i}.carafe_upsample.0" for i in (4, 3, 2)),
    ],
    "pspnet": [],
    "deeplabv3": [],
    "deeplabv3plus": [],
    "pan": [f"decoder.gau{i}.carafe_upsample.0" for i in (1, 2)],
    "upernet": [
        *(f"decoder.fpn_lateral_blocks.{i}.carafe_upsample.0" for i in range(3)),
        "decoder.carafe_upsample.2",
    ],
    "segformer": ["decoder.carafe_upsample.2"],
    "dpt": [
        "decoder.reassemble_blocks.1.upsample",
        *(f"decoder.fusion_blocks.{i}.carafe_upsample.0" for i in range(4)),
        "segmentation_head.carafe_upsample.0",
    ],
}


@pytest.mark.parametrize("name", SEGMENTATION)
def test_segmentation_models_pytorch(name):
    smp = pytest.importorskip("segmentation_models_pytorch")
    options = {"encoder_name": "resnet18"}
    if name == "dpt":
        options = {"encoder_name": "tu-vit_tiny_patch16_224", "dynamic_img_size": True}
    model = smp.create_model(name, encoder_weights=None, classes=5, **options)
    # At 128 pixels UPerNet pools 4 x 4 to 2 x 2, and doubles that by chance.
    size = 128 if name in ("pan", "upernet") else 64
    examples = [(torch.rand(1, 3, size, size),), (torch.rand(1, 3, size + 64, size),)]
    report = replace_upsampling(model, examples)
    assert sorted(names(report)) == sorted(SEGMENTATION[name])
    output = model.train()(torch.rand(2, 3, size, size))
    assert output.shape == (2, 5, size, size)
    output.square().mean().backward()
    assert all(pack.content_encoder.weight.grad.abs().sum() > 0 for pack in packs_of(model))


def test_upernet_shows_what_one_example_hides():
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.create_model("upernet", encoder_name="resnet18", encoder_weights=None)
    report = replace_upsampling(model, torch.rand(1, 3, 128, 128), include=["decoder.psp.*"])
    assert names(report) == ["decoder.psp.carafe_upsample.1"]


# ------------------------------------------------------------- timm, torchvision, Detectron2


def test_ultralytics_downsampling(ultralytics):
    model = build_yolo(ultralytics, "yolo11n").model
    report = replace_downsampling(model, EXAMPLES)
    assert names(report) == [f"model.{i}.conv.carafe_downsample" for i in (1, 3, 5, 7, 17, 20)]
    assert train_a_step(model, "detect") == []
    expected = first_tensor(model.eval()(EXAMPLES[0][0]))
    model.fuse(verbose=False)
    torch.testing.assert_close(first_tensor(model(EXAMPLES[0][0])), expected, rtol=1e-3, atol=1e-2)


def test_timm():
    timm = pytest.importorskip("timm")
    model = timm.create_model("hrnet_w18_small", features_only=True)
    doubled = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Upsample) and module.scale_factor == 2
    ]
    assert names(replace_upsampling(model, EXAMPLES)) == doubled != []
    sum(level.square().mean() for level in model(torch.rand(2, 3, 64, 64))).backward()
    reached = [pack for pack in packs_of(model) if pack.content_encoder.weight.grad is not None]
    assert reached == packs_of(model)


def test_torchvision():
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    few = {"rpn_post_nms_top_n_test": 8, "rpn_post_nms_top_n_train": 8}
    model = MaskRCNN(backbone, num_classes=3, min_size=64, max_size=96, **few)
    report = replace_upsampling(model, [([torch.rand(3, 64, 64)],), ([torch.rand(3, 64, 96)],)])
    pyramid = [f"backbone.fpn.carafe_upsample.{k}" for k in range(3)]
    assert names(report) == ["roi_heads.mask_predictor.conv5_mask", *pyramid]
    target = {
        "boxes": torch.tensor([[5.0, 5.0, 40.0, 50.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
    }
    sum(model([torch.rand(3, 64, 64)], [target]).values()).backward()
    assert all(pack.content_encoder.weight.grad is not None for pack in packs_of(model))


def test_detectron2():
    pytest.importorskip("detectron2")
    from detectron2 import model_zoo
    from detectron2.modeling import build_model
    from detectron2.structures import BitMasks, Boxes, Instances
    from detectron2.utils.events import EventStorage

    cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.RPN.POST_NMS_TOPK_TEST", 8])
    model = build_model(cfg)
    report = replace_upsampling(model, [{"image": torch.zeros(3, 64, 96)}])
    pyramid = [f"backbone.carafe_upsample.{k}" for k in range(3)]
    assert names(report) == ["roi_heads.mask_head.deconv", *pyramid]
    report = replace_downsampling(model, [{"image": torch.zeros(3, 64, 96)}])
    strided = [f"res{i}.0.{layer}" for i in (3, 4, 5) for layer in ("shortcut", "conv1")]
    assert sorted(names(report)) == sorted(
        [
            *(f"backbone.bottom_up.{name}.carafe_downsample" for name in strided),
            "backbone.bottom_up.stem.carafe_downsample.0",
            "backbone.top_block.carafe_downsample.0",
        ]
    )
    instances = Instances((64, 96))
    instances.gt_boxes = Boxes(torch.tensor([[5.0, 5.0, 60.0, 50.0]]))
    instances.gt_classes = torch.tensor([1])
    instances.gt_masks = BitMasks(torch.ones(1, 64, 96))
    with EventStorage():
        losses = model.train()([{"image": torch.zeros(3, 64, 96), "instances": instances}])
    sum(losses.values()).backward()
    assert all(pack.content_encoder.weight.grad is not None for pack in packs_of(model))
