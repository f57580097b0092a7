import http.server
import logging
import os
import pickle
import sys
import threading
import types
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.resnet import BasicStem
from torch import nn

from carafe_d2 import CarafeCheckpointer, CARAFEPack
from carafe_d2.checkpoint import read_checkpoint
from carafe_d2.errors import UserError

# MMDetection's weights of the smallest thing that passes for a detector.
NORM = ("weight", "bias", "running_mean", "running_var")
STATE_DICT = {
    "backbone.conv1.weight": (4, 3, 7, 7),
    **{f"backbone.bn1.{kind}": (4,) for kind in NORM},
    "backbone.bn1.num_batches_tracked": (),
    "neck.lateral_convs.0.conv.weight": (4, 4, 1, 1),
    "neck.lateral_convs.0.conv.bias": (4,),
    "roi_head.bbox_head.fc_cls.weight": (6, 4),
    "roi_head.bbox_head.fc_cls.bias": (6,),
}


def tree(modules):
    """A module with the given ones at dotted paths."""
    root = nn.Module()
    for path, module in modules.items():
        *parents, name = path.split(".")
        parent = root
        for part in parents:
            parent = parent._modules.setdefault(part, nn.Module())
        parent.add_module(name, module)
    return root


def detector(norm="FrozenBN", classes=5, mask_head=False):
    """A module with the weights of STATE_DICT by the names of Detectron2."""
    modules = {
        "backbone.bottom_up.stem": BasicStem(3, 4, norm=norm),
        "backbone.fpn_lateral2": nn.Conv2d(4, 4, 1),
        "roi_heads.box_predictor.cls_score": nn.Linear(4, classes + 1),
    }
    if mask_head:
        modules["roi_heads.mask_head.predictor"] = nn.Conv2d(4, classes, 1)
    return tree(modules)


@pytest.fixture
def state_dict():
    torch.manual_seed(0)
    return OrderedDict((name, torch.rand(shape)) for name, shape in STATE_DICT.items())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.pth"


def save(path, state_dict, **others):
    torch.save({"state_dict": state_dict, "meta": {"CLASSES": ("a", "b")}, **others}, path)
    return str(path)


def assert_loaded(model, state_dict):
    lateral = model.backbone.fpn_lateral2
    assert torch.equal(lateral.weight, state_dict["neck.lateral_convs.0.conv.weight"])
    norm = model.backbone.bottom_up.stem.conv1.norm
    assert torch.equal(norm.running_var, state_dict["backbone.bn1.running_var"])


def test_saves_and_loads(tmp_path):
    saved, loaded = CARAFEPack(4, 2), CARAFEPack(4, 2)
    CarafeCheckpointer(saved, str(tmp_path)).save("model", iteration=7)
    rest = CarafeCheckpointer(loaded).load(str(tmp_path / "model.pth"))
    assert rest["iteration"] == 7
    assert torch.equal(saved.content_encoder.weight, loaded.content_encoder.weight)


def test_empty_path_leaves_the_model_alone():
    pack = CARAFEPack(4, 2)
    before = pack.content_encoder.weight.clone()
    assert CarafeCheckpointer(pack).load("") == {}
    assert torch.equal(pack.content_encoder.weight, before)


def test_not_strict_it_loads_what_detectron2s_own_checkpointer_does(path, caplog):
    weights = detector(mask_head=True).state_dict()
    torch.save({"model": weights, "iteration": 3}, path)
    logs = []
    for checkpointer in (DetectionCheckpointer, partial(CarafeCheckpointer, strict=False)):
        caplog.clear()
        # Other classes, and no mask head: what does not fit is left out with a warning.
        model = detector(classes=2)
        assert checkpointer(model).load(str(path)) == {"iteration": 3}
        assert torch.equal(model.backbone.fpn_lateral2.bias, weights["backbone.fpn_lateral2.bias"])
        logs.append([r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING])
    assert logs[0] == logs[1] != []
    with pytest.raises(UserError, match=r"cls_score.weight has shape \(6, 4\) in the file and"):
        CarafeCheckpointer(detector(classes=2)).load(str(path))


