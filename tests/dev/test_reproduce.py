"""dev/reproduce.py: the page of results, and the measuring of its rows on the shapes dataset."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from carafe_d2.config import load_config
from carafe_d2.errors import UserError
from carafe_d2.files import MarkdownBlock
from dev import reproduce

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "dev" / "reproduce.py"
RESULTS = json.loads((ROOT / "docs" / "results.json").read_text())["rows"]
UPERNET = [row for row in RESULTS if row["table"] == "upernet"]
DETECTORS = [row for row in RESULTS if row["table"] == "mmdetection"]
ABLATIONS = [row for row in RESULTS if row not in UPERNET + DETECTORS]
CONFIG = "configs/shapes_mask_rcnn_R18_FPN_carafe.yaml"
SMALL = [
    *("INPUT.MIN_SIZE_TEST", "64", "MODEL.DEVICE", "cpu"),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "5"),
]


# --- the rows and their page --------------------------------------------------------------------


def test_rows_are_those_of_the_published_tables():
    published = {
        (row["model"], row["year"], row["proposals"]): reproduce.figures(row["published"])
        for row in DETECTORS
    }
    assert published == {
        ("Faster R-CNN w/ CARAFE", 2019, 1000): "37.8",
        ("Faster R-CNN w/ CARAFE", 2019, 2000): "37.9",
        ("Mask R-CNN w/ CARAFE", 2019, 1000): "38.6 / 35.6",
        ("Mask R-CNN w/ CARAFE", 2019, 2000): "38.6 / 35.7",
        ("Faster R-CNN w/ CARAFE", 2020, 1000): "38.6 (16.5 images/s)",
        ("Faster R-CNN w/ CARAFE", 2020, 2000): "",
        ("Mask R-CNN w/ CARAFE", 2020, 1000): "39.3 / 35.8 (14.0 images/s)",
        ("Mask R-CNN w/ CARAFE", 2020, 2000): "",
    }


def test_rows_of_upernet_are_all_combinations_of_its_parts():
    published = {
        row["variant"]: reproduce.figures(row["published"]) for row in UPERNET if row["published"]
    }
    assert published == {
        "none": "40.44 / 79.80",
        "pyramid pooling": "40.85",
        "pyramid": "40.79",
        "fusion": "41.06",
        "pyramid pooling, pyramid, fusion": "42.23 / 80.34",
    }
    combinations, folders = set(), set()
    for row in UPERNET:
        cfg = load_config(str(ROOT / row["training_config"]), reproduce.training_overrides(row))
        combinations.add(row["variant"])
        folders.add(cfg.OUTPUT_DIR)
        parts = {"PPM": "pyramid pooling", "FPN": "pyramid", "FUSE": "fusion"}
        with_carafe = [
            part for key, part in parts.items() if cfg.MODEL.UPERNET[f"{key}_UPSAMPLE"] == "carafe"
        ]
        assert row["variant"] == (", ".join(with_carafe) or "none")
        command = reproduce.evaluation_command(row, "model.pth")
        assert command == [
            *("train_net.py", "--config-file", row["training_config"], "--eval-only"),
            *("MODEL.WEIGHTS", "model.pth", *reproduce.training_overrides(row)),
        ]
    assert len(combinations) == len(folders) == len(UPERNET) == 2**3


def test_rows_of_the_papers_other_tables():
    published = {
        (row["table"], row["model"], row["variant"]): reproduce.figures(row["published"])
        for row in ABLATIONS
        if row["published"]
    }
    faster, mask, both = "Faster R-CNN", "Mask R-CNN", "pyramid, mask head"
    assert published == {
        ("test_dev", faster, "none"): "36.9",
        ("test_dev", faster, "pyramid"): "38.1",
        ("test_dev", mask, "none"): "37.8 / 34.6",
        ("test_dev", mask, both): "38.8 / 35.9",
        ("placement", mask, "none"): "37.4 / 34.2",
        ("placement", mask, "pyramid"): "38.6 / 35.2",
        ("placement", mask, "mask head"): "37.3 / 34.7",
        ("placement", mask, both): "38.6 / 35.7",
        ("pyramid_upsampler", faster, "nearest"): "36.5",
        ("pyramid_upsampler", faster, "carafe"): "37.8",
        ("mask_head_upsampler", mask, "deconv"): "37.4 / 34.2",
        ("mask_head_upsampler", mask, "carafe"): "37.3 / 34.7",
        ("kernels", faster, "3, 5"): "37.8",
        ("compressor", faster, "64"): "37.8",
        ("normalizer", faster, "softmax"): "37.8",
        ("inpainting", "Global&Local", "deconv"): "19.58",
        ("inpainting", "Global&Local", "carafe"): "20.71",
        ("inpainting", "Partial Conv", "nearest"): "20.78",
        ("inpainting", "Partial Conv", "carafe"): "20.98",
    }


def variant_of(cfg, table):
    """What tells a row of a table from the others, by its config."""
    model, carafe = cfg.MODEL, cfg.MODEL.CARAFE
    pyramid = "carafe" in model.BACKBONE.NAME and model.FPN.UPSAMPLE
    head = model.MASK_ON and model.ROI_MASK_HEAD.UPSAMPLE
    if table == "mask_head_upsampler":
        assert not pyramid
        return head
    if table in ("test_dev", "placement"):
        parts = {"pyramid": pyramid, "mask head": head}
        return ", ".join(part for part, name in parts.items() if name == "carafe") or "none"
    return {
        "pyramid_upsampler": pyramid,
        "kernels": f"{carafe.ENCODER_KERNEL}, {carafe.UP_KERNEL}",
        "compressor": str(carafe.COMPRESSED_CHANNELS or "no compressor"),
        "normalizer": carafe.NORMALIZER,
        "inpainting": model.INPAINT.UPSAMPLE,
    }[table]


def test_configs_of_these_rows_are_their_variants():
    trainings = {}
    for row in ABLATIONS:
        cfg = load_config(str(ROOT / reproduce.config_of(row)), reproduce.overrides_of(row))
        assert variant_of(cfg, row["table"]) == row["variant"], row["name"]
        kind = {"Faster R-CNN": False, "Mask R-CNN": True}.get(row["model"])
        assert kind is None or (kind, "LegacyRCNN") == (
            cfg.MODEL.MASK_ON,
            cfg.MODEL.META_ARCHITECTURE,
        )
        test_dev = cfg.DATASETS.TEST == ("coco_2017_test-dev",)
        assert test_dev == (row["table"] == "test_dev")
        # Models that are the same are trained once, and others never into the same folder.
        trainings.setdefault(cfg.OUTPUT_DIR, set()).add(tuple(reproduce.training_command(row)))
    assert all(len(commands) == 1 for commands in trainings.values())
    commands = {command for (command,) in trainings.values()}
    assert len(commands) == len(trainings)


@pytest.mark.parametrize("row", DETECTORS, ids=lambda row: row["name"])
def test_config_of_a_row_is_the_model_of_the_row(row):
    cfg = load_config(str(ROOT / reproduce.config_of(row)), reproduce.overrides_of(row))
    assert ("mask" in row["name"]) == cfg.MODEL.MASK_ON
    assert (row["year"] == 2019) == (cfg.MODEL.META_ARCHITECTURE == "LegacyRCNN")
    proposals = (cfg.MODEL.RPN.PRE_NMS_TOPK_TEST, cfg.MODEL.RPN.POST_NMS_TOPK_TEST)
    assert proposals == (row["proposals"], row["proposals"])
    kind, year = row["name"].split("_")[0], "_2019" if row["year"] == 2019 else ""
    assert row["training_config"] == f"configs/{kind}_rcnn_R50_FPN_carafe_1x{year}.yaml"
    assert f"/{kind}_rcnn_r50_fpn_carafe_1x" in row["checkpoint"]


def test_page_is_up_to_date(tmp_path):
    page = ROOT / "docs" / "results.md"
    copy = tmp_path / "results.md"
    copy.write_text(page.read_text())
    MarkdownBlock(copy, reproduce.BLOCK).write(reproduce.page_content(RESULTS))
    assert copy.read_text() == page.read_text()


def test_page_says_where_a_row_was_measured():
    measured = {"box AP": 38.5, "machine": "a fast one", "devices": 2, "detectron2": "0.6"}
    rows = [{**RESULTS[i], "measured": {"trained": measured}} for i in (0, -1)]
    content = reproduce.page_content([rows[0], *RESULTS[1:-1], rows[1]])
    assert content.count("| 38.5 ") == 2
    for row in rows:
        assert f"- `{row['name']}`, trained: 2 x a fast one, Detectron2 0.6." in content


# --- what Detectron2 prints ---------------------------------------------------------------------

LOG = """\
[01/01 00:00:00 d2.evaluation.evaluator]: Total inference time: 0:00:09 (0.1 s / iter per device)
[01/01 00:00:00 d2.evaluation.evaluator]: Total inference pure compute time: 0:00:08 (0.080000 s / iter per device, on 2 devices)
[01/01 00:00:00 d2.evaluation.testing]: copypaste: Task: bbox
[01/01 00:00:00 d2.evaluation.testing]: copypaste: AP,AP50,AP75,APs,APm,APl
[01/01 00:00:00 d2.evaluation.testing]: copypaste: 39.3123,60.0,42.0,22.0,43.0,51.0
[01/01 00:00:00 d2.evaluation.testing]: copypaste: Task: segm
[01/01 00:00:00 d2.evaluation.testing]: copypaste: AP,AP50,AP75,APs,APm,APl
[01/01 00:00:00 d2.evaluation.testing]: copypaste: 35.8456,57.0,38.0,19.0,39.0,48.0
"""  # noqa: E501


def test_metrics_of_a_log():
    assert reproduce.metrics(LOG) == {"box AP": 39.31, "mask AP": 35.85, "images/s": 12.5}
    boxes_only = LOG[: LOG.index("copypaste: Task: segm")]
    assert reproduce.metrics(boxes_only) == {"box AP": 39.31, "images/s": 12.5}


def test_metrics_of_semantic_segmentation():
    log = """\
