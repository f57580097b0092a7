"""What `import carafe_d2` does for other people's projects, each in a process of its own."""

import subprocess
import sys
import textwrap

import pytest


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )


def test_another_project_selects_the_backbone_by_name():
    result = run(
        """
        from detectron2.config import get_cfg
        from detectron2.modeling import build_model
        import carafe_d2

        cfg = get_cfg()
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.WEIGHTS = ""
        cfg.MODEL.BACKBONE.NAME = "build_resnet_carafe_fpn_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
        cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
        cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
        cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
        cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 2
        cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNCarafeUpsampleHead"
        cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 4
        cfg.MODEL.MASK_ON = True
        model = build_model(cfg)
        packs = [n for n, m in model.named_modules() if isinstance(m, carafe_d2.CARAFEPack)]
        print(*packs)
        """
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [
        "backbone.fpn_upsample2",
        "backbone.fpn_upsample3",
        "backbone.fpn_upsample4",
        "backbone.fpn_upsample5",
        "roi_heads.mask_head.upsample",
    ]


@pytest.mark.parametrize("name", ["CarafeFPN", "downsample_with_carafe"])
def test_a_part_of_the_backbone_can_be_imported_first(name):
    result = run(
        f"""
        from carafe_d2 import {name}
        from detectron2.modeling import BACKBONE_REGISTRY

        print(*(name for name, _ in BACKBONE_REGISTRY if "carafe" in name))
        """
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) == 7


def test_without_detectron2_the_operator_works_and_other_names_say_how_to_install_it():
    result = run(
        """
        import sys
        sys.modules["detectron2"] = None  # Python's way to make an import fail
        import torch
        import carafe_d2

        print(tuple(carafe_d2.CARAFEPack(4, 2)(torch.zeros(1, 4, 3, 3)).shape))
        carafe_d2.add_carafe_config
        """
    )
    assert result.stdout.strip() == "(1, 4, 6, 6)", result.stderr
    assert "carafe_d2.add_carafe_config needs Detectron2" in result.stderr
    assert "ImportError" in result.stderr
    assert "install_detectron2.py" in result.stderr


def test_operator_half_imports_nothing_of_detectron2():
    result = run(
        """
        import sys
        import carafe_d2.ops, carafe_d2.reference, carafe_d2.replace, carafe_d2.upsample
        for module in ("ops", "reference", "replace", "upsample"):
            names = vars(sys.modules[f"carafe_d2.{module}"]).values()
            print([n for n in names if "detectron2" in getattr(n, "__module__", "") or ""])
        """
    )
    assert result.stdout.split() == ["[]"] * 4
