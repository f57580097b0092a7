"""tools/predict.py: files in and out, COCO's formats, and predictions of small random models."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from carafe_d2 import inference, mmdet
from carafe_d2.config import load_config
from carafe_d2.data import shapes
from carafe_d2.data.build import CarafeDatasetMapper
from carafe_d2.errors import UserError
from tools import predict

CONFIG = "shapes_mask_rcnn_R18_FPN_carafe.yaml"
CPU = ["MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", "64"]
THRESHOLD = "0.3"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:pycocotools")


def save_random_model(path, config, opts=()):
    """Saves a model whose scores and mask logits differ enough for some to be high."""
    torch.manual_seed(0)
    model = build_model(load_config(config, [*CPU, *opts]))
    for name, parameter in model.named_parameters():
        if name.endswith(("cls_score.weight", "mask_head.predictor.weight")):
            torch.nn.init.normal_(parameter, std=1.0)
    torch.save({"model": model.state_dict()}, path)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds `shapes/`, weights in two formats, and the video `clip.avi` of the images."""
    folder = tmp_path_factory.mktemp("predict")
    shapes.main(["--root", str(folder), "--train", "1", "--val", "4", "--size", "64"])
    model = save_random_model(folder / "model.pth", CONFIG)
    torch.save({"state_dict": mmdet.to_mmdet(model.state_dict())}, folder / "mmdet.pth")
    # OpenCV's own encoder, for FFmpeg would cut off what is odd of the sides.
    codec = cv2.VideoWriter_fourcc(*"MJPG")
    video = cv2.VideoWriter(str(folder / "clip.avi"), cv2.CAP_OPENCV_MJPEG, codec, 5.0, (65, 63))
    for image in images_of(folder):
        video.write(cv2.resize(cv2.imread(str(image)), (65, 63)))
    video.release()
    return folder


def images_of(folder):
    return sorted((folder / "shapes" / "val").iterdir())


@pytest.fixture
def run(folder, monkeypatch, tmp_path):
    """Runs the program in `tmp_path` with outputs in `out`; returns its error, if any."""
    monkeypatch.chdir(tmp_path)
    always = ["--config-file", CONFIG, "--output", "out", "--confidence-threshold", THRESHOLD]

    def run(*options, weights=folder / "model.pth", keys=()):
        argv = [*always, *options, *CPU, "MODEL.WEIGHTS", weights, *keys]
        try:
            predict.main([str(argument) for argument in argv])
        except SystemExit as error:
            return error.code
        return None

    return run


@pytest.fixture(scope="module")
def cfg(folder):
    threshold = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", THRESHOLD]
    return load_config(CONFIG, [*CPU, *threshold, "MODEL.WEIGHTS", str(folder / "model.pth")])


def load(name):
    return json.loads(Path("out", name).read_text())


def assert_same_detections(found, expected):
    """Holds results in COCO's format to instances; the ids of `shapes` begin with 1."""
    assert [r["category_id"] for r in found] == (expected.pred_classes + 1).tolist()
    scores = torch.tensor([r["score"] for r in found])
    torch.testing.assert_close(scores, expected.scores, rtol=1e-4, atol=1e-5)
    corners = torch.tensor([r["bbox"] for r in found])
    corners[:, 2:] += corners[:, :2]
    torch.testing.assert_close(corners, expected.pred_boxes.tensor, rtol=1e-4, atol=1e-2)
    masks = np.stack([mask_util.decode(r["segmentation"]) for r in found])
    assert masks.any(axis=(1, 2)).sum() >= 3
    assert (masks == expected.pred_masks.numpy()).mean() > 0.999


# --- images -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "batch_size"), [("model.pth", 1), ("mmdet.pth", 3)])
def test_json_and_pictures_hold_what_the_model_finds_in_an_evaluation(
    run, folder, cfg, weights, batch_size
):
    images = images_of(folder)
    options = ["--json", "--width", "200", "--batch-size", batch_size, "--input", images[0].parent]
    assert run(*options, weights=folder / weights) is None

    detector = build_model(cfg).eval()
    detector.load_state_dict(torch.load(folder / "model.pth", weights_only=True)["model"])
    mapper = CarafeDatasetMapper(cfg, is_train=False)
    results = load("coco_instances_results.json")
    for image in images:
        with torch.no_grad():
            (expected,) = detector([mapper({"file_name": str(image)})])
        found = [r for r in results if r["image_id"] == int(image.stem)]
        assert_same_detections(found, expected["instances"])

        drawn = inference.read_image(f"out/{image.name}")
        assert drawn.shape == (200, 200, 3)
        plain = cv2.resize(inference.read_image(image), (200, 200))
        assert np.abs(drawn.astype(int) - plain).max() > 100


