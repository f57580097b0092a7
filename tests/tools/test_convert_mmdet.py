"""tools/convert_mmdet.py, from the command line."""

import functools
import logging
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from carafe_d2.config import load_config

ROOT = Path(__file__).parents[2]
SHAPES = str(ROOT / "configs" / "shapes_mask_rcnn_R18_FPN_carafe.yaml")
CLASSES = 6
assert_same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


@pytest.fixture
def convert(monkeypatch, tmp_path):
    """Runs the tool in tmp_path; returns what it wrote, or the error if it ended with one."""
    monkeypatch.chdir(tmp_path)

    def convert(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_mmdet.py", *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / "tools" / "convert_mmdet.py"), run_name="__main__")
        except SystemExit as error:
            return error.code
        return torch.load(arguments[1], weights_only=True)

    return convert


def build(norm):
    return build_model(load_config(SHAPES, ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.NORM", norm]))


@pytest.fixture(scope="module", params=["BN", "FrozenBN"])
def norm(request):
    """The normalization of the backbone."""
    return request.param


@pytest.fixture(scope="module")
def model(norm):
    torch.manual_seed(0)
    model = build(norm)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def load_in_plain_detectron2(path, norm, caplog):
    model = build(norm)
    caplog.clear()
    DetectionCheckpointer(model).load(path)
    # Warnings would name what is missing and what is not used.
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    return model.state_dict()


@pytest.mark.parametrize("layout", ["1.x", "2.x", "3.x"])
def test_detectron2_to_mmdetection_and_back(convert, model, norm, layout, caplog, capsys):
    checkpoint = {"model": model.state_dict(), "optimizer": {"lr": 1}, "iteration": 7}
    torch.save(checkpoint, "d2.pth")
    written = convert("d2.pth", "mmdet.pth", "--layout", layout, "--dataset", "shapes_val")
    assert "Left out: iteration, optimizer" in capsys.readouterr().out
    assert written["meta"]["CLASSES"] == ("disc", "ring", "star", "cross", "crescent", "blob")
    head = "bbox_head" if layout == "1.x" else "roi_head.bbox_head"
    rows = 4 * (CLASSES + (layout == "1.x"))
    assert written["state_dict"][f"{head}.fc_reg.bias"].shape == (rows,)

    back = convert("mmdet.pth", "back.pth")
    assert_same(back["model"], model.state_dict())
    assert_same(load_in_plain_detectron2("back.pth", norm, caplog), model.state_dict())


@pytest.mark.parametrize("layout", ["1.x", "2.x"])
def test_mmdetection_to_detectron2_and_back(convert, model, norm, layout, caplog):
    torch.save(model.state_dict(), "d2.pth")
    theirs = convert("d2.pth", "mmdet.pth", "--layout", layout)
    # As MMDetection would have trained it: BatchNorm everywhere, a background that is not zero.
    state_dict = theirs["state_dict"]
    for name in [name for name in state_dict if name.endswith("running_var")]:
        state_dict[name.replace("running_var", "num_batches_tracked")] = torch.tensor(5)
    if layout == "1.x":
        state_dict["bbox_head.fc_reg.weight"][:4] = 1.0
        state_dict["mask_head.conv_logits.bias"][0] = 2.0
    meta = {"CLASSES": tuple("abcdef"), "mmdet_version": "2.0.0", "hook_msgs": {"best": 0.4}}
    torch.save({"meta": meta, "state_dict": state_dict}, "published.pth")

    written = convert("published.pth", "for_d2.pth")
    assert written["matching_heuristics"] is False
    assert_same(load_in_plain_detectron2("for_d2.pth", norm, caplog), model.state_dict())
    back = convert("for_d2.pth", "back.pth")
    assert_same(back["state_dict"], state_dict)
    assert back["meta"] == meta


def test_layout_1x_to_layout_2x(convert, model):
    torch.save({"model": model.state_dict()}, "d2.pth")
    expected = convert("d2.pth", "2.pth", "--layout", "2.x")
    convert("d2.pth", "1.pth", "--layout", "1.x")
    written = convert("1.pth", "3.pth", "--to", "mmdet", "--layout", "3.x")
    assert_same(written["state_dict"], expected["state_dict"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.pth", "out.pth"], r"checkpoint absent\.pth does not exist"),
        (["https://localhost:1/a.pth", "out.pth"], "cannot fetch the weights https://localhost:1"),
        (["garbage.pth", "out.pth"], r"garbage\.pth is not a readable checkpoint"),
        (["list.pth", "out.pth"], "no checkpoint: it holds a list"),
        (["foreign.pth", "out.pth"], "MMDetection's models have no place for fc.bias"),
        (["d2.pth", "out.pth", "--to", "detectron2"], r"d2\.pth is no checkpoint of MMDetection"),
        (["mmdet.pth", "out.pth", "--layout", "1.x"], "--layout and --dataset are for writing"),
        (["mmdet.pth", "./mmdet.pth"], "is the input"),
        (["mmdet.pth", "d2.pth/out.pth"], "cannot write d2.pth/out.pth"),
        (["gn.pth", "out.pth"], r"no place for neck\.lateral_convs\.0\.gn\.weight"),
        (["d2.pth", "out.pth", "--dataset", "absent"], "dataset 'absent' is not registered"),
        (["d2.pth", "out.pth", "--dataset", "own=no.json:."], "'own': cannot read no.json"),
        (["d2.pth", "out.pth", "--dataset", "shapes_val"], "has 6 classes, the checkpoint 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_get_one_clear_line(convert, tmp_path, arguments, message):
    lateral = torch.rand(1)
    (tmp_path / "garbage.pth").write_bytes(b"garbage")
    torch.save([1], tmp_path / "list.pth")
    torch.save({"fc.bias": lateral}, tmp_path / "foreign.pth")
    d2 = {
        "backbone.fpn_lateral2.bias": lateral,
        "roi_heads.box_predictor.cls_score.bias": torch.rand(2),
    }
    torch.save({"model": d2}, tmp_path / "d2.pth")
    torch.save({"neck.lateral_convs.0.conv.bias": lateral}, tmp_path / "mmdet.pth")
    torch.save({"neck.lateral_convs.0.gn.weight": lateral}, tmp_path / "gn.pth")
    error = convert(*arguments)
    assert re.match(f"error: .*{message}", error)
    assert "\n" not in error
    assert not (tmp_path / "out.pth").exists()
