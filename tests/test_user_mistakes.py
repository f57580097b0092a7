"""Mistakes that users make with train_net.py: one line that names what is at fault, exit code 1."""

import json
import pickle
import shutil

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from carafe_d2 import train_net
from carafe_d2.config import load_config
from carafe_d2.errors import UserError

CONFIG = "shapes_mask_rcnn_R18_FPN_carafe.yaml"
SMALL = [
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "SOLVER.IMS_PER_BATCH", "2"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "20", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
    *("MODEL.FPN.OUT_CHANNELS", "16", "MODEL.CARAFE.COMPRESSED_CHANNELS", "16"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16"),
    *("SOLVER.BASE_LR", "0.001", "SOLVER.MAX_ITER", "2"),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
]


@pytest.fixture(scope="module", autouse=True)
def datasets(register_shapes):
    register_shapes(train=4, val=2)


def run(*options, folder, flags=()):
    # The mistake comes last, where it is looked for first.
    options = ["OUTPUT_DIR", folder, *options]
    train_net.run(["--config-file", CONFIG, *flags, *SMALL, *map(str, options)])


def error_of(*options, folder, flags=()) -> str:
    with pytest.raises(SystemExit) as exit:
        run(*options, folder=folder, flags=flags)
    assert isinstance(exit.value.code, str)  # so that Python prints it and the exit code is 1
    assert exit.value.code.startswith("error: ")
    return exit.value.code


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run(folder=folder)
    return folder


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ("MODEL.FPN.FUSE_TYPE max", "MODEL.FPN.FUSE_TYPE"),
        ("MODEL.RESNETS.RES5_DILATION 2", "MODEL.RESNETS.RES5_DILATION"),
        ("MODEL.FPN.IN_FEATURES ['res1','res2']", "MODEL.FPN.IN_FEATURES"),
        ("MODEL.ROI_HEADS.IN_FEATURES ['p9']", "MODEL.ROI_HEADS.IN_FEATURES"),
        ("MODEL.RESNETS.DEPTH 19", "MODEL.RESNETS.DEPTH"),
        ("MODEL.RESNETS.NORM XX", "MODEL.RESNETS.NORM"),
        ("MODEL.ANCHOR_GENERATOR.SIZES [[32],[64]]", "MODEL.ANCHOR_GENERATOR.SIZES"),
        ("MODEL.ROI_HEADS.IOU_LABELS [0,1,2]", "MODEL.ROI_HEADS.IOU_LABELS"),
        ("MODEL.DEVICE gpu", "MODEL.DEVICE"),
        ("MODEL.LOAD_PROPOSALS True", "MODEL.LOAD_PROPOSALS"),
        ("MODEL.BACKBONE.NAME foo", "MODEL.BACKBONE.NAME"),
        ("SOLVER.LR_SCHEDULER_NAME Foo", "SOLVER.LR_SCHEDULER_NAME"),
        ("SOLVER.WARMUP_METHOD foo", "SOLVER.WARMUP_METHOD"),
        ("SOLVER.CHECKPOINT_PERIOD 0", "SOLVER.CHECKPOINT_PERIOD"),
        ("SOLVER.MAX_ITER 0", "SOLVER.MAX_ITER"),
        ("SOLVER.AMP.ENABLED True MODEL.DEVICE cpu", "SOLVER.AMP.ENABLED"),
        (
            "SOLVER.CLIP_GRADIENTS.ENABLED True SOLVER.CLIP_GRADIENTS.CLIP_TYPE foo",
            "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
        ),
        # only the first iteration finds these
        ("MODEL.RPN.BBOX_REG_LOSS_TYPE foo", "MODEL.RPN.BBOX_REG_LOSS_TYPE"),
        ("INPUT.FORMAT XYZ", "INPUT.FORMAT"),
        ("INPUT.MASK_FORMAT foo", "INPUT.MASK_FORMAT"),
        ("INPUT.MIN_SIZE_TRAIN ()", "INPUT.MIN_SIZE_TRAIN"),
        ("DATALOADER.NUM_WORKERS -1", "DATALOADER.NUM_WORKERS"),
        # and these only an evaluation, which would come when the training is over
        ("TEST.EXPECTED_RESULTS [['bbox','AP']]", "TEST.EXPECTED_RESULTS"),
        ("TEST.AUG.ENABLED True MODEL.META_ARCHITECTURE LegacyRCNN", "TEST.AUG.ENABLED"),
        ("MODEL.PIXEL_MEAN [1.0]", "MODEL.PIXEL_MEAN"),
        ("MODEL.KEYPOINT_ON True", "MODEL.CHANNELS_LAST"),
        ("MODEL.ROI_HEADS.NUM_CLASSES 5", "MODEL.ROI_HEADS.NUM_CLASSES"),
        ("GLOBAL.HACK 2.0", "GLOBAL.HACK"),
        ("SEED abc", "SEED"),
        ("MODEL.NO_SUCH_KEY 1", "MODEL.NO_SUCH_KEY"),
        ("DATASETS.REGISTER ('a=b',)", "NAME=ANNOTATIONS.json:IMAGES/"),
    ],
)
def test_config_mistake_is_one_line_with_the_key(options, key, tmp_path):
    error = error_of(*options.split(), folder=tmp_path)
    assert key in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "sections with keys"),
        ("- a list", "sections with keys"),
        ("MODEL: [1,", "while parsing"),
        ('_BASE_: "missing.yaml"', "missing.yaml"),
        ('_BASE_: "mistaken.yaml"', "its _BASE_ leads back to itself"),
        ("VERSION: 2\nMODEL: 3", "for config key: MODEL"),
        ("MODEL: {DEVICE: cpu}\nSEED: 1\nMODEL: {MASK_ON: True}", "line 3: MODEL is given twice"),
    ],
)
def test_mistake_in_a_config_file_is_one_line_with_its_path(text, message, tmp_path):
    path = tmp_path / "mistaken.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(str(path))
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_output_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    assert "OUTPUT_DIR" in error_of(folder=tmp_path / "file")
    assert "OUTPUT_DIR /proc/nowhere" in error_of(folder="/proc/nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["MODEL.CARAFE.UP_KERNEL", 3], "content_encoder.weight has shape"),
        (["MODEL.FPN.UPSAMPLE", "nearest"], "the model has no place for backbone.fpn_upsample2"),
        (["MODEL.RESNETS.DEPTH", 34], "lacks backbone.bottom_up.res2.2"),
        (["MODEL.ROI_MASK_HEAD.NUM_CONV", 3], "lacks roi_heads.mask_head.mask_fcn3"),
        # what the weights do not show
        (["MODEL.CARAFE.ENCODER_DILATION", 2], "MODEL.CARAFE.ENCODER_DILATION is 2, but"),
        (["INPUT.FORMAT", "BGR"], "INPUT.FORMAT is 'BGR', but the weights were trained with 'RGB'"),
    ],
)
def test_evaluation_takes_a_checkpoint_whole_or_refuses_it(options, message, trained, tmp_path):
    weights = ["MODEL.WEIGHTS", trained / "model_final.pth"]
    error = error_of(*weights, *options, folder=tmp_path, flags=["--eval-only"])
    assert message in error