def test_pycocotools_reads_the_json(run, folder):
    annotations = folder / "shapes" / "annotations" / "instances_val.json"
    inputs = [*images_of(folder)[1:3], folder / "clip.avi"]
    assert run("--json", "--no-images", "--annotations", annotations, "--input", *inputs) is None
    names = {"coco_instances_results.json", "coco_images.json", "clip.avi.json"}
    assert {f.name for f in Path("out").iterdir()} == names
    ground_truth = COCO(str(annotations))
    for coco in (ground_truth, COCO("out/coco_images.json")):
        found = coco.loadRes("out/coco_instances_results.json")
        assert {a["image_id"] for a in found.anns.values()} == {2, 3}
    described = load("coco_images.json")
    assert described["images"] == ground_truth.loadImgs([2, 3])
    names = {c["id"]: c["name"] for c in ground_truth.dataset["categories"]}
    assert {c["id"]: c["name"] for c in described["categories"]} == names


def test_unreadable_files_are_named_and_the_others_predicted(run, folder, capsys):
    good = images_of(folder)[0]
    Path("no.jpg").write_text("no image")
    Path("cut.png").write_bytes(good.read_bytes()[:400])
    Path("broken.mp4").write_text("no video")
    inputs = ["no.jpg", "broken.mp4", "cut.png", good, folder / "clip.avi"]
    error = run("--json", "--batch-size", "2", "--input", *inputs)
    assert error == "error: skipped 3 of 5 files, for the reasons above"
    output = capsys.readouterr()
    assert "skipped: cannot read image no.jpg: it is in no format" in output.err
    assert "skipped: cannot read image cut.png: " in output.err
    assert "skipped: cannot read video broken.mp4: " in output.err
    assert "2 of 5 files predicted" in output.out
    written = {"coco_instances_results.json", "coco_images.json", "clip.avi.json"}
    assert {f.name for f in Path("out").iterdir()} == {*written, good.name, "clip.avi.mp4"}
    assert load("coco_instances_results.json")
    (image,) = load("coco_images.json")["images"]
    assert image == {"id": 3, "file_name": good.name, "height": 64, "width": 64}


def test_gray_and_transparent_images_are_read_as_rgb(tmp_path):
    Image.new("L", (8, 6), 77).save(tmp_path / "gray.png")
    Image.new("RGBA", (8, 6), (1, 2, 3, 100)).save(tmp_path / "clear.png")
    assert (inference.read_image(tmp_path / "gray.png") == np.full((6, 8, 3), 77)).all()
    assert inference.read_image(tmp_path / "clear.png")[0, 0].tolist() == [1, 2, 3]


# --- models -------------------------------------------------------------------------------------

GRAY = ["MODEL.PIXEL_MEAN", "[128.0]", "MODEL.PIXEL_STD", "[50.0]"]


@pytest.mark.parametrize(
    ("order", "opts", "expected"),
    [
        ("RGB", [], lambda image: image),
        ("BGR", [], lambda image: image[:, :, ::-1]),
        ("L", GRAY, lambda image: np.array(Image.fromarray(image).convert("L"))[:, :, None]),
    ],
)
def test_models_get_the_format_of_their_config(folder, tmp_path, order, opts, expected):
    opts = ["INPUT.FORMAT", order, *opts]
    save_random_model(tmp_path / "model.pth", CONFIG, opts)
    cfg = load_config(CONFIG, [*CPU, *opts, "MODEL.WEIGHTS", str(tmp_path / "model.pth")])
    predictor = inference.Predictor(cfg)
    seen = []
    predictor.model.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0][0]["image"].permute(1, 2, 0).numpy())
    )
    image = inference.read_image(images_of(folder)[0])
    predictor([image])
    np.testing.assert_array_equal(seen[0], expected(image))


