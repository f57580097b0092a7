"""dev/compare.py: boundary AP, the report, and a comparison on a small shapes dataset."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from carafe_d2.upsample import UPSAMPLERS
from dev import compare

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "dev" / "compare.py"


def test_upsamplers_are_compared():
    assert set(compare.METHODS) <= set(UPSAMPLERS)


# --- boundary AP --------------------------------------------------------------------------------

SIZE = 128  # of an image; 2% of its diagonal are 3.6, so boundaries are 4 pixels wide


def square(x, y, side=40):
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[y : y + side, x : x + side] = 1
    return mask


def annotation(image_id, mask, **keys):
    rle = mask_util.encode(np.asfortranarray(mask))
    return {
        "image_id": image_id,
        "category_id": 1,
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
        **keys,
    }


def average_precisions(folder, pairs, **keys):
    """Boundary AP and mask AP of pairs of masks: the object in an image and what was detected."""
    objects = [
        {**annotation(i, truth, id=i, iscrowd=0, area=int(truth.sum())), "bbox": [0, 0, 1, 1]}
        for i, (truth, _) in enumerate(pairs, start=1)
    ]
    content = {
        "info": {},
        "images": [{"id": a["image_id"], "height": SIZE, "width": SIZE} for a in objects],
        "categories": [{"id": 1, "name": "square"}],
        "annotations": objects,
    }
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    detections = [
        annotation(i, found, score=1 - i / 100, bbox=[0, 0, 1, 1])
        for i, (_, found) in enumerate(pairs, start=1)
    ]
    ground_truth = COCO(str(path))
    masks_only = [{k: v for k, v in d.items() if k != "bbox"} for d in detections]
    evaluation = COCOeval(ground_truth, ground_truth.loadRes(masks_only), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return compare.boundary_ap(path, detections), 100 * evaluation.stats[0]


def test_boundary_is_four_pixels_wide_and_follows_the_image_border():
    expected = square(10, 20)
    expected[24:56, 14:46] = 0
    np.testing.assert_array_equal(compare.boundary(square(10, 20)), expected)
    at_corner = square(0, 0)
    at_corner[4:36, 4:36] = 0
    np.testing.assert_array_equal(compare.boundary(square(0, 0)), at_corner)
    thin = square(5, 5, side=8)
    np.testing.assert_array_equal(compare.boundary(thin), thin)
    tiny = np.ones((8, 8), np.uint8)  # 2 % of its diagonal are no pixel, but one is taken
    np.testing.assert_array_equal(
        compare.boundary(tiny), np.pad(np.zeros_like(tiny[2:, 2:]), 1, constant_values=1)
    )


def test_perfect_masks_have_boundary_ap_100(tmp_path):
    masks = [square(10, 20), square(0, 0), square(50, 60, side=30)]
    boundary_ap, mask_ap = average_precisions(tmp_path, [(m, m) for m in masks])
    assert boundary_ap == pytest.approx(100)
    assert mask_ap == pytest.approx(100)


def test_boundary_ap_is_the_mean_over_thresholds_of_the_smaller_iou(tmp_path):
    truth, found = square(40, 40), square(42, 40)
    mask_iou = (38 * 40) / (2 * 40 * 40 - 38 * 40)
    # Distance to the outside instead of erosion: an independent way to the same four pixels.
    borders = [
        (cv2.distanceTransform(np.pad(m, 1), cv2.DIST_C, 3)[1:-1, 1:-1] <= 4) & (m == 1)
        for m in (truth, found)
    ]
    boundary_iou = (borders[0] & borders[1]).sum() / (borders[0] | borders[1]).sum()
    assert boundary_iou < mask_iou

    thresholds = np.linspace(0.5, 0.95, 10)
    boundary_ap, mask_ap = average_precisions(tmp_path, [(truth, found)])
    assert mask_ap == pytest.approx(100 * (thresholds <= mask_iou).mean())
    assert boundary_ap == pytest.approx(100 * (thresholds <= boundary_iou).mean())
    assert boundary_ap < mask_ap


def test_where_borders_agree_better_than_masks_the_masks_count(tmp_path):
    truth, found = square(10, 10, side=100), square(10, 10, side=100)
    truth[20:100, 20:100] = 0  # mask IoU 0.36, boundary IoU 0.53
    boundary_ap, mask_ap = average_precisions(tmp_path, [(truth, found)])
    assert boundary_ap == mask_ap == 0


def test_no_detections_have_no_boundary_ap(tmp_path):
    assert math.isnan(compare.boundary_ap(tmp_path / "never_read.json", []))


# --- the report ---------------------------------------------------------------------------------


def result(box, mask, boundary, seconds=0.5):
    return dict(zip((*compare.METRICS, "s/iteration"), (box, mask, boundary, seconds), strict=True))


def method(*results, parameters=1_234_567):
    return {
        "parameters": parameters,
        "summary": compare.summarize(results),
        "seeds": dict(enumerate(results, start=1)),
    }


def cells(table):
    """The cells of each row of a Markdown table."""
    return [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]


def test_summary_is_mean_and_sample_standard_deviation():
    summary = compare.summarize([result(10, 1, 2, 0.5), result(12, 1, 2, 0.7), result(14, 1, 2)])
    assert summary["box AP"] == {"mean": 12, "std": 2}
    assert summary["mask AP"] == {"mean": 1, "std": 0}
    assert summary["s/iteration"] == pytest.approx(1.7 / 3)


def test_table_has_a_row_for_each_method():
    rows = cells(
        compare.table(
            {
                "pixel_shuffle": method(result(10, 20, 30), result(12, 24, 30)),
                "carafe": method(result(50, 40, 30, seconds=None), parameters=2_000_000),
            },
            markdown=True,
        )
    )
    assert rows[0] == ["pyramid", "mask head", *compare.METRICS, "parameters", "s/iteration"]
    assert rows[2:] == [
        ["pixel_shuffle", "deconv", "11.0 ± 1.4", "22.0 ± 2.8", "30.0 ± 0.0", "1.23 M", "0.50"],
        ["carafe", "carafe", "50.0", "40.0", "30.0", "2.00 M", "-"],
    ]


def test_plot_is_a_picture_also_of_single_seeds_and_missing_values(tmp_path):
    methods = {
        "nearest": method(result(10, 20, 30), result(12, 24, 30)),
        "carafe": method(result(50, 40, math.nan)),
    }
    compare.plot(methods, tmp_path / "compare.png")
    assert cv2.imread(str(tmp_path / "compare.png")).std() > 10


# --- the program --------------------------------------------------------------------------------

SMALL = [
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "MODEL.DEVICE", "cpu"),
    *("SOLVER.IMS_PER_BATCH", "2", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
]


@pytest.fixture(scope="module")
def datasets(register_shapes):
    register_shapes(train=4, val=2)


@pytest.fixture
def main(datasets, tmp_path, monkeypatch):
    """The program, in this process, which stays as it is; its folder is tmp_path / "out"."""
    monkeypatch.setattr(compare.signal, "signal", lambda *_: None)
    return lambda *arguments: compare.main(["--output", str(tmp_path / "out"), *arguments])


@pytest.mark.slow
def test_comparison_from_start_to_page_and_its_continuation(main, tmp_path, capsys):
    page = tmp_path / "page.md"
    begin = f"<!-- begin: {compare.BLOCK} -->"
    assert begin in (ROOT / "docs" / "compare.md").read_text()
    page.write_text(f"# Before\n{begin}\nold\n<!-- end -->\n# After\n")
    arguments = ["--methods", "nearest,carafe", "--seeds", "1", "--iterations", "5"]
    command = [sys.executable, TOOL, *arguments, "--output", tmp_path / "out", "--markdown", page]
    process = subprocess.run([*command, *SMALL], capture_output=True, text=True)
    output = process.stdout
    assert process.returncode == 0, process.stderr
    assert "2 runs, 0 of them finished already" in output

    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(report["methods"]) == ["nearest", "carafe"]
    parameters = [m["parameters"] for m in report["methods"].values()]
    assert parameters[0] < parameters[1]
    for name, entry in report["methods"].items():
        measured = entry["seeds"]["1"]
        assert all(0 <= measured[metric] <= 100 for metric in compare.METRICS)
        assert measured["boundary AP"] <= measured["mask AP"]
        assert measured["s/iteration"] > 0
        command = (tmp_path / "out" / f"{name}_seed1" / "command.txt").read_text()
        for words in (f"FPN.UPSAMPLE {name}", f"HEAD.UPSAMPLE {name}", "SEED 1", "MAX_ITER 5"):
            assert words in command

    assert compare.table(report["methods"]) in output
    text = page.read_text()
    assert text.startswith("# Before\n") and text.endswith("# After\n") and "old" not in text
    assert compare.table(report["methods"], markdown=True) in text
    assert (tmp_path / "images" / "compare.png").is_file()

    # Finished runs are kept as they are; with other settings their folders are refused.
    weights = tmp_path / "out" / "carafe_seed1" / "model_final.pth"
    written = weights.stat().st_mtime_ns
    main(*arguments, *SMALL)
    assert "2 runs, 2 of them finished already" in capsys.readouterr().out
    assert weights.stat().st_mtime_ns == written
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["methods"] == report["methods"]
    arguments[-1] = "6"
    with pytest.raises(SystemExit, match=r"^error: .*nearest_seed1 holds a run with other"):
        main(*arguments, *SMALL)


@pytest.mark.slow
def test_failing_run_is_named_and_the_others_go_on(main, tmp_path, capsys):
    arguments = ["--methods", "carafe,nearest", "--seeds", "1", "--iterations", "2"]
    # Only CARAFE looks at this key.
    with pytest.raises(SystemExit, match=r"^error: 1 of 2 runs failed, for the reasons above$"):
        main(*arguments, *SMALL, "MODEL.CARAFE.UP_GROUP", "5")
    output = capsys.readouterr().out
    log = tmp_path / "out" / "carafe_seed1" / "train.log"
    reason = r"MODEL\.CARAFE\.UP_GROUP = 5 must divide the 64"
    assert re.search(rf"^carafe, seed 1: failed: {reason}.*\(log: {log}\)", output, re.M), output
    assert log.is_file()
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(report["methods"]) == ["nearest"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "nearest,bicubic"], r"--methods must be of nearest, .*, got 'bicubic'"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--iterations", "-3"], "--iterations must be at least 1, got -3"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--markdown", "absent.md"], r"cannot read absent\.md"),
        (["--config-file", "absent.yaml"], r"config file 'absent\.yaml' does not exist"),
        (["--config-file", "configs/faster_rcnn_R50_FPN_carafe_1x.yaml"], r"needs MODEL\.MASK_ON"),
        (["--output", "README.md"], r"--output README\.md: File exists"),
        (["SEED", "1"], "SEED is set by --seeds"),
        (["MODEL.NONSENSE", "1"], r"Non-existent (config )?key: MODEL\.NONSENSE"),
        (["DATASETS.TRAIN", "('nonsense',)"], "dataset 'nonsense' .* is not registered"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_mistakes_get_one_clear_line(monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        compare.main(["--output", str(tmp_path), *arguments])
    assert list(tmp_path.iterdir()) == []