def _detections(folder):
    return json.loads((folder / "inference" / "coco_instances_results.json").read_text())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"model": {f"module.{name}": w for name, w in weights.items()}},
        lambda weights: {"state_dict": weights},
        lambda weights: {
            "model": {
                name.replace("backbone.", "backbone._orig_mod.", 1): w
                for name, w in weights.items()
            }
        },
        lambda weights: {f"_orig_mod.{name}": w for name, w in weights.items()},
    ],
    ids=["DDP", "state_dict", "compiled backbone", "compiled model"],
)
def test_wrappers_around_weights_change_nothing(wrap, trained, tmp_path):
    weights = torch.load(trained / "model_final.pth")["model"]
    torch.save(wrap(weights), tmp_path / "wrapped.pth")
    run("MODEL.WEIGHTS", tmp_path / "wrapped.pth", folder=tmp_path, flags=["--eval-only"])
    assert _detections(tmp_path) == _detections(trained)


def test_compiled_part_of_a_model_takes_plain_weights(trained):
    from carafe_d2 import CarafeCheckpointer

    cfg = load_config(CONFIG, SMALL)
    model = train_net.Trainer.build_model(cfg)
    model.backbone = torch.compile(model.backbone, backend="eager")
    CarafeCheckpointer(model).load(str(trained / "model_final.pth"))
    saved = torch.load(trained / "model_final.pth")["model"]
    name = "fpn_lateral2.weight"
    loaded = model.state_dict()[f"backbone._orig_mod.{name}"]
    torch.testing.assert_close(loaded, saved[f"backbone.{name}"], rtol=0, atol=0)