def test_boxes_of_retinanet_have_coco_ids(run, folder, tmp_path):
    config = "retinanet_R50_FPN_carafe_1x.yaml"
    small = ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
    small += ["MODEL.FPN.OUT_CHANNELS", "16"]
    weights = tmp_path / "retinanet.pth"
    save_random_model(weights, config, [*small, "MODEL.WEIGHTS", ""])
    image = images_of(folder)[0]
    options = ["--config-file", config, "--json", "--confidence-threshold", "0.001"]
    assert run(*options, "--input", image, weights=weights, keys=small) is None
    results = load("coco_instances_results.json")
    assert results
    ids = MetadataCatalog.get("coco_2017_val").thing_dataset_id_to_contiguous_id
    assert {r["category_id"] for r in results} <= ids.keys()
    assert all("segmentation" not in r for r in results)
    assert Path("out", image.name).is_file()


def test_json_has_the_category_ids_of_a_registered_dataset_or_is_refused(run, folder, tmp_path):
    """The classes of shapes by other ids, in another order than Detectron2 numbers them."""
    content = json.loads((folder / "shapes/annotations/instances_val.json").read_text())
    for category in content["categories"]:
        category["id"] = 70 - category["id"]
    Path("own.json").write_text(json.dumps({**content, "annotations": []}))
    inputs = ["--json", "--no-images", "--input", folder / "shapes" / "val"]
    error = run(*inputs, keys=["DATASETS.TEST", "('unknown',)"])
    assert "--json needs the category ids of the model's dataset" in error
    own = f"('predicted_own={tmp_path}/own.json:{folder}/shapes/val',)"
    keys = ["DATASETS.REGISTER", own, "DATASETS.TEST", "('predicted_own',)"]
    assert run(*inputs, keys=keys) is None
    results = load("coco_instances_results.json")
    assert {result["category_id"] for result in results} <= set(range(64, 70))


# --- videos -------------------------------------------------------------------------------------


def frames(path):
    video = cv2.VideoCapture(str(path))
    found = []
    while (frame := video.read()[1]) is not None:
        found.append(frame)
    return found, video.get(cv2.CAP_PROP_FPS)


def test_video_becomes_a_video_with_the_predictions_of_its_frames(run, folder, cfg):
    assert run("--json", "--batch-size", "3", "--input", folder / "clip.avi") is None
    original, _ = frames(folder / "clip.avi")
    drawn, frames_per_second = frames("out/clip.avi.mp4")
    assert len(drawn) == len(original) == 4
    assert original[0].shape == (63, 65, 3)
    assert drawn[0].shape == (64, 66, 3)  # MP4 has even sides
    assert frames_per_second == 5
    assert np.abs(drawn[0][:63, :65].astype(int) - original[0]).max() > 100
    assert drawn[0][-1].max() > 30  # more of the picture, not black

    results = load("clip.avi.json")
    predictor = inference.Predictor(cfg)
    for number, frame in enumerate(original):
        (expected,) = predictor([frame[:, :, ::-1]])
        assert_same_detections([r for r in results if r["image_id"] == number], expected)
    assert not Path("out/coco_instances_results.json").exists()


def test_camera_is_shown_until_escape(run, folder, monkeypatch):
    shown = []
    capture = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda camera: capture(str(folder / "clip.avi")))
    monkeypatch.setattr(cv2, "imshow", lambda title, image: shown.append(image.shape))
    monkeypatch.setattr(cv2, "waitKey", lambda wait: 27 if len(shown) == 2 else -1)
    assert run("--webcam") is None
    assert shown == [(63, 65, 3)] * 2

    def no_windows(*_):
        raise cv2.error("The function is not implemented")

    monkeypatch.setattr(cv2, "imshow", no_windows)
    assert "--webcam needs windows: pip install opencv-python" in run("--webcam")


# --- files --------------------------------------------------------------------------------------


def test_inputs_are_files_folders_and_patterns_each_once(tmp_path):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    for name in ("a/2.png", "a/1.JPG", "a/notes.txt", "a/deep/3.png", "b/clip.mp4", "b/x[1].png"):
        (tmp_path / name).touch()
    values = ["b/x[1].png", "a", "b/*.mp4", "a/1.JPG", "a/**/3.png"]
    found = predict.find_inputs(f"{tmp_path}/{value}" for value in values)
    names = [str(file.relative_to(tmp_path)) for file in found]
    assert names == ["b/x[1].png", "a/1.JPG", "a/2.png", "b/clip.mp4", "a/deep/3.png"]


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        (["in/a/1.png", "in/2.JPG"], ["out/1.png", "out/2.JPG"]),
        (["in/a/1.png", "in/b/1.png"], ["out/a/1.png", "out/b/1.png"]),
        (["1.tif", "c.mp4", "c.avi"], ["out/1.tif.png", "out/c.mp4", "out/c.avi.mp4"]),
    ],
)
def test_outputs_keep_names_and_where_they_clash_folders(inputs, outputs):
    found = predict.output_files([Path(file) for file in inputs], Path("out"))
    assert found == {Path(i): Path(o) for i, o in zip(inputs, outputs, strict=True)}