def test_model_zoo_files_of_detectron2_load(tmp_path):
    weights = {name: tensor.numpy() for name, tensor in detector().state_dict().items()}
    file = tmp_path / "model.pkl"
    file.write_bytes(pickle.dumps({"model": weights, "__author__": "Detectron2 Model Zoo"}))
    model = detector()
    CarafeCheckpointer(model).load(str(file))
    lateral = weights["backbone.fpn_lateral2.weight"]
    assert np.array_equal(model.backbone.fpn_lateral2.weight.detach(), lateral)


def spoil_weight(file, how):
    """Spoils one weight of a checkpoint: its values, their type, or by another of its name."""
    weights = torch.load(file)["model"]
    name = "content_encoder.bias"
    if isinstance(how, str):
        weights[how + name] = weights[name] + 1
    elif isinstance(how, float):
        weights[name][0] = how
    else:
        weights[name] = weights[name].to(how)
    torch.save({"model": weights}, file)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.unlink(), "model.pth do not exist; set MODEL.WEIGHTS"),
        (lambda file: file.write_bytes(b""), "is not a readable checkpoint"),
        (lambda file: file.write_bytes(b"no checkpoint"), "is not a readable checkpoint"),
        (lambda file: os.truncate(file, 1000), "is not a readable checkpoint"),
        (lambda file: torch.save([1], file), "model.pth is no checkpoint: it holds a list"),
        (lambda file: torch.save({"epoch": 3}, file), "its 'epoch' is no weight but a int"),
        (
            lambda file: torch.save({"layer1.0.conv1.weight": torch.rand(1)}, file),
            "model.pth holds no weight of the model, but layer1.0.conv1.weight",
        ),
        (
            lambda file: spoil_weight(file, torch.nan),
            "bias has values that are not finite",
        ),
        (
            lambda file: spoil_weight(file, torch.int8),
            "bias has the type torch.int8",
        ),
        (
            lambda file: spoil_weight(file, "module."),
            "holds content_encoder.bias twice, once",
        ),
        (lambda file: file.write_text("<!DOCTYPE html>"), "it starts with b'<!DOCTYPE html>'"),
    ],
    ids=[
        *("missing", "empty", "garbage", "truncated", "list", "no weights", "other names"),
        *("not finite", "integers", "twice", "web page"),
    ],
)
def test_unusable_files_are_named(tmp_path, spoil, message):
    checkpointer = CarafeCheckpointer(CARAFEPack(4, 2), str(tmp_path))
    checkpointer.save("model")
    spoil(tmp_path / "model.pth")
    with pytest.raises(UserError, match=message) as error:
        checkpointer.load(str(tmp_path / "model.pth"))
    assert "\n" not in str(error.value)


def test_averaged_models_load(path):
    averaged = torch.optim.swa_utils.AveragedModel(CARAFEPack(4, 2))
    torch.save(averaged.state_dict(), path)
    model = CARAFEPack(4, 2)
    CarafeCheckpointer(model).load(str(path))
    assert torch.equal(model.content_encoder.weight, averaged.module.content_encoder.weight)


def test_constants_of_old_checkpoints_have_to_be_those_of_the_model(path, caplog):
    model = detector()
    model.register_buffer("pixel_mean", torch.tensor([1.0, 2.0, 3.0])[:, None, None], False)
    weights = detector().state_dict()
    torch.save({"model": {**weights, "pixel_mean": model.pixel_mean.flatten()}}, path)
    CarafeCheckpointer(model).load(str(path))
    model.pixel_mean += 1
    with pytest.raises(UserError, match=r"pixel_mean is another in the file than MODEL.PIXEL_MEAN"):
        CarafeCheckpointer(model).load(str(path))
    CarafeCheckpointer(model, strict=False).load(str(path))
    assert "MODEL.PIXEL_MEAN" in caplog.text


