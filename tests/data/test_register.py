import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from carafe_d2.data import register_shapes
from carafe_d2.data.register import dataset_name, register_datasets
from carafe_d2.errors import UserError


@pytest.fixture
def dataset(tmp_path):
    """A COCO file with the categories 7 and 3, and its folder of images."""
    (tmp_path / "images").mkdir()
    categories = [
        {"id": 7, "name": "cell", "keypoints": ["left_end", "right_end", "middle"]},
        {"id": 3, "name": "debris"},
    ]
    content = {"images": [], "annotations": [], "categories": categories}
    (tmp_path / "a.json").write_text(json.dumps(content))
    return f"{tmp_path}/a.json:{tmp_path}/images"


@pytest.fixture
def name():
    name = "registered_in_a_test"
    yield name
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
    MetadataCatalog.pop(name, None)


def test_metadata_are_there_before_anything_is_loaded(dataset, name):
    assert register_datasets([f"{name}={dataset}"]) == [name]
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["debris", "cell"]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 7: 1}
    assert metadata.keypoint_names == ["left_end", "right_end", "middle"]
    assert metadata.keypoint_flip_map == [("left_end", "right_end")]
    assert DatasetCatalog.get(name) == []
    assert dataset_name(f"{name}={dataset}") == name  # once more is no mistake
    assert dataset_name(name) == name


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("{name}", "expected NAME=ANNOTATIONS.json:IMAGES/"),
        ("={dataset}", "expected NAME=ANNOTATIONS.json:IMAGES/"),
        ("{name}=missing.json:.", "cannot read missing.json: No such file or directory"),
        ("{name}=pyproject.toml:.", "pyproject.toml is no COCO annotation file"),
        ("{name}={dataset}/missing", "is no folder of images"),
        ("coco_2017_val={dataset}", "another dataset of this name is registered"),
    ],
)
def test_wrong_descriptions_are_named(description, message, dataset, name):
    with pytest.raises(UserError, match=message):
        register_datasets([description.format(name=name, dataset=dataset)])


@pytest.fixture
def label_images(tmp_path):
    """Two images of different formats, one of them in a subfolder, and their labels."""
    for folder in ("photos/below", "labels/below"):
        (tmp_path / folder).mkdir(parents=True)
    for image in ("photos/a.png", "photos/below/b.jpg", "labels/a.png", "labels/below/b.png"):
        Image.new("L", (4, 4)).save(tmp_path / image)
    (tmp_path / "labels/classes.txt").write_text("ground\ncell\n")
    return tmp_path


def test_labels_are_found_by_the_names_of_the_images(label_images, name):
    description = f"{name}={label_images}/labels:{label_images}/photos"
    assert register_datasets([description, description]) == [name, name]
    metadata = MetadataCatalog.get(name)
    assert metadata.stuff_classes == ["ground", "cell"]
    assert metadata.evaluator_type == "sem_seg"
    pairs = [(r["file_name"], r["sem_seg_file_name"]) for r in DatasetCatalog.get(name)]
    assert pairs == [
        (f"{label_images}/photos/a.png", f"{label_images}/labels/a.png"),
        (f"{label_images}/photos/below/b.jpg", f"{label_images}/labels/below/b.png"),
    ]
    with pytest.raises(UserError, match="another dataset of this name"):
        register_datasets([f"{name}={label_images}/labels:{label_images}/photos/below"])


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("labels/classes.txt", "labels/classes.txt, which names the classes, one a line"),
        ("labels/below/b.png", "labels of 1 of 2 images are missing, such as .*below/b.png"),
    ],
)
def test_missing_labels_are_named(missing, message, label_images, name):
    (label_images / missing).unlink()
    with pytest.raises(UserError, match=message):
        register_datasets([f"{name}={label_images}/labels:{label_images}/photos"])
        DatasetCatalog.get(name)


def test_users_dataset_goes_before_the_built_in_one_of_its_name(dataset):
    try:
        register_datasets([f"shapes_train={dataset}"])
        assert MetadataCatalog.get("shapes_train").thing_classes == ["debris", "cell"]
        register_shapes()
        assert MetadataCatalog.get("shapes_train").thing_classes == ["debris", "cell"]
        assert DatasetCatalog.get("shapes_train") == []
    finally:
        DatasetCatalog.remove("shapes_train")
        MetadataCatalog.remove("shapes_train")
        register_shapes()
