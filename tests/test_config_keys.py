"""No key of Detectron2's defaults is without effect: each is read in a training, or refused."""

import re
from pathlib import Path

import detectron2
import pytest

from carafe_d2 import train_net
from carafe_d2.config import WITHOUT_EFFECT, default_config, find_config_file, keys_of, load_config
from carafe_d2.diagnosis import Reads, RecordingNode, warn_of_idle_keys

ROOT = Path(__file__).parents[1]
CONFIG = "shapes_mask_rcnn_R18_FPN_carafe.yaml"
# Trainings that between them turn on whatever has to be on for its other keys to be read.
TRAININGS = {
    "everything_on": [
        *("SOLVER.CLIP_GRADIENTS.ENABLED", "True", "TEST.AUG.ENABLED", "True"),
        *("TEST.AUG.MIN_SIZES", "(64,)", "TEST.PRECISE_BN.ENABLED", "True"),
        *("TEST.PRECISE_BN.NUM_ITER", "2", "TEST.EVAL_PERIOD", "1"),
        *("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"),
        *("SOLVER.OPTIMIZER", "SGD", "MODEL.BACKBONE.FREEZE_AT", "0"),
    ],
    "boxes_of_crops": [
        *("MODEL.MASK_ON", "False", "INPUT.CROP.ENABLED", "True"),
        *("SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR"),
    ],
    "steps": [
        *("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", "(1,)"),
        *("SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"),
    ],
}
SMALL = [
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "SOLVER.MAX_ITER", "2"),
    *("SOLVER.IMS_PER_BATCH", "2", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "20"),
    *("MODEL.FPN.OUT_CHANNELS", "16", "MODEL.CARAFE.COMPRESSED_CHANNELS", "16"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32", "SOLVER.BASE_LR", "0.001"),
]
# Read elsewhere, or together with something that these trainings do not turn on.
ELSEWHERE = {
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": "MODEL.LOAD_PROPOSALS",
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": "MODEL.LOAD_PROPOSALS",
    "DATASETS.PROPOSAL_FILES_TRAIN": "MODEL.LOAD_PROPOSALS",
    "DATASETS.PROPOSAL_FILES_TEST": "MODEL.LOAD_PROPOSALS",
    "DATALOADER.RANDOM_SUBSET_RATIO": "a sampler of its own",
    "SOLVER.NUM_DECAYS": "a schedule of its own",
    "CUDNN_BENCHMARK": "default_setup, which reads a copy",
    "FLOAT32_PRECISION": "default_setup, which reads a copy",
    "DATASETS.REGISTER": "load_config",
    "VERSION": "load_config",
}


KEYS = set(keys_of(default_config()))


@pytest.fixture(scope="module")
def read(register_shapes, tmp_path_factory):
    """The keys that are read while the trainings run."""
    register_shapes(train=4, val=2)
    seen = Reads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_net, "Reads", lambda: seen)
        # The check of the defaults is no reading.
        patch.setattr(train_net, "check_config", lambda *args, **options: None)
        for name, options in TRAININGS.items():
            folder = tmp_path_factory.mktemp(name)
            train_net.run(["--config-file", CONFIG, *SMALL, *options, "OUTPUT_DIR", str(folder)])
    return seen


def test_what_is_not_of_the_model_is_read_in_training_or_refused(read):
    unread = {key for key in KEYS if not key.startswith("MODEL.")} - read
    assert unread - ELSEWHERE.keys() == {*WITHOUT_EFFECT} & KEYS


def test_keys_of_models_are_read_by_some_model():
    """As text, for the models are many: by the last two names of a key, or the last one alone."""
    sources = [
        path.read_text()
        for folder in (Path(detectron2.__file__).parent, ROOT / "carafe_d2")
        for path in folder.rglob("*.py")
        if path.name != "defaults.py" or path.parent.name != "config"
    ]
    text = "\n".join(sources)
    for key in KEYS:
        if key.startswith("MODEL.") and key not in WITHOUT_EFFECT:
            name = key.rpartition(".")[2]
            assert re.search(rf"\.{name}\b|[\"'`.]{name}[\"']", text), key


@pytest.mark.parametrize(
    ("overrides", "idle"),
    [
        (["MODEL.RETINANET.NUM_CLASSES", "5"], ["MODEL.RETINANET.NUM_CLASSES"]),
        (["MODEL.RETINANET.NUM_CLASSES", "80"], []),  # as by default
        (["MODEL.CARAFE.UP_KERNEL", "3"], []),
        (
            ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.UPSAMPLE", "nearest"],
            ["MODEL.FPN.UPSAMPLE"],
        ),
        (["MODEL.CARAFE_DOWNSAMPLE.DOWN_GROUP", "2"], ["MODEL.CARAFE_DOWNSAMPLE.DOWN_GROUP"]),
        (["SOLVER.GAMMA", "0.5"], ["SOLVER.GAMMA"]),
    ],
)
def test_what_the_user_set_and_nothing_reads_is_named(overrides, idle, caplog):
    overrides = ["MODEL.DEVICE", "cpu", *overrides]
    cfg = RecordingNode.of(load_config(CONFIG, overrides), Reads())
    assert not cfg.MODEL.WEIGHTS  # which is no part of the model
    train_net.Trainer.build_model(cfg.clone())
    warn_of_idle_keys(find_config_file(CONFIG), overrides, cfg, eval_only=False)
    assert [message.split()[0] for message in caplog.messages if "no effect" in message] == idle
