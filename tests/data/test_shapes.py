"""The `shapes` dataset: content, COCO validity, interruption, errors, use through Detectron2."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from carafe_d2.data import register_shapes, shapes
from carafe_d2.data.builtin import CATEGORIES
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


def annotations_path(root, split="train"):
    return root / "shapes" / "annotations" / f"instances_{split}.json"


def journal_path(root):
    return annotations_path(root).with_suffix(".partial.jsonl")


def interrupt_at(monkeypatch, index):
    """Makes generation stop as Ctrl-C does, when it comes to an image."""

    def interrupted_render(spec, i):
        if i == index:
            raise KeyboardInterrupt
        return render(spec, i)

    monkeypatch.setattr(shapes, "render", interrupted_render)


class TestContent:
    def test_same_seed_gives_the_same_bytes(self, dataset, tmp_path):
        main(["--train", "60", "--val", "20", "--size", "64", "--root", str(tmp_path)])
        assert contents(tmp_path) == contents(dataset)

    def test_seeds_splits_and_indices_differ(self):
        specs = [SPEC, ShapesSpec("val", 60, 64), ShapesSpec("train", 60, 64, seed=1)]
        images = [render(spec, index)[0] for spec in specs for index in (0, 1)]
        assert len({image.tobytes() for image in images}) == len(images)

    def test_image_does_not_depend_on_the_number_of_images(self):
        fewer = ShapesSpec("train", images=5, size=64)
        assert np.array_equal(render(SPEC, 3)[0], render(fewer, 3)[0])

    @pytest.mark.parametrize("size", [32, 128])
    def test_objects_are_visible_and_do_not_overlap(self, size):
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

    def test_covered_shapes_lose_pixels_to_the_one_in_front(self):
        """Somewhere a disc, convex by itself, is annotated with a bite or a hole."""
        discs = (
            mask
            for index in range(SPEC.images)
            for category, mask in render(SPEC, index)[1]
            if category == "disc"
        )
        solidity = []
        for mask in discs:
            hull = cv2.convexHull(cv2.findNonZero(mask.astype(np.uint8)))
            solidity.append(mask.sum() / max(cv2.contourArea(hull), 1))
        assert min(solidity) < 0.9

    def test_rings_have_holes(self):
        rings = [m for i in range(60) for c, m in render(SPEC, i)[1] if c == "ring"]
        assert any(isinstance(mask_to_coco(mask), dict) for mask in rings)


class TestCoco:
    def test_annotations_match_the_drawn_masks(self, dataset):
        coco = COCO(str(annotations_path(dataset)))
        kinds = set()
        for index in range(SPEC.images):
            _, objects = render(SPEC, index)
            annotations = coco.imgToAnns[index + 1]
            assert len(annotations) == len(objects)
            for annotation, (category, mask) in zip(annotations, objects, strict=True):
                kinds.add(type(annotation["segmentation"]))
                assert coco.cats[annotation["category_id"]]["name"] == category
                assert np.array_equal(coco.annToMask(annotation), mask)
                rle = coco.annToRLE(annotation)
                assert annotation["area"] == mask_util.area(rle) == mask.sum()
                assert annotation["bbox"] == mask_util.toBbox(rle).tolist()
                assert annotation["iscrowd"] == 0
        assert kinds == {list, dict}

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_ids_files_and_info(self, dataset, split):
        coco = json.loads(annotations_path(dataset, split).read_text())
        images, annotations = coco["images"], coco["annotations"]
        assert [i["id"] for i in images] == list(range(1, len(images) + 1))
        assert [a["id"] for a in annotations] == list(range(1, len(annotations) + 1))
        assert [c["id"] for c in coco["categories"]] == list(range(1, len(CATEGORIES) + 1))
        assert {a["category_id"] for a in annotations} == {c["id"] for c in coco["categories"]}
        for image in images:
            pixels = cv2.imread(str(dataset / "shapes" / split / image["file_name"]))
            assert pixels.shape == (image["height"], image["width"], 3)
        assert coco["info"]["spec"] == {
            "split": split,
            "images": len(images),
            "size": 64,
            "seed": 0,
            "max_objects": 4,
            "version": shapes.VERSION,
        }

    @pytest.mark.parametrize("density", [0.02, 0.5, 0.9])
    def test_any_mask_is_described_exactly(self, density):
        """Single pixels, diagonal contacts, the image border: polygons lose nothing."""
        rng = np.random.default_rng(0)
        for _ in range(50):
            mask = rng.random((9, 13)) < density
            mask[4, 6] = True
            annotation = {"image_id": 1, "segmentation": mask_to_coco(mask)}
            coco = COCO()
            coco.imgs = {1: {"height": 9, "width": 13}}
            assert np.array_equal(coco.annToMask(annotation), mask)


class TestRepeating:
    def test_complete_split_is_left_alone(self, dataset, capsys):
        before = annotations_path(dataset).stat().st_mtime_ns
        assert generate_split(dataset, SPEC) is False
        assert "complete already" in capsys.readouterr().out
        assert annotations_path(dataset).stat().st_mtime_ns == before

    def test_other_spec_replaces_images_and_annotations(self, tmp_path, capsys):
        generate_split(tmp_path, ShapesSpec("train", images=8, size=32))
        assert generate_split(tmp_path, ShapesSpec("train", images=5, size=48)) is True
        assert "not what is asked for" in capsys.readouterr().out
        assert len(json.loads(annotations_path(tmp_path).read_text())["images"]) == 5
        files = sorted((tmp_path / "shapes" / "train").iterdir())
        assert [f.name for f in files] == [f"{i:06d}.png" for i in range(5)]
        assert cv2.imread(str(files[0])).shape == (48, 48, 3)

    def test_missing_image_is_made_again(self, dataset, tmp_path):
        shutil.copytree(dataset, tmp_path, dirs_exist_ok=True)
        (tmp_path / "shapes" / "train" / "000007.png").unlink()
        assert generate_split(tmp_path, SPEC) is True
        assert contents(tmp_path) == contents(dataset)

    def test_stopped_change_of_spec_leaves_no_annotations(self, tmp_path, monkeypatch):
        """The images of one spec are never found beside the annotations of another."""
        generate_split(tmp_path, ShapesSpec("train", images=4, size=32))
        interrupt_at(monkeypatch, 2)
        with pytest.raises(KeyboardInterrupt):
            generate_split(tmp_path, ShapesSpec("train", images=4, size=32, seed=1))
        assert not annotations_path(tmp_path).exists()


class TestInterruption:
    @pytest.mark.parametrize("tail", [b"", b'{"image":{"id":21,"fi', b"\0" * 40])
    def test_next_runs_continue(self, dataset, tmp_path, monkeypatch, tail):
        """`tail` is what a kill in the middle of a write leaves at the journal's end."""
        with monkeypatch.context() as patch:
            interrupt_at(patch, 20)
            with pytest.raises(KeyboardInterrupt):
                generate_split(tmp_path, SPEC)
        assert not annotations_path(tmp_path).exists()
        with journal_path(tmp_path).open("ab") as journal:
            journal.write(tail)
        with monkeypatch.context() as patch:
            interrupt_at(patch, 30)
            with pytest.raises(KeyboardInterrupt):
                generate_split(tmp_path, SPEC)

        drawn = []
        monkeypatch.setattr(shapes, "render", lambda s, i: drawn.append(i) or render(s, i))
        generate_split(tmp_path, SPEC)
        assert drawn == list(range(30, 60))
        assert annotations_path(tmp_path).read_bytes() == annotations_path(dataset).read_bytes()
        assert contents(tmp_path / "shapes/train") == contents(dataset / "shapes/train")
        assert not journal_path(tmp_path).exists()

    def test_journal_of_another_spec_is_not_continued(self, dataset, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            interrupt_at(patch, 20)
            with pytest.raises(KeyboardInterrupt):
                generate_split(tmp_path, ShapesSpec("train", images=60, size=64, seed=1))
        generate_split(tmp_path, SPEC)
        assert contents(tmp_path / "shapes/train") == contents(dataset / "shapes/train")

    def test_killed_then_interrupted_process(self, tmp_path):
        """SIGKILL, then Ctrl-C, then a full run: the same bytes as from a run in one go."""
        options = ["--train", "600", "--val", "2", "--size", "32", "--root"]
        stopped, reference = tmp_path / "stopped", tmp_path / "reference"
        command = [sys.executable, "-m", "carafe_d2.data.shapes", *options, str(stopped)]
        package_parent = Path(shapes.__file__).parents[2]
        done = 0
        for sent, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
            process = subprocess.Popen(
                command,
                cwd=package_parent,
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                # A job that a shell put into the background ignores it, and so would the process.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
            while self.finished_images(stopped) < done + 20:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.005)
            process.send_signal(sent)
            stderr = process.communicate(timeout=60)[1].decode()
            assert process.returncode == code, stderr
            done = self.finished_images(stopped)
        assert stderr.splitlines()[-1] == "interrupted: run the same command to continue"
        assert "Traceback" not in stderr
        assert not annotations_path(stopped).exists()

        main([*options, str(stopped)])
        main([*options, str(reference)])
        assert contents(stopped) == contents(reference)

    @staticmethod
    def finished_images(root):
        try:
            return journal_path(root).read_bytes().count(b"\n") - 1
        except FileNotFoundError:
            return 0


class TestErrors:
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
    def test_bad_number(self, tmp_path, option, value, message):
        with pytest.raises(UserError, match=message):
            main(["--root", str(tmp_path), option, value])
        assert not list(tmp_path.iterdir())

    def test_root_that_cannot_be_written(self, tmp_path):
        root = tmp_path / "file"
        root.touch()
        with pytest.raises(UserError, match=f"cannot generate shapes: {root}.*Not a directory"):
            generate_split(root, SPEC)

    def test_no_space_left_is_continued_later(self, dataset, tmp_path, monkeypatch):
        def full_disk(source, target):
            raise OSError(28, os.strerror(28), str(target))

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full_disk)
            with pytest.raises(UserError, match=r"000000\.png: No space left on device"):
                generate_split(tmp_path, SPEC)
        generate_split(tmp_path, SPEC)
        assert contents(tmp_path / "shapes/train") == contents(dataset / "shapes/train")

    def test_two_processes_at_once(self, tmp_path):
        spec = ShapesSpec("train", images=2, size=32)
        annotations_path(tmp_path).parent.mkdir(parents=True)
        with (
            shapes._open_journal(tmp_path, spec),
            pytest.raises(UserError, match="another process is generating"),
        ):
            generate_split(tmp_path, spec)


