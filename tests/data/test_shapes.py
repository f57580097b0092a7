"""The `shapes` dataset: content, COCO validity, interruption, errors, use through Detectron2."""

import dataclasses
import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from carafe_d2.data import register_shapes, shapes
from carafe_d2.data.builtin import CATEGORIES, LABELS, annotation_file, image_dir, label_dir
from carafe_d2.data.shapes import ShapesSpec, generate_split, main, mask_to_coco, render
from carafe_d2.errors import UserError

SPEC = ShapesSpec("train", images=60, size=64)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A datasets root with SPEC's 60 training images and 20 validation images."""
    root = tmp_path_factory.mktemp("datasets")
    main(["--train", "60", "--val", "20", "--size", "64", "--root", str(root)])
    return root


def contents(root):
    """Returns the bytes of all files below a folder, by relative path."""
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_same_seed_gives_the_same_bytes(dataset, tmp_path):
    main(["--train", "60", "--val", "20", "--size", "64", "--root", str(tmp_path)])
    assert contents(tmp_path) == contents(dataset)


def test_seeds_splits_and_indices_differ():
    specs = [SPEC, ShapesSpec("val", 60, 64), ShapesSpec("train", 60, 64, seed=1)]
    images = [render(spec, index)[0] for spec in specs for index in (0, 1)]
    assert len({image.tobytes() for image in images}) == len(images)
    fewer = ShapesSpec("train", images=5, size=64)  # on which an image does not depend
    assert np.array_equal(render(fewer, 0)[0], images[0])


@pytest.mark.parametrize("size", [32, 128])
def test_objects_are_visible_and_do_not_overlap(size):
    spec = ShapesSpec("train", images=40, size=size, max_objects=8)
    counts = []
    for index in range(spec.images):
        image, objects = render(spec, index)
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        masks = np.array([mask for _, mask in objects])
        assert masks.sum(axis=0).max() == 1
        assert masks.sum(axis=(1, 2)).min() >= shapes.MIN_VISIBLE_PIXELS
        counts.append(len(objects))
    assert min(counts) >= 1
    assert 5 < max(counts) <= 8


def test_covered_shapes_lose_pixels_to_the_one_in_front():
    """Somewhere a disc, convex by itself, is annotated with a bite or a hole."""
    solidity = []
    for category, mask in (shape for i in range(SPEC.images) for shape in render(SPEC, i)[1]):
        if category == "disc":
            hull = cv2.convexHull(cv2.findNonZero(mask.astype(np.uint8)))
            solidity.append(mask.sum() / max(cv2.contourArea(hull), 1))
    assert min(solidity) < 0.9


@pytest.mark.parametrize("split", ["train", "val"])
def test_annotation_file_is_cocos(dataset, split):
    coco = COCO(str(annotation_file(dataset, split)))
    annotations = coco.dataset["annotations"]
    for described in (coco.dataset["images"], annotations, coco.dataset["categories"]):
        assert [d["id"] for d in described] == list(range(1, len(described) + 1))
    assert {a["category_id"] for a in annotations} == set(range(1, len(CATEGORIES) + 1))
    for annotation in annotations:
        rle = coco.annToRLE(annotation)
        assert annotation["area"] == mask_util.area(rle)
        assert annotation["bbox"] == mask_util.toBbox(rle).tolist()
        assert annotation["iscrowd"] == 0
    assert {type(a["segmentation"]) for a in annotations} == {list, dict}
    for image in coco.dataset["images"]:
        pixels = cv2.imread(str(image_dir(dataset, split) / image["file_name"]))
        assert pixels.shape == (image["height"], image["width"], 3)
    spec = ShapesSpec(split, len(coco.imgs), size=64, seed=0, max_objects=4)
    assert coco.dataset["info"]["spec"] == dataclasses.asdict(spec)


