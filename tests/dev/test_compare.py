"""dev/compare.py: boundary AP and IoU, the report, and a comparison on small drawn nuclei."""

import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models import mobilenet_v2

from carafe_d2.files import write_file
from carafe_d2.upsample import UPSAMPLERS
from dev import compare, real_images

ROOT = Path(__file__).parents[2]


def test_all_upsamplers_are_compared():
    assert set(compare.METHODS) == set(UPSAMPLERS)


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


def test_boundary_iou_is_summed_over_images(tmp_path):
    truths = [square(10, 20), square(50, 60, side=30)]
    found = [square(10, 20), square(52, 60, side=30)]
    records, predictions = [], []
    for i, (labels, mask) in enumerate(zip(truths, found, strict=True)):
        records.append({"file_name": f"{i}.png", "sem_seg_file_name": str(tmp_path / f"{i}.png")})
        cv2.imwrite(records[-1]["sem_seg_file_name"], labels)
        for category, region in enumerate((1 - mask, mask)):
            rle = annotation(i, region)["segmentation"]
            predictions.append(
                {"file_name": f"{i}.png", "category_id": category, "segmentation": rle}
            )
    # A frame four pixels wide has 16 * (side - 4) of them; the two of the second image, two pixels
    # apart, share two of the four columns to the left and right, and above and below 28 of 30.
    first, second = 16 * 36, 16 * 26
    both = 2 * 4 * 28 + 2 * 2 * 22
    iou = (first + both) / (first + 2 * second - both)
    assert compare.boundary_iou(predictions, records, 1) == pytest.approx(100 * iou)
    # In an image where nobody has found the class, no border is found.
    alone = [p for p in predictions if p["file_name"] == "0.png"]
    expected = 100 * first / (first + second)
    assert compare.boundary_iou(alone, records, 1) == pytest.approx(expected)
    assert math.isnan(compare.boundary_iou([], records, 2))


# --- the report ---------------------------------------------------------------------------------

INSTANCES = compare.STUDIES["instances"]


def result(*values):
    return dict(zip(INSTANCES.metrics, values, strict=True))


def method(*results, parameters=1_234_567):
    return {
        "rate": 0.001,
        "parameters": parameters,
        "flops": 2_500_000_000,
        "tuning": {},
        "seeds": dict(enumerate(results, start=1)),
    }


def cells(table):
    """The cells of each row of a Markdown table."""
    return [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]


def test_interval_is_that_of_students_t():
    mean, half = compare.interval([10, 12, 14])
    assert mean == 12
    assert half == pytest.approx(4.303 * 2 / math.sqrt(3), rel=1e-3)
    assert compare.interval([10]) == (10, None)


def test_table_has_a_row_for_each_method_and_what_carafe_gains_seed_by_seed():
    table = compare.table(
        INSTANCES,
        {
            "deconv": method(result(10, 20, 30), result(12, 24, 30)),
            "carafe": method(result(11, 40, 30), result(14, 40, 30), parameters=2_000_000),
        },
        markdown=True,
    )
    header, _, *rows = cells(table)
    assert header[:6] == [
        "upsampler",
        "learning rate",
        *INSTANCES.metrics,
        "CARAFE ahead in mask AP",
    ]
    assert rows[0] == [
        *("deconv", "0.001", "11.00 ± 12.71", "22.00 ± 25.41", "30.00 ± 0.00", "+1.50 ± 6.35"),
        *("1.235 M", "2.50"),
    ]
    assert rows[1][:3] == ["carafe", "0.001", "12.50 ± 19.06"]
    assert rows[1][5:] == ["", "2.000 M", "2.50"]


def test_plot_is_a_picture_also_of_single_seeds_and_missing_values(tmp_path):
    methods = {
        "nearest": method(result(10, 20, 30), result(12, 24, 30)),
        "carafe": method(result(50, 40, math.nan)),
    }
    compare.plot({"instances": methods}, tmp_path / "compare.png")
    assert cv2.imread(str(tmp_path / "compare.png")).std() > 10


# --- runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two drawn frames in the place of those that dev/real_images.py fetches; random weights."""
    folder = tmp_path_factory.mktemp("real")
    rng = np.random.default_rng(0)
    labels = np.zeros((2, 160, 1100), np.uint16)
    for frame in labels:
        for i, center in enumerate(rng.uniform((0, 0), (1100, 160), (40, 2)), start=1):
            cv2.circle(frame, center.astype(int).tolist(), 18, (i,), -1)
    frames = (60 + 120 * (labels > 0) + rng.integers(0, 20, labels.shape)).astype(np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_images, "ROWS", (30, 158))
        for name in real_images.SETS:
            real_images.write_set(name, frames, labels, folder)
    torch.save(mobilenet_v2().features.state_dict(), folder / "weights.pt")
    real_images.convert_weights(folder / "weights.pt", folder / "mobilenet_v2.pth")
    return folder


