"""tools/export_model.py: what is exported detects what the model does, in images of other sizes."""

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from carafe_d2 import export
from carafe_d2.benchmark.detectors import Detector
from carafe_d2.config import load_config
from carafe_d2.data import register_shapes, shapes
from tools import export_model

CONFIG = "shapes_mask_rcnn_R18_FPN_carafe.yaml"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:pycocotools")
# Levels are what exporting takes long for.
OPTS = [
    *("MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", "96"),
    *("MODEL.RPN.IN_FEATURES", "['p4', 'p5']", "MODEL.ROI_HEADS.IN_FEATURES", "['p3', 'p4']"),
    *("MODEL.ANCHOR_GENERATOR.SIZES", "[[32], [64]]"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights with which something is found, beside a small dataset registered as `shapes_val`."""
    folder = tmp_path_factory.mktemp("export")
    shapes.main(["--root", str(folder), "--train", "1", "--val", "2", "--size", "64"])
    model = Detector(load_config(CONFIG, OPTS), (96, 128), "contiguous").model
    # Fresh weights give every anchor about the same score, and noise would order them.
    nn.init.normal_(model.proposal_generator.rpn_head.objectness_logits.weight)
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    register_shapes(folder)
    yield folder
    register_shapes()


@pytest.fixture(scope="module")
def model(folder):
    cfg = load_config(CONFIG, [*OPTS, "MODEL.WEIGHTS", str(folder / "model.pth")])
    return export_model.Predictor(cfg).model


@pytest.fixture(scope="module")
def program(model):
    return export.export_program(model)


@pytest.fixture
def run(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*options):
        weights = ["MODEL.WEIGHTS", str(folder / "model.pth")]
        export_model.main(["--config-file", CONFIG, "--output", ".", *options, *OPTS, *weights])

    return run


def check(run, model: nn.Module) -> None:
    """Two images of different sizes, in which there is something, one smaller than the padding."""
    for height, width in ((96, 128), (150, 70)):
        image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(1)) * 255
        with torch.no_grad():
            expected, detected = export.TensorDetector(model)(image), run(image)
        assert len(expected["scores"]) > 3
        assert list(detected) == list(expected) == sorted(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(detected[name], tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_program_detects_the_same(program, model):
    operator = torch.ops.carafe_d2.carafe_upsample.default
    assert sum(node.target is operator for node in program.graph.nodes) == 5
    # AOTInductor needs it, although the model is channels_last.
    weights = program.state_dict.values()
    assert all(weight.stride() == torch.empty(weight.shape).stride() for weight in weights)
    check(program.module(), model)


@pytest.mark.slow
def test_onnx_detects_the_same(run, program, model, tmp_path, monkeypatch, capsys):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export, "export_program", lambda model: program)
    run("--inline", "--run-eval")
    check(export.run_onnx("model.onnx"), model)

    file = onnx.load("model.onnx")
    assert {node.domain for node in file.graph.node} == {""}
    known = onnx.shape_inference.infer_shapes(file).graph.value_info
    assert len(known) > len(file.graph.node) / 2
    assert max(len(value.type.tensor_type.shape.dim) for value in known) <= 5
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [row[:3] for row in rows] == [["shapes_val", task, "AP"] for task in ("bbox", "segm")]
    assert all(row[3] == row[4] for row in rows)


def test_torchscript_detects_the_same(run, model, folder):
    run("--format", "torchscript")
    traced = torch.jit.load("model.ts")

    def detect(image):
        *tensors, size = traced(image)
        assert size.tolist() == list(image.shape[-2:])
        names = ["pred_boxes", "pred_classes", "pred_masks", "scores"]
        return dict(zip(names, tensors, strict=True))

    check(detect, model)


def test_postprocessing_is_detectron2s(model):
    image = torch.rand(3, 96, 128) * 255
    inputs = [{"image": image, "height": 48, "width": 70}]
    detector = export.ExportedDetector(export.TensorDetector(model), model)
    with torch.no_grad():
        (expected,), (found,) = ([o["instances"] for o in d(inputs)] for d in (model, detector))
    assert len(found) > 3
    assert found.image_size == (48, 70)
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(found.pred_masks, expected.pred_masks)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.mean() > 0 else -x


def test_part_that_cannot_be_exported_is_named():
    model = build_model(load_config(CONFIG, OPTS)).eval()
    model.backbone.fpn_upsample5 = Branching()
    message = r"^backbone.fpn_upsample5 \(Branching\) cannot be exported: [^\n]*data-dependent"
    with pytest.raises(export.UserError, match=message):
        export.export_program(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "caffe2"], "--format must be one of onnx, aotinductor, torch_export"),
        (["--format", "torch_export", "--inline"], "--inline goes with --format onnx only"),
        (["--sample-image", "a.png"], "--sample-image goes with --format torchscript only"),
        (["--format", "torchscript", "--sample-image", "a.png"], "cannot read image a.png"),
        (["--output", __file__], "test_export_model.py: File exists"),
    ],
)
def test_mistakes_take_one_line(run, options, message):
    with pytest.raises(SystemExit, match=message) as error:
        run(*options)
    assert "\n" not in str(error.value)
