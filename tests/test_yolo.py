"""CARAFE in YOLO: by name in Ultralytics' model YAMLs, and the modules that forks carry."""

import copy
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from carafe_d2 import BatchNormCARAFE, CARAFEPack, LazyCARAFEPack, ProjectedCARAFE

# ------------------------------------------------------------- the modules of forks, as described


class Conv(nn.Module):
    """YOLO's block: convolution without bias, batch norm, activation."""

    def __init__(self, c1, c2, k=1, act=True):
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, 1, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = nn.SiLU() if act else nn.Identity()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class ForkBatchNorm(nn.Module):
    """Every output pixel is a sum over the pixels of the map repeated by the scale, s apart."""

    def __init__(self, c, k_enc=3, k_up=5, c_mid=64, scale=2):
        super().__init__()
        self.scale = scale
        self.comp = Conv(c, c_mid)
        self.enc = Conv(c_mid, (scale * k_up) ** 2, k_enc, act=False)
        self.unfold = nn.Unfold(k_up, dilation=scale, padding=k_up // 2 * scale)

    def forward(self, x):
        kernels = F.pixel_shuffle(self.enc(self.comp(x)), self.scale).softmax(dim=1)
        repeated = F.interpolate(x, scale_factor=self.scale, mode="nearest")
        n, c, h, w = repeated.shape
        windows = self.unfold(repeated).view(n, c, -1, h, w)
        return (windows * kernels.unsqueeze(1)).sum(dim=2)


class ForkProjected(nn.Module):
    """For every input pixel, its window times the kernels of its output pixels, a matrix."""

    def __init__(self, c1, c2, kernel_size=3, up_factor=2):
        super().__init__()
        self.kernel_size, self.up_factor = kernel_size, up_factor
        self.down = nn.Conv2d(c1, c1 // 4, 1)
        self.encoder = nn.Conv2d(
            c1 // 4, up_factor**2 * kernel_size**2, kernel_size, 1, kernel_size // 2
        )
        self.out = nn.Conv2d(c1, c2, 1)

    def forward(self, x):
        (n, c, h, w), k, s = x.shape, self.kernel_size, self.up_factor
        kernels = F.pixel_shuffle(self.encoder(self.down(x)), s).softmax(dim=1)
        kernels = kernels.view(n, k * k, h, s, w, s).permute(0, 2, 4, 1, 3, 5).flatten(-2)
        padded = F.pad(x, [k // 2] * 4)
        windows = padded.unfold(2, k, 1).unfold(3, k, 1)  # n, c, h, w, k, k
        windows = windows.permute(0, 2, 3, 1, 4, 5).flatten(-2)
        out = (windows @ kernels).view(n, h, w, c, s, s)
        return self.out(out.permute(0, 3, 1, 4, 2, 5).reshape(n, c, h * s, w * s))


FORKS = pytest.mark.parametrize(
    ("fork", "ours", "arguments"),
    [
        (ForkBatchNorm, BatchNormCARAFE, {"c": 6}),
        (ForkBatchNorm, BatchNormCARAFE, {"c": 5, "k_enc": 1, "k_up": 3, "c_mid": 8, "scale": 3}),
        (ForkProjected, ProjectedCARAFE, {"c1": 8, "c2": 6}),
        (ForkProjected, ProjectedCARAFE, {"c1": 9, "c2": 9, "kernel_size": 5, "up_factor": 3}),
    ],
    ids=str,
)


def trained(module: nn.Module) -> nn.Module:
    """With parameters and statistics that are all different, and kernels far from uniform."""
    torch.manual_seed(0)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.2, 1.5).mul_(torch.randint(0, 2, tensor.shape) * 2 - 1)
    for bn in module.modules():
        if isinstance(bn, nn.BatchNorm2d):
            bn.running_var.abs_()
    return module


@FORKS
@pytest.mark.parametrize("training", [False, True])
def test_a_forks_state_dict_gives_its_numbers(fork, ours, arguments, training):
    theirs = trained(fork(**arguments)).double().train(training)
    module = ours(**arguments).double().train(training)
    module.load_state_dict(theirs.state_dict())
    channels = arguments.get("c", arguments.get("c1"))
    x = torch.randn(2, channels, 5, 7, dtype=torch.float64)
    expected = theirs(x)
    torch.testing.assert_close(module(x), expected)
    for name, tensor in theirs.state_dict().items():  # the statistics of the batch, too
        torch.testing.assert_close(module.state_dict()[name], tensor)
    expected.square().sum().backward()
    module(x).square().sum().backward()
    for (name, p), q in zip(theirs.named_parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)


@FORKS
def test_a_module_pickled_in_a_fork_runs_with_the_class_from_here(fork, ours, arguments):
    """As unpickling does it where the class of that name is ours."""
    theirs = trained(fork(**arguments)).eval()
    module = copy.deepcopy(theirs)
    module.__class__ = ours
    x = torch.randn(1, arguments.get("c", arguments.get("c1")), 4, 5)
    torch.testing.assert_close(module(x), theirs(x))
    torch.testing.assert_close(torch.jit.trace(module, x)(x), theirs(x))  # and is exported


@FORKS
def test_the_modules_of_forks_start_as_there(fork, ours, arguments):
    torch.manual_seed(0)
    theirs = fork(**arguments)
    torch.manual_seed(0)
    module = ours(**arguments)
    for (name, tensor), (key, own) in zip(
        theirs.state_dict().items(), module.state_dict().items(), strict=True
    ):
        assert name == key
        assert torch.equal(tensor, own)


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (BatchNormCARAFE, {"c": 0}, "c must be an integer of at least 1, got 0"),
        (BatchNormCARAFE, {"c": 4, "k_up": 4}, "k_up must be odd, got 4"),
        (BatchNormCARAFE, {"c": 4, "k_enc": 2}, "k_enc must be odd, got 2"),
        (BatchNormCARAFE, {"c": 4, "scale": 1.5}, "scale must be an integer"),
        (ProjectedCARAFE, {"c1": 3, "c2": 3}, "a quarter of c1 must be an integer of at least 1"),
        (ProjectedCARAFE, {"c1": 8, "c2": 8, "kernel_size": 2}, "kernel_size must be odd, got 2"),
        (ProjectedCARAFE, {"c1": 8, "c2": None}, "c2 must be an integer of at least 1, got None"),
    ],
)
def test_wrong_arguments_are_named(module, arguments, message):
    with pytest.raises(ValueError, match=message):
        module(**arguments)


# ------------------------------------------------------------------------- by name in a model YAML


@pytest.fixture(scope="module")
def tasks(ultralytics):
    """The module of Ultralytics whose names a YAML may use, with CARAFE among them."""
    from ultralytics.nn import tasks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "CARAFE", LazyCARAFEPack, raising=False)
        yield tasks


