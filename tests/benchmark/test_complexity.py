"""What upsamplers and whole models cost, by carafe_d2.benchmark.complexity and by fvcore."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from detectron2.utils.analysis import FlopCountAnalysis

from carafe_d2 import add_carafe_config
from carafe_d2.benchmark import complexity
from carafe_d2.errors import UserError


@pytest.mark.parametrize("channels", [64, 256])
@pytest.mark.parametrize("scale", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"up_kernel": 3, "encoder_kernel": 1},
        {"up_kernel": 7, "encoder_kernel": 5, "compressed_channels": 16},
        {"up_group": 4, "encoder_dilation": 2},
        {"compressed_channels": 0},
    ],
)
def test_the_count_is_the_papers_formula(channels, scale, options):
    cost = complexity.cost_of("carafe", channels, scale, (7, 9), **options)
    assert cost.flops == complexity.paper_flops(channels, scale, **options)


def test_carafe_costs_what_the_paper_says():
    """199k FLOPs and 74k parameters for 256 channels."""
    cost = complexity.cost_of("carafe", 256, 2, (10, 12))
    assert (cost.flops, cost.parameters) == (199_496, 74_148)
    assert cost.torch_flops == 199_496 - 2 * (64 + 100)  # a bias of each kernel value less


@pytest.mark.parametrize(
    ("name", "flops", "parameters"),
    [
        ("nearest", 0, 0),
        ("bilinear", 2 * 4 * 4 * 256, 0),
        ("deconv", 2 * 256 * (9 * 256 + 4), 9 * 256 * 256 + 256),
        ("pixel_shuffle", 2 * 4 * 256 * (9 * 256 + 1), 4 * 256 * (9 * 256 + 1)),
    ],
)
def test_cost_of_the_other_upsamplers(name, flops, parameters):
    cost = complexity.cost_of(name, 256, 2, (5, 8))
    assert (cost.flops, cost.parameters) == (flops, parameters)


def test_wrong_options_are_user_errors():
    with pytest.raises(UserError, match="carafe: up_kernel must be odd, got 4"):
        complexity.cost_of("carafe", 256, 2, (5, 5), up_kernel=4)


def test_prints_a_row_for_every_upsampler(capsys):
    complexity.main([])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["carafe", "74,148", "199,496", "199,496", "199,168", "2.713"] in rows
    assert ["deconv", "590,080", "1,181,696", "-", "1,179,648", "16.071"] in rows
    assert {row[0] for row in rows} >= complexity.UPSAMPLERS.keys()


def test_prints_a_row_for_every_combination(capsys):
    complexity.main(["--channels", "32", "--up-kernel", "3", "5", "--compressed-channels", "8"])
    table = capsys.readouterr().out
    assert "carafe up_kernel=3 compressed_channels=8 " in table
    assert "carafe compressed_channels=8 " in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "0", "3"], "--size must be at least 1 1, got 0 3"),
        (["--channels", "0"], "channels must be an integer of at least 1"),
        (["--scale", "5"], "deconv: kernel_size 3 cannot upsample exactly by 5"),
        (["--up-group", "3"], "up_group must divide channels = 256, got 3"),
    ],
)
def test_wrong_options_end_with_one_line(arguments, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        complexity.main(arguments)


def test_detectron2_counts_the_pyramid():
    """Its analysis, as in tools/analyze_model.py, needs to be told nothing."""
    cfg = get_cfg()
    add_carafe_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_resnet_carafe_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    backbone = build_backbone(cfg).eval()
    analysis = FlopCountAnalysis(backbone, torch.zeros(1, 3, 64, 128))
    # p3..p6 are upsampled by 2 with 5x5 kernels; fvcore counts a multiply-add as one
    pixels = sum((64 // 2**level) * (128 // 2**level) for level in (3, 4, 5, 6))
    assert analysis.by_operator()["carafe_upsample"] == 16 * 4 * pixels * 25
    assert "carafe_d2::carafe_upsample" not in analysis.unsupported_ops()
