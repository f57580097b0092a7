"""tools/analyze_model.py: its figures, held to the parts of a model counted on their own."""

import re

import pytest
import torch
from detectron2.modeling import build_model

from carafe_d2.config import load_config
from tools import analyze_model

CONFIG = "shapes_mask_rcnn_R18_FPN_carafe.yaml"
# Ten boxes for the heads, whatever the random weights are.
FEW = ["TEST.DETECTIONS_PER_IMAGE", "10"]


def analyze(capsys, *arguments) -> tuple[dict[str, list[str]], dict[str, dict[str, float]]]:
    """Runs the tool; returns the table's cells by module, and the totals by task and operator."""
    analyze_model.main(["--config-file", CONFIG, *map(str, arguments)])
    output = capsys.readouterr().out
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in output.splitlines()]
    totals = {}
    for task, total, parts in re.findall(
        r"^(\w+)s: ([\d.]+)(?: \+- [\d.]+)? [GM](?: \((.*)\))?$", output, re.MULTILINE
    ):
        totals[task] = {"": float(total)}
        for part in filter(None, parts.split(", ")):
            name, value = part.split()
            totals[task][name] = float(value)
    return {name: cells for name, *cells in filter(None, rows)}, totals


def test_counts_a_whole_model(capsys):
    table, totals = analyze(capsys, "--size", 64, 128, *FEW, "MODEL.WEIGHTS", "")
    pyramid = sum(64 * 128 / 4**level for level in (3, 4, 5, 6))  # cells that are upsampled
    mask_head = 10 * 14 * 14
    outputs = 4 * 64 * (pyramid + mask_head)
    assert totals["flop"]["carafe_upsample"] == pytest.approx(25 * outputs / 1e9, abs=0.005)
    assert totals["activation"]["carafe_upsample"] == pytest.approx(outputs / 1e6, abs=0.005)
    for task in ("flop", "activation"):
        *parts, total = *list(totals[task].values())[1:], totals[task][""]
        assert sum(parts) == pytest.approx(total, abs=0.02)

    model = build_model(load_config(CONFIG))
    parameters = sum(p.numel() for p in model.parameters())
    assert totals["parameter"][""] == pytest.approx(parameters / 1e6, abs=0.005)
    # From the 2 x 4 cells of res5 to 64 channels, and a batch norm.
    assert table["backbone.fpn_lateral5"][1:] == [f"{(512 + 2) * 64 * 8 / 1e6:.3f}M", "0.512K"]
    # Compressor and encoder on the 1 x 2 cells of p6, of which reassembly makes 8.
    flops = 2 * (64 * 64 + 64 * 9 * 100) + 8 * 25 * 64
    assert table["backbone.fpn_upsample5"][1] == f"{flops / 1e6:.3f}M"


def test_averages_over_a_dataset(capsys, register_shapes):
    register_shapes(train=1, val=3)
    options = ["-n", 2, "--tasks", "activation", *FEW, "INPUT.MIN_SIZE_TEST", "64"]
    table, totals = analyze(capsys, *options)
    assert not table
    assert set(totals) == {"activation"}
    pyramid = sum(64 * 64 / 4**level for level in (3, 4, 5, 6))
    outputs = 4 * 64 * (pyramid + 10 * 14 * 14)
    assert totals["activation"]["carafe_upsample"] == pytest.approx(outputs / 1e6, abs=0.005)


def test_counts_with_weights(capsys, tmp_path):
    """Their scores count: of a class that is never found there is no box for the mask head."""
    model = build_model(load_config(CONFIG))
    torch.nn.init.zeros_(model.roi_heads.box_predictor.cls_score.weight)
    model.roi_heads.box_predictor.cls_score.bias.data[-1] = 20  # the background
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    options = ["--size", 64, 64, "--depth", 3, "--tasks", "flop", "structure"]
    table, _ = analyze(capsys, *options, "MODEL.WEIGHTS", tmp_path / "model.pth")
    assert table["roi_heads.mask_head.mask_fcn1"][1] == "0"
    assert table["roi_heads.box_head.fc1"][1] != "0"


def test_prints_parameters_and_structure(capsys):
    options = ["--config-file", CONFIG, "--tasks", "parameter", "structure"]
    analyze_model.main(options)
    output = capsys.readouterr().out
    assert "(fpn_upsample2): CARAFEPack(" in output
    assert re.search(r"backbone\.fpn_upsample2 +\| +61\.9K", output)
    assert "flop" not in output


def test_downloads_nothing(capsys, monkeypatch):
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", None)
    config = "mask_rcnn_mobilenet_v2_FPN_carafe_1x.yaml"
    analyze_model.main(["--config-file", config, "--tasks", "parameter"])
    assert "backbone.fpn_upsample2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-inputs", "0"], "--num-inputs must be at least 1, got 0"),
        (["--size", "0", "64"], "--size and --depth must be at least 1"),
        (["--tasks", "flops"], "--tasks must be among flop, activation, .*, got flops"),
        (["--tasks", "flop", "MODEL.NO_SUCH_KEY", "1"], "MODEL.NO_SUCH_KEY"),
        (["-n", "1", "DATASETS.TEST", "()"], "DATASETS.TEST is empty"),
        (["-n", "1", "DATASETS.TEST", "('none_such',)"], "none_such"),
        (["MODEL.WEIGHTS", "missing.pth"], "missing.pth"),
        (["MODEL.RESNETS.DEPTH", "19"], "MODEL.RESNETS.DEPTH = 19: .*; with 18 it works"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(SystemExit) as exit:
        analyze_model.main(["--config-file", CONFIG, *options])
    assert re.match(f"error: .*{message}", exit.value.code)