@pytest.mark.parametrize("density", [0.02, 0.5, 0.9])
def test_any_mask_is_described_exactly(density):
    """Single pixels, diagonal contacts, the image border: polygons lose nothing."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = rng.random((9, 13)) < density
        mask[4, 6] = True
        annotation = {"image_id": 1, "segmentation": mask_to_coco(mask)}
        coco = COCO()
        coco.imgs = {1: {"height": 9, "width": 13}}
        assert np.array_equal(coco.annToMask(annotation), mask)


def test_complete_split_is_left_alone(dataset, capsys):
    before = annotation_file(dataset, "train").stat().st_mtime_ns
    assert generate_split(dataset, SPEC) is False
    assert "complete already" in capsys.readouterr().out
    assert annotation_file(dataset, "train").stat().st_mtime_ns == before


def test_other_spec_replaces_images_and_annotations(tmp_path, capsys):
    generate_split(tmp_path, ShapesSpec("train", images=8, size=32))
    assert generate_split(tmp_path, ShapesSpec("train", images=5, size=48)) is True
    assert "not what is asked for" in capsys.readouterr().out
    assert len(json.loads(annotation_file(tmp_path, "train").read_text())["images"]) == 5
    files = sorted(image_dir(tmp_path, "train").iterdir())
    assert [f.name for f in files] == [f"{i:06d}.png" for i in range(5)]
    assert cv2.imread(str(files[0])).shape == (48, 48, 3)


@pytest.mark.parametrize("folder", [image_dir, label_dir])
def test_missing_image_is_made_again(dataset, tmp_path, folder):
    shutil.copytree(dataset, tmp_path, dirs_exist_ok=True)
    (folder(tmp_path, "train") / "000007.png").unlink()
    assert generate_split(tmp_path, SPEC) is True
    assert contents(tmp_path) == contents(dataset)


def test_images_of_one_spec_never_lie_beside_annotations_of_another(tmp_path, monkeypatch):
    """Not even for the moment in which a split is replaced."""
    generate_split(tmp_path, ShapesSpec("train", images=4, size=32))
    monkeypatch.setattr(shapes, "write_file", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        generate_split(tmp_path, ShapesSpec("train", images=4, size=32, seed=1))
    assert not annotation_file(tmp_path, "train").exists()


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)]
)
def test_stopped_process_leaves_what_was_there(tmp_path, sent, code):
    generate_split(tmp_path, ShapesSpec("train", images=4, size=32))
    before = contents(tmp_path)
    command = [sys.executable, "-m", "carafe_d2.data.shapes", "--train", "20000"]
    process = subprocess.Popen(
        [*command, "--size", "32", "--root", str(tmp_path)],
        cwd=Path(shapes.__file__).parents[2],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        # A job that a shell put into the background ignores it, and so would the process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while len(list(tmp_path.rglob("*.png"))) < 24:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(sent)
    stderr = process.communicate(timeout=60)[1].decode()
    assert process.returncode == code, stderr
    assert contents(tmp_path).items() >= before.items()
    if sent == signal.SIGINT:
        assert stderr.splitlines()[-1].startswith("interrupted: ")
        assert "Traceback" not in stderr
        assert contents(tmp_path) == before
    assert generate_split(tmp_path, ShapesSpec("train", images=2, size=32)) is True
    assert len(list(image_dir(tmp_path, "train").iterdir())) == 2


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--train", "0", "number of train images must be at least 1, got 0"),
        ("--val", "-1", "number of val images must be at least 1, got -1"),
        ("--size", "0", "size must be at least 32, got 0"),
        ("--max-objects", "0", "max_objects must be at least 1, got 0"),
        ("--seed", "-1", "seed must be at least 0, got -1"),
    ],
)
def test_bad_number(tmp_path, option, value, message):
    with pytest.raises(UserError, match=message):
        main(["--root", str(tmp_path), option, value])
    assert not list(tmp_path.iterdir())


def test_root_that_cannot_be_written(tmp_path):
    root = tmp_path / "file"
    root.touch()
    with pytest.raises(UserError, match=f"cannot generate shapes: {root}.*Not a directory"):
        generate_split(root, SPEC)


def test_no_space_left(dataset, tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device", "000000.png")
    disk = mock.patch.object(Path, "write_bytes", side_effect=full)
    with disk, pytest.raises(UserError, match=r"000000\.png: No space left on device"):
        generate_split(tmp_path, SPEC)
    generate_split(tmp_path, SPEC)
    assert contents(image_dir(tmp_path, "train")) == contents(image_dir(dataset, "train"))


@pytest.fixture
def catalog():
    """Detectron2's datasets, among which `shapes` is registered anew afterwards."""
    yield pytest.importorskip("detectron2.data").DatasetCatalog
    register_shapes()


def test_dataset_loads_with_its_masks(catalog, dataset):
    from detectron2.data import MetadataCatalog
    from detectron2.data.detection_utils import annotations_to_instances, read_image

    register_shapes(dataset)
    metadata = MetadataCatalog.get("shapes_train")
    assert metadata.thing_classes == list(CATEGORIES)
    assert metadata.evaluator_type == "coco"
    records = catalog.get("shapes_train")
    assert len(records) == SPEC.images
    assert len(catalog.get("shapes_val")) == 20
    for index, record in enumerate(records):
        image, objects = render(SPEC, index)
        assert np.array_equal(read_image(record["file_name"], format="BGR"), image)
        instances = annotations_to_instances(
            record["annotations"], image.shape[:2], mask_format="bitmask"
        )
        masks = np.array([mask for _, mask in objects])
        assert np.array_equal(instances.gt_masks.tensor.numpy(), masks)
        assert [CATEGORIES[c] for c in instances.gt_classes] == [c for c, _ in objects]


def test_dataset_of_semantic_segmentation_has_the_masks_as_labels(catalog, dataset):
    from detectron2.data import MetadataCatalog

    register_shapes(dataset)
    metadata = MetadataCatalog.get("shapes_sem_seg_train")
    assert metadata.evaluator_type == "sem_seg"
    records = catalog.get("shapes_sem_seg_train")
    assert len(records) == SPEC.images
    assert len(catalog.get("shapes_sem_seg_val")) == 20
    for index, record in enumerate(records):
        assert Path(record["file_name"]).stem == Path(record["sem_seg_file_name"]).stem
        labels = cv2.imread(record["sem_seg_file_name"], cv2.IMREAD_UNCHANGED)
        expected = np.zeros_like(labels)
        for category, mask in render(SPEC, index)[1]:
            expected[mask] = metadata.stuff_classes.index(category)
        assert labels.dtype == np.uint8 and np.array_equal(labels, expected)
        assert LABELS[labels.max()] in CATEGORIES


def test_root_comes_from_the_environment(catalog, dataset, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(dataset))
    register_shapes()
    assert len(catalog.get("shapes_val")) == 20


@pytest.mark.parametrize(
    ("name", "file"), [("shapes_val", annotation_file), ("shapes_sem_seg_val", label_dir)]
)
def test_missing_dataset_says_what_to_do(catalog, tmp_path, name, file):
    register_shapes(tmp_path)
    with pytest.raises(UserError) as error:
        catalog.get(name)
    path = str(file(tmp_path, "val"))
    for part in (path, "python -m carafe_d2.data.shapes", "DETECTRON2_DATASETS"):
        assert part in str(error.value)
