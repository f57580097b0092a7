"""tools/predict.py: files in and out, COCO's formats, and predictions of small random models."""

import json
import shutil
import sys
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

ROOT = Path(__file__).parents[2]

CONFIG = str(ROOT / "configs" / "shapes_mask_rcnn_R18_FPN_carafe.yaml")
CPU = ["MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", "64"]
THRESHOLD = 0.3
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:pycocotools")


def save_random_model(path, config, opts=()):
    """Saves a model whose scores and mask logits differ enough for some to be high."""
    torch.manual_seed(0)
    model = build_model(load_config(config, [*CPU, *opts])).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("cls_score.weight", "mask_head.predictor.weight")):
            torch.nn.init.normal_(parameter, std=1.0)
    torch.save({"model": model.state_dict()}, path)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds `shapes/`, the weights `model.pth` and the video `clip.avi` of the images."""
    folder = tmp_path_factory.mktemp("predict")
    shapes.main(["--root", str(folder), "--train", "1", "--val", "4", "--size", "64"])
    save_random_model(folder / "model.pth", CONFIG)
    codec = cv2.VideoWriter_fourcc(*"MJPG")
    video = cv2.VideoWriter(str(folder / "clip.avi"), codec, 5.0, (64, 64))
    for image in images_of(folder):
        video.write(cv2.imread(str(image)))
    video.release()
    return folder


def images_of(folder):
    return sorted((folder / "shapes" / "val").iterdir())


@pytest.fixture
def run(folder, monkeypatch, tmp_path, capsys):
    """Runs the program with outputs in `tmp_path / "out"`; returns its error, if any."""

    def run(*arguments, weights=folder / "model.pth", config=CONFIG):
        always = ["--config-file", config, "--output", tmp_path / "out"]
        always += ["--confidence-threshold", THRESHOLD]
        opts = [*CPU, "MODEL.WEIGHTS", weights]
        monkeypatch.setattr(sys, "argv", [str(a) for a in ("predict", *always, *arguments, *opts)])
        try:
            predict.main()
        except SystemExit as error:
            return error.code
        return None

    return run


@pytest.fixture(scope="module")
def model(folder):
    threshold = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", str(THRESHOLD)]
    weights = ["MODEL.WEIGHTS", str(folder / "model.pth")]
    cfg = load_config(CONFIG, [*CPU, *threshold, *weights])
    model = build_model(cfg).eval()
    model.load_state_dict(torch.load(folder / "model.pth", weights_only=True)["model"])
    return cfg, model


def load(path):
    return json.loads(Path(path).read_text())


# --- images -------------------------------------------------------------------------------------


def test_json_and_pictures_hold_what_the_model_finds_in_an_evaluation(run, folder, model, tmp_path):
    images = images_of(folder)
    assert run("--json", "--width", "200", "--input", images[0].parent) is None

    cfg, detector = model
    mapper = CarafeDatasetMapper(cfg, is_train=False)
    results = load(tmp_path / "out" / "coco_instances_results.json")
    for image in images:
        with torch.no_grad():
            (expected,) = detector([mapper({"file_name": str(image)})])
        expected = expected["instances"]
        assert len(expected) >= 3
        found = [r for r in results if r["image_id"] == int(image.stem)]
        # The ids of `shapes` begin with 1.
        assert [r["category_id"] for r in found] == (expected.pred_classes + 1).tolist()
        torch.testing.assert_close(
            torch.tensor([r["score"] for r in found]), expected.scores, rtol=1e-4, atol=1e-5
        )
        corners = torch.tensor([r["bbox"] for r in found])
        corners[:, 2:] += corners[:, :2]
        torch.testing.assert_close(corners, expected.pred_boxes.tensor, rtol=1e-4, atol=1e-2)
        masks = np.stack([mask_util.decode(r["segmentation"]) for r in found])
        assert masks.any(axis=(1, 2)).sum() >= 3
        assert (masks == expected.pred_masks.numpy()).mean() > 0.999

        drawn = inference.read_image(tmp_path / "out" / image.name)
        assert drawn.shape == (200, 200, 3)
        plain = cv2.resize(inference.read_image(image), (200, 200))
        assert np.abs(drawn.astype(int) - plain).max() > 100


def test_pycocotools_reads_the_json(run, folder, tmp_path):
    annotations = folder / "shapes" / "annotations" / "instances_val.json"
    images = images_of(folder)[1:3]
    arguments = ["--json", "--no-images", "--annotations", annotations, "--input", *images]
    assert run(*arguments) is None
    out = tmp_path / "out"
    assert {f.name for f in out.iterdir()} == {"coco_instances_results.json", "coco_images.json"}
    ground_truth = COCO(str(annotations))
    for coco in (ground_truth, COCO(str(out / "coco_images.json"))):
        found = coco.loadRes(str(out / "coco_instances_results.json"))
        assert {a["image_id"] for a in found.anns.values()} == {2, 3}
    described = load(out / "coco_images.json")
    listed = [image for image in ground_truth.dataset["images"] if image["id"] in (2, 3)]
    assert described["images"] == listed
    names = {c["id"]: c["name"] for c in ground_truth.dataset["categories"]}
    assert {c["id"]: c["name"] for c in described["categories"]} == names


def test_batches_change_nothing_for_images_of_one_size(run, folder, tmp_path):
    images = images_of(folder)
    results = []
    for size in (1, 3):
        assert run("--json", "--no-images", "--batch-size", size, "--input", *images) is None
        results.append(load(tmp_path / "out" / "coco_instances_results.json"))
    alone, together = results
    assert len(alone) == len(together) > 0
    for one, other in zip(alone, together, strict=True):
        assert (one["image_id"], one["category_id"]) == (other["image_id"], other["category_id"])
        assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-2)


def test_unreadable_images_are_named_and_the_others_predicted(run, folder, tmp_path, capsys):
    good = images_of(folder)[0]
    no_image, cut_off = tmp_path / "no.jpg", tmp_path / "cut.png"
    no_image.write_text("no image")
    cut_off.write_bytes(good.read_bytes()[:400])
    error = run("--json", "--batch-size", "2", "--input", no_image, cut_off, good)
    assert error == "error: skipped 2 of 3 files, for the reasons above"
    output = capsys.readouterr()
    assert f"skipped: cannot read image {no_image}: it is in no format" in output.err
    assert f"skipped: cannot read image {cut_off}: " in output.err
    assert "1 of 3 files predicted" in output.out
    assert (tmp_path / "out" / good.name).is_file()
    assert load(tmp_path / "out" / "coco_instances_results.json")
    (image,) = load(tmp_path / "out" / "coco_images.json")["images"]
    assert image == {"id": 3, "file_name": good.name, "height": 64, "width": 64}


def test_gray_and_transparent_images_are_read_as_rgb(tmp_path):
    Image.new("L", (8, 6), 77).save(tmp_path / "gray.png")
    Image.new("RGBA", (8, 6), (1, 2, 3, 100)).save(tmp_path / "clear.png")
    assert (inference.read_image(tmp_path / "gray.png") == np.full((6, 8, 3), 77)).all()
    assert inference.read_image(tmp_path / "clear.png")[0, 0].tolist() == [1, 2, 3]


def test_bgr_models_get_bgr(folder):
    opts = [*CPU, "MODEL.WEIGHTS", str(folder / "model.pth")]
    image = inference.read_image(images_of(folder)[0])
    seen = []
    for order in ("RGB", "BGR"):
        predictor = inference.Predictor(load_config(CONFIG, [*opts, "INPUT.FORMAT", order]))
        predictor.model.register_forward_pre_hook(
            lambda module, inputs: seen.append(inputs[0][0]["image"])
        )
        predictor([image])
    assert torch.equal(seen[0], seen[1].flip(0))
    assert torch.equal(seen[0], torch.from_numpy(image.transpose(2, 0, 1).copy()))


# --- models -------------------------------------------------------------------------------------


def test_weights_of_mmdetection_give_the_same(run, folder, tmp_path):
    weights = torch.load(folder / "model.pth", weights_only=True)["model"]
    torch.save({"state_dict": mmdet.to_mmdet(weights)}, tmp_path / "mmdet.pth")
    image = images_of(folder)[0]
    results = []
    for path in (folder / "model.pth", tmp_path / "mmdet.pth"):
        assert run("--json", "--no-images", "--input", image, weights=path) is None
        results.append(load(tmp_path / "out" / "coco_instances_results.json"))
    assert results[0]
    assert results[0] == results[1]


def test_boxes_of_retinanet_have_coco_ids(run, folder, tmp_path, monkeypatch):
    config = str(ROOT / "configs" / "retinanet_R50_FPN_carafe_1x.yaml")
    small = ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
    small += ["MODEL.FPN.OUT_CHANNELS", "16", "MODEL.WEIGHTS", ""]
    monkeypatch.setattr(f"{__name__}.CPU", [*CPU, *small])
    save_random_model(tmp_path / "retinanet.pth", config)
    image = images_of(folder)[0]
    arguments = ["--json", "--input", image, "--confidence-threshold", "0.001"]
    assert run(*arguments, weights=tmp_path / "retinanet.pth", config=config) is None
    results = load(tmp_path / "out" / "coco_instances_results.json")
    assert results
    ids = MetadataCatalog.get("coco_2017_val").thing_dataset_id_to_contiguous_id
    assert {r["category_id"] for r in results} <= ids.keys()
    assert all("segmentation" not in r for r in results)
    assert (tmp_path / "out" / image.name).is_file()


# --- videos -------------------------------------------------------------------------------------


def frames(path):
    video = cv2.VideoCapture(str(path))
    found = []
    while (frame := video.read()[1]) is not None:
        found.append(frame)
    return found, video.get(cv2.CAP_PROP_FPS)


def test_json_has_the_category_ids_of_a_registered_dataset_or_is_refused(run, folder, tmp_path):
    """The classes of shapes by other ids, in another order than Detectron2 numbers them."""
    content = json.loads((folder / "shapes/annotations/instances_val.json").read_text())
    for category in content["categories"]:
        category["id"] = 70 - category["id"]
    (tmp_path / "own.json").write_text(json.dumps({**content, "annotations": []}))
    own = f"('predicted_own={tmp_path}/own.json:{folder}/shapes/val',)"
    inputs = ["--json", "--no-images", "--input", folder / "shapes" / "val"]
    error = run(*inputs, "DATASETS.TEST", "('unknown',)")
    assert "--json needs the category ids of the model's dataset" in error
    keys = ["DATASETS.REGISTER", own, "DATASETS.TEST", "('predicted_own',)"]
    assert run(*inputs, *keys) is None
    results = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert {result["category_id"] for result in results} <= set(range(64, 70))


def test_gray_models_get_gray_images(folder):
    gray = ["INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", "[128.0]", "MODEL.PIXEL_STD", "[50.0]"]
    save_random_model(folder / "gray.pth", CONFIG, gray)
    cfg = load_config(CONFIG, [*CPU, *gray, "MODEL.WEIGHTS", str(folder / "gray.pth")])
    predictor = inference.Predictor(cfg)
    image = inference.read_image(images_of(folder)[0])
    wanted = np.asarray(Image.fromarray(image).convert("L"))
    seen = predictor.resize(image)
    assert seen.shape == (*seen.shape[:2], 1)
    assert abs(cv2.resize(wanted, seen.shape[1::-1]).mean() - seen.mean()) < 1
    predictor([image])


def test_camera_is_shown_until_escape(run, folder, monkeypatch):
    shown = []
    capture = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda camera: capture(str(folder / "clip.avi")))
    monkeypatch.setattr(cv2, "imshow", lambda title, image: shown.append(image.shape))
    monkeypatch.setattr(cv2, "waitKey", lambda wait: 27 if len(shown) == 2 else -1)
    assert run("--webcam") is None
    assert shown == [(64, 64, 3)] * 2

    def no_windows(*_):
        raise cv2.error("The function is not implemented")

    monkeypatch.setattr(cv2, "imshow", no_windows)
    assert "--webcam needs windows: pip install opencv-python" in run("--webcam")
    assert "name files by --input, or a camera by --webcam" in run()


def test_video_becomes_a_video_with_the_predictions_of_its_frames(run, folder, model, tmp_path):
    video = folder / "clip.avi"
    assert run("--json", "--batch-size", "3", "--input", video) is None
    original, _ = frames(video)
    drawn, frames_per_second = frames(tmp_path / "out" / "clip.avi.mp4")
    assert len(drawn) == len(original) == 4
    assert drawn[0].shape == (64, 64, 3)
    assert frames_per_second == 5
    assert np.abs(drawn[0].astype(int) - original[0]).max() > 100

    results = load(tmp_path / "out" / "clip.avi.json")
    assert {r["image_id"] for r in results} == {0, 1, 2, 3}
    predictor = inference.Predictor(model[0])
    for number, frame in enumerate(original):
        (expected,) = predictor([frame[:, :, ::-1]])
        found = [r for r in results if r["image_id"] == number]
        assert [r["category_id"] for r in found] == (expected.pred_classes + 1).tolist()
        boxes = torch.tensor([r["bbox"] for r in found])
        torch.testing.assert_close(
            boxes[:, :2], expected.pred_boxes.tensor[:, :2], rtol=1e-4, atol=1e-2
        )
    assert not (tmp_path / "out" / "coco_instances_results.json").exists()


def test_video_without_pictures_is_json_alone(run, folder, tmp_path):
    assert run("--json", "--no-images", "--input", folder / "clip.avi") is None
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["clip.avi.json"]


def test_frames_with_odd_sides_are_written_whole(tmp_path):
    with predict.VideoFile(tmp_path / "odd.mp4", 5.0) as video:
        video.write(np.full((63, 65, 3), 200, np.uint8))
    (frame,), _ = frames(tmp_path / "odd.mp4")
    assert frame.shape == (64, 66, 3)
    assert frame.min() > 180


def test_unreadable_video_is_skipped(run, folder, tmp_path, capsys):
    (tmp_path / "broken.mp4").write_text("no video")
    error = run("--input", tmp_path / "broken.mp4", folder / "clip.avi")
    assert error == "error: skipped 1 of 2 files, for the reasons above"
    assert f"skipped: cannot read video {tmp_path / 'broken.mp4'}: " in capsys.readouterr().err
    assert len(frames(tmp_path / "out" / "clip.avi.mp4")[0]) == 4


# --- files --------------------------------------------------------------------------------------


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_inputs_are_files_folders_and_patterns_each_once(tmp_path):
    touch(tmp_path, "a/2.png", "a/1.JPG", "a/notes.txt", "a/deep/3.png", "b/clip.mp4", "b/x[1].png")
    values = ["b/x[1].png", "a", "b/*.mp4", "a/1.JPG"]
    found = predict.find_inputs(f"{tmp_path}/{value}" for value in values)
    names = [str(file.relative_to(tmp_path)) for file in found]
    assert names == ["b/x[1].png", "a/1.JPG", "a/2.png", "b/clip.mp4"]
    (deep,) = predict.find_inputs([f"{tmp_path}/a/**/3.png"])
    assert deep == tmp_path / "a" / "deep" / "3.png"


def test_outputs_keep_names_and_where_they_clash_folders():
    def outputs(*files):
        found = predict.output_files([Path(file) for file in files], Path("out"))
        return [str(found[Path(file)]) for file in files]

    assert outputs("in/a/1.png", "in/2.JPG") == ["out/1.png", "out/2.JPG"]
    assert outputs("in/a/1.png", "in/b/1.png") == ["out/a/1.png", "out/b/1.png"]
    assert outputs("1.tif", "c.mp4", "c.avi") == ["out/1.tif.png", "out/c.mp4", "out/c.avi.mp4"]


def test_inputs_are_not_overwritten(run, tmp_path, folder):
    (tmp_path / "out").mkdir()
    shutil.copy(images_of(folder)[0], tmp_path / "out" / "1.png")
    error = run("--input", tmp_path / "out")
    assert error == f"error: --output {tmp_path}/out would overwrite {tmp_path}/out/1.png; " + (
        "name another folder"
    )


def test_image_ids_are_annotated_ones_or_numbers_in_the_names_or_counted():
    def ids(*files, annotations=None):
        return list(predict.image_ids([Path(file) for file in files], annotations).values())

    assert ids("x/000000000139.jpg", "x/7.jpg") == [139, 7]
    assert ids("a/1.jpg", "b/01.jpg") == [1, 2]
    assert ids("x/7.jpg", "x/cat.jpg") == [1, 2]
    images = [{"id": 40, "file_name": "val/7.jpg"}, {"id": 41, "file_name": "7.jpg"}]
    annotations = {"images": images, "categories": []}
    assert ids("data/val/7.jpg", "data/train/7.jpg", annotations=annotations) == [40, 41]
    with pytest.raises(UserError, match=r"no image of the name 8\.jpg"):
        ids("8.jpg", annotations=annotations)


def test_config_keys_after_inputs_are_no_inputs():
    values = ["a.jpg", "MODEL.jpg", "MODEL.WEIGHTS", "m.pth"]
    assert inference.split_opts(values, ["SEED", "1"]) == (["a.jpg"], [*values[1:], "SEED", "1"])
    assert inference.split_opts(["IMG.JPG"], ["SEED", "1"]) == (["IMG.JPG"], ["SEED", "1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "absent.jpg"], r"--input: absent\.jpg does not exist"),
        (["--input", "empty"], "--input: empty holds no image or video"),
        (["--input", "*.gif"], r"--input: \*\.gif matches no file"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--width", "0"], "--width must be at least 1, got 0"),
        (
            ["--confidence-threshold", "50"],
            r"--confidence-threshold must be from 0 to 1, got 50\.0",
        ),
        (["--no-images"], "--no-images leaves nothing to write; add --json"),
        (["--annotations", "absent.json"], r"cannot read --annotations absent\.json: No such file"),
        (["--annotations", "image.png"], r"--annotations image\.png is no COCO annotation file"),
        (["--output", "image.png"], r"--output image\.png: File exists"),
        (["--config-file", "absent.yaml"], r"config file 'absent\.yaml' does not exist"),
        (["MODEL.NONSENSE", "1"], r"Non-existent (config )?key: MODEL\.NONSENSE"),
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
        (["DATASETS.TEST", "('coco_2017_val',)"], r"6 classes apart and 'coco_2017_val' has 80"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_mistakes_get_one_clear_line(folder, monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (64, 64)).save("image.png")
    always = ["--config-file", CONFIG, "--input", "image.png", "--output", "out"]
    opts = [*CPU, "MODEL.WEIGHTS", str(folder / "model.pth")]
    # The program's own options come before the config keys; the last of each counts.
    options, keys = ([], arguments) if "." in arguments[0] else (arguments, [])
    monkeypatch.setattr(sys, "argv", ["predict.py", *always, *options, *opts, *keys])
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        predict.main()
    assert not list(tmp_path.glob("out/*"))