class _Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_of_arrays_load_and_others_run_no_code(trained, tmp_path):
    weights = torch.load(trained / "model_final.pth")["model"]
    content = {
        "model": {name: w.numpy() for name, w in weights.items()},
        "__author__": "Detectron2 Model Zoo",
    }
    (tmp_path / "arrays.pkl").write_bytes(pickle.dumps(content))
    run("MODEL.WEIGHTS", tmp_path / "arrays.pkl", folder=tmp_path, flags=["--eval-only"])
    assert _detections(tmp_path) == _detections(trained)

    (tmp_path / "code.pkl").write_bytes(pickle.dumps({"model": _Code(tmp_path / "ran")}))
    error = error_of("MODEL.WEIGHTS", tmp_path / "code.pkl", folder=tmp_path, flags=["--eval-only"])
    assert "could run code of the file" in error
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["SOLVER.OPTIMIZER", "SGD"], "SOLVER.OPTIMIZER"),
        (["MODEL.CARAFE.UP_KERNEL", "3"], "content_encoder.weight has shape"),
        (["MODEL.BACKBONE.FREEZE_AT", "2"], "keep its MODEL.BACKBONE.FREEZE_AT"),
    ],
)
def test_resuming_another_training_is_refused(options, message, trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    options = ["SOLVER.MAX_ITER", "3", *options]
    assert message in error_of(*options, folder=tmp_path, flags=["--resume"])


def test_changed_learning_rate_and_seed_are_obeyed_on_resume(tmp_path):
    sgd = ["SOLVER.OPTIMIZER", "SGD", "SOLVER.WARMUP_ITERS", 0]
    run(*sgd, folder=tmp_path)
    changed = ["SOLVER.BASE_LR", 0.0001, "SOLVER.NESTEROV", True, "SEED", 7]
    run(*sgd, "SOLVER.MAX_ITER", 4, *changed, folder=tmp_path, flags=["--resume"])
    state = torch.load(tmp_path / "model_final.pth", weights_only=False)
    groups = state["trainer"]["_trainer"]["optimizer"]["param_groups"]
    assert {(group["initial_lr"], group["nesterov"]) for group in groups} == {(0.0001, True)}
    assert state["data_loader"]["seed"] == 7


def test_test_time_augmentation_is_evaluated(tmp_path):
    run(
        *("TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(64,96)"),
        *("TEST.EXPECTED_RESULTS", "[['bbox_TTA','AP',0.0,100.0]]"),
        folder=tmp_path,
    )
    assert (tmp_path / "inference_TTA" / "coco_instances_results.json").is_file()


def test_datasets_that_are_functions_are_evaluated_as_they_are_now(trained, tmp_path):
    """Detectron2 would take what it wrote for an earlier evaluation."""
    records = DatasetCatalog.get("shapes_val")
    name = "shapes_that_change"
    weights = ["MODEL.WEIGHTS", trained / "model_final.pth", "DATASETS.TEST", f"('{name}',)"]
    try:
        counts = []
        for subset in (records, records[:1]):
            DatasetCatalog.register(name, lambda subset=subset: subset)
            MetadataCatalog.get(name).set(
                thing_classes=MetadataCatalog.get("shapes_val").thing_classes,
                evaluator_type="coco",
            )
            run(*weights, folder=tmp_path, flags=["--eval-only"])
            written = tmp_path / "inference" / f"{name}_coco_format.json"
            counts.append(len(json.loads(written.read_text())["images"]))
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        assert counts == [2, 1]
    finally:
        MetadataCatalog.pop(name, None)


def test_more_detections_than_cocos_limit_count(trained, tmp_path):
    weights = ["MODEL.WEIGHTS", trained / "model_final.pth", "TEST.DETECTIONS_PER_IMAGE", 300]
    run(*weights, folder=tmp_path, flags=["--eval-only"])
    log = (tmp_path / "log.txt").read_text()
    assert "AP counts up to 300 detections of an image, not COCO's 100" in log