@pytest.fixture
def run_of(data, tmp_path):
    """Makes the run of a study and method with seed 1."""
    args = compare.parse_args(
        ["--data", str(data), "--output", str(tmp_path / "out"), "--iterations", "1"]
    )
    compare.check_args(args)
    return lambda study, method: compare.make_run(args, compare.STUDIES[study], method, 0.002, 1)


@pytest.mark.slow
def test_training_is_measured_and_drawn(run_of, tmp_path):
    run = run_of("semantic", "carafe")
    assert compare.run_all([run], 1, 1) == {}
    # Nothing of the backbone is among what the checkpoint lacks, or has too much of.
    assert "backbone.bottom_up" not in run.log.read_text()
    result = run.result()
    assert set(result) == {"mIoU", "boundary IoU"}
    assert 0 <= result["boundary IoU"] <= 100 and 0 < result["mIoU"] <= 100
    parts = compare.illustrate([{"carafe": [run]}], tmp_path / "pictures")
    assert [row[:2] for row in cells(parts[3])[2:4]] == [
        ["semantic, backbone.fpn_upsample2", "border"],
        ["semantic, backbone.fpn_upsample2", "inside"],
    ]
    for name in ("borders", "kernels"):
        assert cv2.imread(str(tmp_path / "pictures" / f"compare_{name}.png")).std() > 10
    bilinear = compare.cost(run_of("semantic", "bilinear"))
    carafe = compare.cost(run)
    assert all(bilinear[name] < carafe[name] for name in ("parameters", "flops"))


def write_detections(run, change):
    """Puts what a training would leave into a run's folder: the truth, changed."""
    truth = json.loads(Path(MetadataCatalog.get("real_instances_test").json_file).read_text())
    detections = [{**a, "score": 0.9, **change} for a in truth["annotations"]]
    (run.folder / "inference").mkdir(parents=True)
    path = run.folder / "inference" / "coco_instances_results.json"
    path.write_text(json.dumps(detections))
    lines = [{"time": 0.2}, {"bbox/AP": 12, "segm/AP": 34}]
    (run.folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))


def test_instances_are_measured_and_drawn_above_half_the_score(run_of):
    run = run_of("instances", "nearest")
    run.config()  # registers the datasets
    records = DatasetCatalog.get("real_instances_test")
    record = max(records, key=lambda record: len(record["annotations"]))
    write_detections(run, {})
    assert compare.finish(run, 0) == run.result()
    expected = {"mask AP": 34, "box AP": 12, "boundary AP": pytest.approx(100)}
    assert run.result() == expected
    np.testing.assert_array_equal(
        compare.found_labels(run, record) > 0, compare.labels_of(record) > 0
    )
    doubtful = run_of("instances", "deconv")
    write_detections(doubtful, {"score": 0.4})
    assert not compare.found_labels(doubtful, record).any()


def test_busiest_window_has_the_most_borders(tmp_path):
    records = []
    for i, squares in enumerate([[(4, 4)], [(70, 70), (80, 80), (20, 100)], []]):
        labels = np.zeros((SIZE, SIZE), np.uint8)
        for x, y in squares:
            labels[y : y + 20, x : x + 20] += 1
        path = str(tmp_path / f"{i}.png")
        cv2.imwrite(path, labels)
        records.append({"file_name": path, "sem_seg_file_name": path})
    record, (rows, columns) = compare.busiest_window(records)
    assert record is records[1]
    assert rows.start <= 70 and 100 <= rows.stop == rows.start + compare.WINDOW
    assert columns.start <= 70 and 100 <= columns.stop == columns.start + compare.WINDOW
    picture = compare.outlined(record, compare.labels_of(record), (rows, columns))
    side = compare.WINDOW * compare.MAGNIFICATION
    assert picture.shape == (side, side, 3)
    x, y = ((70 - window.start) * compare.MAGNIFICATION for window in (columns, rows))
    assert picture[y + 20, x].tolist() == [255, 160, 0]  # on the left border of the first square
    assert picture[y + 20, x + 20].tolist() != [255, 160, 0]


@pytest.mark.parametrize(
    ("code", "reason"),
    [("sys.exit('error: MODEL.X = 5')", "MODEL.X = 5"), ("os.abort()", "ended by signal 6")],
)
def test_failing_run_is_named(run_of, capsys, monkeypatch, code, reason):
    run = run_of("semantic", "carafe")
    monkeypatch.setattr(compare, "ROOT", run.folder)
    run.folder.mkdir(parents=True)
    (run.folder / "train_net.py").write_text(f"import os, sys\n{code}\n")
    (failure,) = compare.run_all([run], 1, None).values()
    name = "semantic, carafe, learning rate 0.002, seed 1"
    assert failure == f"{name}: failed: {reason} (log: {run.log})"
    assert failure in capsys.readouterr().out
    assert run.result() is None