ANNOTATED = {("val", "7.jpg"): 40, ("7.jpg",): 41}


@pytest.mark.parametrize(
    ("files", "annotated", "ids"),
    [
        (["x/000000000139.jpg", "x/7.jpg"], None, [139, 7]),
        (["a/1.jpg", "b/01.jpg"], None, [1, 2]),
        (["x/7.jpg", "x/cat.jpg"], None, [1, 2]),
        (["data/val/7.jpg", "data/train/7.jpg"], ANNOTATED, [40, 41]),
    ],
)
def test_image_ids_are_annotated_ones_or_numbers_in_the_names_or_counted(files, annotated, ids):
    assert list(predict.image_ids([Path(file) for file in files], annotated).values()) == ids


def test_images_have_to_be_annotated():
    with pytest.raises(UserError, match=r"no image of the name 8\.jpg"):
        predict.image_ids([Path("8.jpg")], ANNOTATED)


def test_config_keys_after_inputs_are_no_inputs():
    values = ["a.jpg", "MODEL.jpg", "MODEL.WEIGHTS", "m.pth"]
    assert inference.split_opts(values, ["SEED", "1"]) == (["a.jpg"], [*values[1:], "SEED", "1"])
    assert inference.split_opts(["IMG.JPG"], ["SEED", "1"]) == (["IMG.JPG"], ["SEED", "1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "absent.jpg"], r"--input: absent\.jpg names no file"),
        (["--input", "empty"], "--input: empty holds no image or video"),
        (["--input", "*.gif"], r"--input: \*\.gif names no file"),
        (["--webcam"], "name files by --input, or a camera by --webcam"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--width", "0"], "--width must be at least 1, got 0"),
        (["--confidence-threshold", "50"], r"--confidence-threshold .* from 0 to 1, got 50\.0"),
        (["--no-images"], "--no-images leaves nothing to write; add --json"),
        (["--annotations", "absent.json"], r"cannot read --annotations absent\.json: No such file"),
        (["--annotations", "image.png"], r"--annotations image\.png is no COCO annotation file"),
        (["--output", "image.png"], r"--output image\.png: File exists"),
        (["--output", "."], r"--output \. would overwrite image\.png; name another folder"),
        (["--config-file", "absent.yaml"], r"config file 'absent\.yaml' does not exist"),
        (["MODEL.NONSENSE", "1"], r".*Non-existent (config )?key: MODEL\.NONSENSE"),
        (["MODEL.WEIGHTS", ""], "MODEL.WEIGHTS is empty"),
        (["MODEL.WEIGHTS", "absent.pth"], r"weights absent\.pth do not exist"),
        (["MODEL.BACKBONE.NAME", "build_swin"], r"MODEL.BACKBONE.NAME = .build_swin."),
        (
            ["MODEL.RESNETS.DEPTH", "34"],
            "the weights are not those of the model: the file lacks back",
        ),
        (["INPUT.FORMAT", "HSV"], "INPUT.FORMAT must be RGB, BGR or L, got 'HSV'"),
        (["MODEL.CARAFE.ENCODER_DILATION", "0"], "MODEL.CARAFE.ENCODER_DILATION must be positive"),
        (["INPUT.MIN_SIZE_TEST", "-5"], "INPUT.MIN_SIZE_TEST = -5: .* with 128 it works"),
        (["DATASETS.TEST", "('coco_2017_val',)"], r".*6 classes apart and 'coco_2017_val' has 80"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_mistakes_get_one_clear_line(run, arguments, message):
    Path("empty").mkdir()
    Image.new("RGB", (64, 64)).save("image.png")
    options, keys = (arguments, []) if arguments[0].startswith("--") else ([], arguments)
    error = run("--input", "image.png", *options, keys=keys)
    assert re.match(f"error: {message}", error)
    assert "\n" not in error
    assert not list(Path().glob("out/*"))