[01/01 00:00:00 d2.evaluation.testing]: copypaste: Task: sem_seg
[01/01 00:00:00 d2.evaluation.testing]: copypaste: mIoU,fwIoU,mACC,pACC
[01/01 00:00:00 d2.evaluation.testing]: copypaste: 42.2345,67.0,53.0,80.3449
"""
    result = reproduce.metrics(log)
    assert result == {"mIoU": 42.23, "pixel accuracy": 80.34}
    assert reproduce.figures({**result, "images/s": 3.0}) == "42.23 / 80.34 (3.0 images/s)"


def test_metrics_of_inpainting():
    log = """\
[01/01 00:00:00 d2.evaluation.testing]: copypaste: Task: inpainting
[01/01 00:00:00 d2.evaluation.testing]: copypaste: L1,PSNR
[01/01 00:00:00 d2.evaluation.testing]: copypaste: 5.9123,20.7149
"""
    result = reproduce.metrics(log)
    assert result == {"L1": 5.91, "PSNR": 20.71}
    assert reproduce.figures(result) == "20.71 / 5.91"


def test_no_ap_is_no_result():
    for log in ("", LOG.replace("39.3123", "nan")):
        with pytest.raises(UserError, match="no AP"):
            reproduce.metrics(log)


# --- the program --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def machine(register_shapes, tmp_path_factory):
    """A small dataset, and the folder of the only checkpoint."""
    register_shapes(train=1, val=12)
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    model = build_model(load_config(str(ROOT / CONFIG), ["MODEL.DEVICE", "cpu"]))
    torch.save({"model": model.state_dict()}, folder / "shapes.pth")
    return folder


# An address that nothing answers at.
HOST = "http://127.0.0.1:9"


def row(name, checkpoint="shapes.pth", config=CONFIG, overrides=(), training_config=CONFIG):
    return {
        "name": name,
        "table": "mmdetection",
        "model": "Mask R-CNN w/ CARAFE",
        "year": 2020,
        "proposals": 100,
        "config": config,
        "overrides": [*SMALL, *overrides],
        "training_config": training_config,
        "checkpoint": f"{HOST}/{checkpoint}",
        "published": {"box AP": 54.0, "mask AP": 41.3},
    }


@pytest.fixture
def arguments_for(machine, tmp_path):
    """Writes rows, and a page for them; returns the arguments of the program."""

    def write(rows):
        results = tmp_path / "results.json"
        results.write_text(json.dumps({"rows": rows}))
        begin = f"<!-- begin: {reproduce.BLOCK} -->"
        page = f"# Before\n{begin}\nold\n<!-- end -->\n# After\n"
        results.with_suffix(".md").write_text(page)
        paths = {"results": results, "output": tmp_path / "output", "checkpoints": machine}
        return [f"--{option}={path}" for option, path in paths.items()]

    return write


@pytest.mark.slow
def test_rows_that_can_be_measured_are(arguments_for, tmp_path):
    arguments = arguments_for(
        [
            row("measured"),
            row("without_dataset", config="configs/mask_rcnn_R50_FPN_carafe_1x.yaml"),
            row("without_checkpoint", checkpoint="gone.pth"),
            row("broken", overrides=["MODEL.CARAFE.UP_GROUP", "5"]),
        ]
    )
    process = subprocess.run(
        [sys.executable, TOOL, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = process.stdout
    assert process.returncode == 0, output
    assert "Traceback" not in output
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    page = (tmp_path / "results.md").read_text()

    result = rows[0]["measured"]["published"]
    assert 0 <= result["mask AP"] <= 100
    assert result["images/s"] > 0
    assert result["devices"] == 1
    assert f"PyTorch {torch.__version__}" in result["machine"]
    assert rows[0]["measured"].keys() == {"published"}
    assert not any("measured" in r for r in rows[1:])

    figures = reproduce.figures(result)
    assert page.startswith("# Before\n") and page.endswith("# After\n") and "old" not in page
    table = [[c.strip() for c in ln.split("|")[1:-1]] for ln in page.splitlines() if "|" in ln]
    assert [row[5:] for row in table[2:]] == [["54.0 / 41.3", figures, ""]] + 3 * [
        ["54.0 / 41.3", "", ""]
    ]

    reasons = {
        "measured": f"{re.escape(figures)}; published: 54.0 / 41.3",
        "without_dataset": "not measured: dataset 'coco_2017_val': .*DETECTRON2_DATASETS",
        "without_checkpoint": f"not measured: cannot fetch {HOST}/gone.pth .*--checkpoints",
        "broken": "not measured: MODEL.CARAFE.UP_GROUP = 5 must divide",
    }
    for name, reason in reasons.items():
        assert re.search(f"^{name}: {reason}", output, re.MULTILINE), output


def test_nothing_to_measure_is_refused(arguments_for, tmp_path, capsys):
    config = tmp_path / "never_trained.yaml"
    config.write_text(f'_BASE_: "{ROOT / CONFIG}"\nOUTPUT_DIR: "{tmp_path / "never_trained"}"\n')
    untrained = row("a", training_config=str(config))
    keys = ["MODEL.DEVICE", "cpu"]
    unpublished = {**untrained, "name": "b", "checkpoint": None, "training_overrides": keys}
    arguments = arguments_for([untrained, unpublished])
    missing = r"not measured: .*model_final.pth does not exist; python train_net.py"
    for options, reasons in (
        (
            ["--weights", "trained"],
            [f"a: {missing}", f"b: {missing} .* MODEL.DEVICE cpu writes"],
        ),
        (["--rows", "b"], ["b: not measured: no checkpoint was published"]),
    ):
        with pytest.raises(SystemExit, match=r"^error: no row could be measured, for the reasons"):
            reproduce.main([*arguments, *options])
        output = capsys.readouterr().out
        for reason in reasons:
            assert re.search(f"^{reason}", output, re.MULTILINE), output
    assert json.loads((tmp_path / "results.json").read_text()) == {"rows": [untrained, unpublished]}


def test_mistakes_get_one_clear_line(tmp_path):
    results = tmp_path / "results.json"
    for rows, names, message in (
        ([row("a"), row("b")], ["--rows", "c"], "there is no row 'c'; rows are a, b"),
        ([row("a")], [], "cannot read .*results.md: No such file"),
        ({"a": "b"}, [], r".*results\.json holds no table of results"),
    ):
        results.write_text(json.dumps({"rows": rows}))
        with pytest.raises(SystemExit, match=f"^error: {message}"):
            reproduce.main(["--results", str(results), *names])