class TestDetectron2:
    @pytest.fixture(autouse=True)
    def restore_registration(self):
        pytest.importorskip("detectron2")
        yield
        register_shapes()

    def test_dataset_loads_with_its_masks(self, dataset):
        from detectron2.data import DatasetCatalog, MetadataCatalog
        from detectron2.data.detection_utils import annotations_to_instances, read_image

        register_shapes(dataset)
        metadata = MetadataCatalog.get("shapes_train")
        assert metadata.thing_classes == list(CATEGORIES)
        assert metadata.evaluator_type == "coco"
        records = DatasetCatalog.get("shapes_train")
        assert len(records) == SPEC.images
        assert len(DatasetCatalog.get("shapes_val")) == 20
        for index, record in enumerate(records):
            image, objects = render(SPEC, index)
            assert np.array_equal(read_image(record["file_name"], format="BGR"), image)
            instances = annotations_to_instances(
                record["annotations"], image.shape[:2], mask_format="bitmask"
            )
            masks = np.array([mask for _, mask in objects])
            assert np.array_equal(instances.gt_masks.tensor.numpy(), masks)
            assert [CATEGORIES[c] for c in instances.gt_classes] == [c for c, _ in objects]

    def test_root_comes_from_the_environment(self, dataset, monkeypatch):
        from detectron2.data import DatasetCatalog

        monkeypatch.setenv("DETECTRON2_DATASETS", str(dataset))
        register_shapes()
        assert len(DatasetCatalog.get("shapes_val")) == 20

    def test_missing_dataset_says_what_to_do(self, tmp_path):
        from detectron2.data import DatasetCatalog

        register_shapes(tmp_path)
        with pytest.raises(UserError) as error:
            DatasetCatalog.get("shapes_val")
        for part in (
            str(annotations_path(tmp_path, "val")),
            "python -m carafe_d2.data.shapes",
            "DETECTRON2_DATASETS",
        ):
            assert part in str(error.value)