@pytest.fixture
def make_yaml(tasks, tmp_path):
    """Writes a model of Ultralytics' with CARAFE for nearest interpolation; returns its path."""

    def make(name: str, arguments: list) -> Path:
        model = tasks.yaml_model_load(name)
        for layer in model["head"]:
            if layer[2] == "nn.Upsample":
                layer[2:] = ["CARAFE", [*arguments]]
        path = tmp_path / f"{Path(name).stem}-carafe.yaml"
        tasks.YAML.save(path, model)
        return path

    return make


def packs_of(model: nn.Module) -> list[CARAFEPack]:
    return [module for module in model.modules() if isinstance(module, CARAFEPack)]


def boxes_of(output) -> torch.Tensor:
    """What a detection or segmentation model puts out, without the masks and what losses take."""
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output


def batch_of(size: int) -> dict[str, torch.Tensor]:
    """Two images with an object each, as the losses take them."""
    return {
        "img": torch.rand(2, 3, size, size),
        "batch_idx": torch.tensor([0.0, 1.0]),
        "cls": torch.tensor([[1.0], [5.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.6], [0.3, 0.4, 0.5, 0.5]]),
        "masks": torch.ones(2, size // 4, size // 4),
        "sem_masks": torch.zeros(2, size // 4, size // 4, dtype=torch.long),
    }


@pytest.mark.parametrize(
    ("name", "arguments", "kernel", "channels"),
    [
        ("yolo11n.yaml", [], 5, [256, 128]),
        ("yolo11n-seg.yaml", [2, 3], 3, [256, 128]),
        ("yolo26n.yaml", [2, 5, 4], 5, [256, 128]),
    ],
)
def test_by_name_in_a_yaml(name, arguments, kernel, channels, tasks, make_yaml, tmp_path):
    from ultralytics import YOLO
    from ultralytics.cfg import get_cfg

    yolo = YOLO(make_yaml(name, arguments))
    model = yolo.model
    packs = packs_of(model)
    assert [type(pack) for pack in packs] == [CARAFEPack] * 2
    assert [pack.channels for pack in packs] == channels
    assert {pack.up_kernel for pack in packs} == {kernel}

    # One step with the model's own loss moves every parameter of CARAFE's.
    model.args = get_cfg()
    before = copy.deepcopy(packs)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss, _ = model.train().loss(batch_of(64))
    loss.sum().backward()
    optimizer.step()
    for pack, former in zip(packs, before, strict=True):
        for p, q in zip(pack.parameters(), former.parameters(), strict=True):
            assert not torch.equal(p, q)

    def predict(model):
        return boxes_of(model.eval()(x))

    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = predict(model)
        assert torch.equal(predict(copy.deepcopy(model)), expected)
        yolo.ckpt = {}
        yolo.save(tmp_path / "model.pt")
        loaded = YOLO(tmp_path / "model.pt").model
        assert [type(pack) for pack in packs_of(loaded)] == [CARAFEPack] * 2
        torch.testing.assert_close(predict(loaded.float()), predict(model.half().float()))
        expected = predict(model)
        model.fuse(verbose=False)
        torch.testing.assert_close(predict(model), expected, rtol=1e-3, atol=1e-3)


def test_the_recipe_of_the_documentation(tasks, make_yaml, tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "operator.md").read_text()
    (recipe,) = re.findall(r"```python\n(from ultralytics[^`]*)```", page)
    assert sum(map(bool, recipe.splitlines())) <= 5
    make_yaml("yolo11n.yaml", [])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(tasks, "CARAFE")
    names = {}
    exec(recipe, names)
    assert len(packs_of(names["model"].model)) == 2


@pytest.mark.parametrize(
    ("name", "module", "arguments"),
    [
        ("rtdetr-l.yaml", CARAFEPack, ["c2", 2]),
        ("yolo11n.yaml", BatchNormCARAFE, ["c2"]),
        ("yolo11n.yaml", ProjectedCARAFE, ["c2", "c2"]),
    ],
)
def test_with_the_channels_from_the_layer_before(
    name, module, arguments, tasks, make_yaml, monkeypatch
):
    from ultralytics import RTDETR, YOLO

    monkeypatch.setattr(tasks, "CARAFE", module)
    model = (RTDETR if name.startswith("rtdetr") else YOLO)(make_yaml(name, arguments)).model
    assert sum(type(m) is module for m in model.modules()) == 2
    with torch.no_grad():
        model.eval()(torch.rand(1, 3, 64, 64))


@pytest.fixture
def data(tmp_path):
    """A dataset in YOLO's format: bright squares on dark images."""
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for i in range(4):
        image = rng.integers(0, 60, (64, 64, 3), dtype=np.uint8)
        image[16:48, 16:48] = 220
        cv2.imwrite(str(tmp_path / "data" / "images" / f"{i}.png"), image)
        square = "0 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75\n"
        (tmp_path / "data" / "labels" / f"{i}.txt").write_text(square)
    path = tmp_path / "data.yaml"
    path.write_text(f"path: {tmp_path / 'data'}\ntrain: images\nval: images\nnames: [square]\n")
    return path


@pytest.mark.slow
def test_ultralytics_trains_and_exports(make_yaml, data, tmp_path, monkeypatch):
    from ultralytics import YOLO

    monkeypatch.chdir(tmp_path)
    options = {"data": str(data), "epochs": 1, "imgsz": 64, "multi_scale": 0.5, "batch": 2}
    options |= {"device": "cpu", "workers": 0, "plots": False, "project": str(tmp_path / "runs")}
    YOLO(make_yaml("yolo11n-seg.yaml", [])).train(**options)
    best = YOLO(tmp_path / "runs" / "train" / "weights" / "best.pt")
    assert len(packs_of(best.model)) == 2
    script = torch.jit.load(best.export(format="torchscript", imgsz=64))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected, found = (module.eval()(x) for module in (best.model.float(), script))
    torch.testing.assert_close(boxes_of(found), boxes_of(expected), rtol=1e-3, atol=1e-3)
    best.train(**options)  # from the weights of that training