def test_addresses_are_fetched_once(tmp_path, state_dict, monkeypatch):
    served = tmp_path / "served"
    served.mkdir()
    save(served / "mmdet.pth", state_dict)
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=served)

        def log_request(self, code):
            requests.append((self.path, code))

    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    with http.server.HTTPServer(("localhost", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        address = f"http://localhost:{server.server_port}"
        for _ in range(2):
            model = detector()
            CarafeCheckpointer(model).load(f"{address}/mmdet.pth")
            assert_loaded(model, state_dict)
        with pytest.raises(UserError, match=rf"cannot fetch the weights {address}/absent.pth.*404"):
            CarafeCheckpointer(model).load(f"{address}/absent.pth")
        server.shutdown()
    with pytest.raises(UserError, match=f"cannot fetch the weights {address}/unreachable.pth"):
        CarafeCheckpointer(model).load(f"{address}/unreachable.pth")
    assert requests.count(("/mmdet.pth", 200)) == 1


@pytest.mark.parametrize("zip_file", [True, False], ids=["zip", "before PyTorch 1.6"])
@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_mmdetection_checkpoints_load(path, state_dict, norm, zip_file, caplog):
    # PyTorch keeps the versions of modules there, and they are not those of Detectron2's.
    state_dict._metadata = OrderedDict({"backbone.bn1": {"version": 2}})
    torch.save({"state_dict": state_dict}, path, _use_new_zipfile_serialization=zip_file)
    model = detector(norm)
    CarafeCheckpointer(model).load(str(path))
    assert_loaded(model, state_dict)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("name", STATE_DICT)
def test_lacking_weights_are_named_and_the_model_is_not_touched(path, state_dict, name):
    del state_dict[name]
    save(path, state_dict)
    model = detector()
    if name.endswith("num_batches_tracked"):  # which no result depends on
        CarafeCheckpointer(model).load(str(path))
        return
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kind = name.rpartition(".")[2]
    with pytest.raises(UserError, match=rf"checkpoint.pth does not fit .* it lacks \S+\.{kind}$"):
        CarafeCheckpointer(model).load(str(path))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "name", ["backbone.layer1.0.conv2.conv_offset.weight", "neck.lateral_convs.4.conv.weight"]
)
def test_weights_without_a_place_are_named(path, state_dict, name, caplog):
    state_dict[name] = torch.rand(1)
    ours = "backbone.fpn_lateral6.weight" if name.startswith("neck") else name
    with pytest.raises(UserError, match=f"the model has no place for {ours}$"):
        CarafeCheckpointer(detector()).load(save(path, state_dict))

    model = detector()
    CarafeCheckpointer(model, strict=False).load(str(path))
    assert_loaded(model, state_dict)
    assert ours in caplog.text


def test_other_shapes_are_named(path, state_dict, caplog):
    save(path, state_dict)
    message = "it tells 5 classes apart and the model 3; set MODEL.ROI_HEADS.NUM_CLASSES to 5"
    with pytest.raises(UserError, match=message):
        CarafeCheckpointer(detector(classes=3)).load(str(path))
    state_dict["neck.lateral_convs.0.conv.bias"] = torch.rand(8)
    message = r"backbone.fpn_lateral2.bias has shape \(8,\) in it and \(4,\) in the model"
    with pytest.raises(UserError, match=message):
        CarafeCheckpointer(detector()).load(save(path.with_name("other.pth"), state_dict))

    model = detector(classes=3)
    CarafeCheckpointer(model, strict=False).load(str(path))
    assert_loaded(model, state_dict)
    assert "Skip loading parameter 'roi_heads.box_predictor.cls_score.weight'" in caplog.text


def convolutions(stage, blocks, in_a_block):
    """A ResNet's convolutions by their names; `stage` is the name of one by its number."""
    return {
        f"{stage(number)}.{block}.conv{i}": nn.Conv2d(1, 1, 1, bias=False)
        for number, count in enumerate(blocks, start=1)
        for block in range(count)
        for i in range(1, in_a_block + 1)
    }


@pytest.mark.parametrize(
    ("depth", "blocks", "in_a_block"), [(101, (3, 4, 23, 3), 3), (34, (3, 4, 6, 3), 2)]
)
def test_other_depth_is_named(path, depth, blocks, in_a_block):
    theirs = tree(convolutions("backbone.layer{}".format, blocks, in_a_block))
    ours = tree(convolutions(lambda i: f"backbone.bottom_up.res{i + 1}", (3, 4, 6, 3), 3))
    message = f"ResNet-{depth} and the model's a ResNet-50; .* to {depth}"
    with pytest.raises(UserError, match=message):
        CarafeCheckpointer(ours).load(save(path, theirs.state_dict()))


def test_boxes_are_evaluated_without_the_mask_head_of_the_checkpoint(path, state_dict, caplog):
    state_dict["roi_head.mask_head.conv_logits.weight"] = torch.rand(5, 4, 1, 1)
    state_dict["roi_head.mask_head.conv_logits.bias"] = torch.rand(5)
    model = detector()
    CarafeCheckpointer(model).load(save(path, state_dict))
    assert_loaded(model, state_dict)
    assert "keys that are not used by the model" in caplog.text
    assert "roi_heads.mask_head.predictor" in caplog.text

    with pytest.raises(UserError, match=r"it lacks roi_heads\.mask_head\.predictor\.bias"):
        del state_dict["roi_head.mask_head.conv_logits.bias"]
        CarafeCheckpointer(detector(mask_head=True)).load(save(path, state_dict))


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_geometry_of_the_model_is_compared(path, state_dict, offset, caplog):
    model = detector()
    model.proposal_generator = nn.Module()
    model.proposal_generator.anchor_generator = DefaultAnchorGenerator(
        sizes=[[32]], aspect_ratios=[[1.0]], strides=[4], offset=offset
    )
    CarafeCheckpointer(model).load(save(path, state_dict))
    assert ("geometry of MMDetection 1.x" in caplog.text) == (offset == 0.5)


class HistoryBuffer:
    """Pickles like that of MMEngine, whose training checkpoints hold the history of each loss."""

    def __init__(self):
        self._log_history = np.arange(3.0)
        self._statistics_methods = {"mean": self.mean}

    def mean(self):
        raise AssertionError("ran")


def test_unfinished_trainings_of_mmdetection_load(path, state_dict, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    meta = {"hook_msgs": {"best_score": np.float64(0.39)}, "seed": np.int32(3), "iter": 7330}
    message_hub = {"log_scalars": OrderedDict(loss=HistoryBuffer())}
    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer
    with monkeypatch.context() as patch:  # MMEngine, as far as saving needs it
        patch.setattr(HistoryBuffer, "__module__", module.__name__)
        patch.setitem(sys.modules, module.__name__, module)
        patch.setitem(sys.modules, "mmengine", types.ModuleType("mmengine"))
        patch.setitem(sys.modules, "mmengine.logging", types.ModuleType("mmengine.logging"))
        save(path, state_dict, meta=meta, message_hub=message_hub, optimizer={"state": {}})
    model = detector()
    CarafeCheckpointer(model).load(str(path))
    assert_loaded(model, state_dict)
    assert "Not read: message_hub, optimizer" in caplog.text
    assert read_checkpoint(str(path))["meta"]["iter"] == 7330


def test_numpy_beside_weights_of_detectron2_is_not_passed_over(path):
    torch.save({"model": detector().state_dict(), "iteration": np.int64(3)}, path)
    with pytest.raises(UserError, match=r"holds a numpy\S*multiarray.scalar"):
        CarafeCheckpointer(detector()).load(str(path))


class Malicious:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "name"),
    [("mkdir", r"(posix|nt)\.mkdir"), ("eval", "eval"), ("getattr", r"(posix|nt)\.mkdir")],
)
@pytest.mark.parametrize("zip_file", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_code_in_a_checkpoint_does_not_run(tmp_path, path, state_dict, function, name, zip_file):
    evidence = tmp_path / "evidence"
    attack = {
        "mkdir": Malicious(os.mkdir, str(evidence)),
        "eval": Malicious(eval, f"__import__('os').mkdir({str(evidence)!r})"),
        "getattr": [Malicious(getattr, "", "join"), Malicious(os.mkdir, str(evidence))],
    }[function]
    content = {"state_dict": state_dict, "meta": {"time": attack}}
    torch.save(content, path, _use_new_zipfile_serialization=zip_file)
    for read in (CarafeCheckpointer(detector()).load, read_checkpoint):
        with pytest.raises(UserError, match=f"holds a {name}, and .*publish_model.py") as error:
            read(str(path))
        assert "\n" not in str(error.value)
    assert not evidence.exists()