@pytest.mark.parametrize("diverging", [(0.003,), (0.0003, 0.001, 0.003)])
def test_learning_rate_that_diverges_is_not_chosen(data, tmp_path, monkeypatch, diverging):
    def finished(runs, jobs, threads):
        failures = {run: f"{run}: failed" for run in runs if run.rate in diverging}
        for run in runs:
            if run not in failures:
                run.folder.mkdir(parents=True)
                content = json.dumps(result(100 * run.rate, 1, 1))
                (run.folder / "result.json").write_text(content)
        return failures

    monkeypatch.setattr(compare, "run_all", finished)
    options = ["--data", str(data), "--output", str(tmp_path), "--methods", "carafe"]
    args = compare.parse_args([*options, "--seeds", "2"])
    compare.check_args(args)
    runs, failures = compare.compare(args, INSTANCES, None)
    tested = [(run.rate, run.seed) for run in runs["carafe"] if run.seed]
    if len(diverging) == 1:
        assert failures == [] and tested == [(0.001, 1), (0.001, 2)]
    else:
        assert len(failures) == 3 and tested == []


# --- the program --------------------------------------------------------------------------------


@pytest.fixture
def main(data, tmp_path, monkeypatch):
    """The program with trainings that do nothing; what comes out depends on rate and seed."""

    def finish(run, returncode):
        better = run.rate == run.study.rates[run.method == "carafe"]
        result = dict.fromkeys(run.study.metrics, 50 + 10 * better + run.seed)
        write_file(run.folder / "result.json", json.dumps(result))
        trained.append(str(run))
        return result

    trained = []
    monkeypatch.setattr(compare, "finish", finish)
    monkeypatch.setattr(compare.signal, "signal", lambda *_: None)
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    (tmp_path / "train_net.py").touch()
    monkeypatch.setattr(compare, "cost", lambda run: {"parameters": 10**6, "flops": 10**9})
    monkeypatch.setattr(compare, "illustrate", lambda *_: ["a table of kernels"])
    arguments = ["--studies", "semantic", "--methods", "bilinear,carafe", "--data", str(data)]

    def main(*more):
        trained.clear()
        compare.main([*arguments, "--output", str(tmp_path / "out"), *more])
        return list(trained)

    return main


def test_comparison_from_start_to_page_and_its_continuation(main, tmp_path, capsys):
    page = tmp_path / "page.md"
    begin = f"<!-- begin: {compare.BLOCK} -->"
    assert begin in (ROOT / "docs" / "compare.md").read_text()
    page.write_text(f"# Before\n{begin}\nold\n<!-- end -->\n# After\n")
    trained = main("--seeds", "2", "--markdown", str(page))
    output = capsys.readouterr().out
    # The learning rate of each is the best one of the tuning; then come the seeds, one by one.
    study = compare.STUDIES["semantic"]
    assert len(trained) == 2 * len(study.rates) + 4
    chosen = [f"learning rate {rate:g}" for rate in study.rates[:2]]
    assert trained[-4:] == [
        f"semantic, {method}, {rate}, seed {seed}"
        for seed in (1, 2)
        for method, rate in zip(("bilinear", "carafe"), chosen, strict=True)
    ]
    report = json.loads((tmp_path / "out" / "results.json").read_text())["studies"]["semantic"]
    assert [entry["rate"] for entry in report.values()] == [*study.rates[:2]]
    assert [result["mIoU"] for result in report["carafe"]["seeds"].values()] == [61, 62]
    for seed, test in ((0, "tune"), (1, "test")):
        folder = f"carafe_rate{study.rates[1]:g}_seed{seed}"
        command = (tmp_path / "out" / "semantic" / folder / "command.txt").read_text()
        for words in ("SEM_SEG_HEAD.UPSAMPLE carafe", f"real_semantic_{test}", f"SEED {seed}"):
            assert words in command
    assert compare.table(study, report) in output
    text = page.read_text()
    assert text.startswith("# Before\n") and text.endswith("# After\n") and "old" not in text
    assert compare.table(study, report, markdown=True) in text and "a table of kernels" in text
    assert (tmp_path / "images" / "compare.png").is_file()

    # Finished runs are kept; with other settings their folders are refused.
    assert main("--seeds", "2") == []
    assert len(main("--seeds", "3")) == 2
    with pytest.raises(SystemExit, match=r"^error: .*_seed0 holds a run with other"):
        main("--iterations", "3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--studies", "panoptic"], r"--studies must be of instances, .*, got 'panoptic'"),
        (["--methods", "nearest,bicubic"], r"--methods must be of nearest, .*, got 'bicubic'"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--iterations", "-3"], "--iterations must be at least 1, got -3"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--markdown", "absent.md"], r"cannot read absent\.md"),
        (["--data", "absent"], r"absent holds no data; get them by `python dev/real_images\.py`"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_mistakes_get_one_clear_line(monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        compare.main(["--output", str(tmp_path), *arguments])
    assert list(tmp_path.iterdir()) == []
