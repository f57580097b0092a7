"""The LazyConfigs of configs/lazy are the models and recipes of the YAML files of their names."""

import math
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.solver import LRMultiplier, build_lr_scheduler
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig, ListConfig
from torch import nn

from carafe_d2.config import load_config
from carafe_d2.data import register_shapes
from carafe_d2.data.build import CarafeDatasetMapper
from carafe_d2.errors import UserError
from carafe_d2.lazy_config import data_expectations, load_lazy_config
from carafe_d2.solver import build_optimizer
from tools import lazyconfig_train_net

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(path.stem for path in (CONFIGS / "lazy").glob("*.py"))
SHAPES = str(CONFIGS / "lazy" / "shapes_mask_rcnn_R18_FPN_carafe.py")


class Pair:
    """What the YAML and the LazyConfig of one name describe."""

    def __init__(self, name):
        self.cfg = load_config(str(CONFIGS / f"{name}.yaml"), ["MODEL.DEVICE", "cpu"])
        self.lazy_cfg = load_lazy_config(str(CONFIGS / "lazy" / f"{name}.py"))
        self.model = build_model(self.cfg)
        self.lazy_model = instantiate(self.lazy_cfg.model)


@pytest.fixture(scope="module", params=NAMES)
def pair(request):
    return Pair(request.param)


def plain(value):
    """Reduces what an object was built with to numbers, strings, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, nn.Module):
        return type(value).__name__  # compared by itself
    if isinstance(value, dict | DictConfig):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | ListConfig):
        return [plain(v) for v in value]
    if hasattr(value, "__qualname__"):
        return value.__qualname__
    if hasattr(value, "__dict__"):
        return type(value).__name__, plain(vars(value))
    return value


def attributes(module):
    """What tells a module from others of its class: its own attributes, parameters aside."""
    ignored = vars(nn.Module()).keys()
    found = {k: plain(v) for k, v in vars(module).items() if k not in ignored}
    if isinstance(module, FastRCNNOutputLayers):  # a weight that is not there counts as one
        found["loss_weight"] = {"loss_cls": 1.0, **found["loss_weight"]}
    return found


def test_networks_have_the_same_modules(pair):
    modules, lazy_modules = (dict(m.named_modules()) for m in (pair.model, pair.lazy_model))
    assert modules.keys() == lazy_modules.keys()
    for name, module in modules.items():
        assert type(module) is type(lazy_modules[name]), name
        assert attributes(module) == attributes(lazy_modules[name]), name


def test_networks_have_the_same_weights(pair):
    weights, lazy_weights = pair.model.state_dict(), pair.lazy_model.state_dict()
    assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in lazy_weights.items()}
    trained, lazy_trained = (
        [name for name, p in m.named_parameters() if p.requires_grad]
        for m in (pair.model, pair.lazy_model)
    )
    assert trained == lazy_trained


def inputs():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 64, 96), generator=generator, dtype=torch.uint8)
    instances = Instances((64, 96))
    instances.gt_boxes = Boxes(torch.tensor([[10.0, 8.0, 70.0, 60.0]]))
    instances.gt_classes = torch.tensor([1])
    instances.gt_masks = BitMasks(torch.rand(1, 64, 96, generator=generator) < 0.7)
    return [{"image": image, "height": 128, "width": 192, "instances": instances}]


def losses_and_predictions(model):
    """What a model makes of a fixed image, in training with a fixed seed and in inference."""
    # What a random network finds, and of that only a little.
    model.proposal_generator.post_nms_topk = {True: 40, False: 40}
    model.roi_heads.box_predictor.test_score_thresh = 0.0
    model.roi_heads.box_predictor.test_topk_per_image = 5
    model.train()
    torch.manual_seed(0)
    with EventStorage(), torch.no_grad():
        losses = model(inputs())
    model.eval()
    with torch.no_grad():
        (predictions,) = model(inputs())
    return losses, predictions["instances"].get_fields()


def test_networks_compute_the_same(pair):
    weights = pair.model.state_dict()
    for name, weight in weights.items():
        if name.startswith("backbone.bottom_up") and name.endswith("norm.weight"):
            weight.fill_(0.3)  # keeps the signal of a random network with frozen statistics finite
    pair.lazy_model.load_state_dict(weights)
    losses, predictions = losses_and_predictions(pair.model)
    lazy_losses, lazy_predictions = losses_and_predictions(pair.lazy_model)
    assert losses == lazy_losses
    assert all(math.isfinite(loss) for loss in losses.values())
    assert predictions.keys() == lazy_predictions.keys()
    for name, prediction in predictions.items():
        lazy_prediction = lazy_predictions[name]
        if name == "pred_boxes":
            prediction, lazy_prediction = prediction.tensor, lazy_prediction.tensor
        assert len(prediction) and torch.equal(prediction, lazy_prediction), name


def test_optimizers_take_the_same_step(pair):
    pair.lazy_model.load_state_dict(pair.model.state_dict())
    pair.lazy_cfg.optimizer.params.model = pair.lazy_model
    optimizers = [build_optimizer(pair.cfg, pair.model), instantiate(pair.lazy_cfg.optimizer)]
    described = []
    for optimizer, model in zip(optimizers, (pair.model, pair.lazy_model), strict=True):
        names = {parameter: name for name, parameter in model.named_parameters()}
        for parameter in names:
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        described.append(
            [
                # Detectron2's main branch turns foreach on, which is PyTorch's business.
                {**group, "foreach": None, "params": [names[p] for p in group["params"]]}
                for group in optimizer.param_groups
            ]
        )
        optimizer.step()
    assert isinstance(optimizers[0], type(optimizers[1]))
    assert described[0] == described[1]
    weights = pair.model.state_dict()
    for name, weight in pair.lazy_model.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_learning_rates_are_the_same(pair):
    max_iter = pair.lazy_cfg.train.max_iter
    assert max_iter == pair.cfg.SOLVER.MAX_ITER
    optimizer, lazy_optimizer = (
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0) for _ in range(2)
    )
    scheduler = build_lr_scheduler(pair.cfg, optimizer)
    lazy_multiplier = instantiate(pair.lazy_cfg.lr_multiplier)
    lazy_scheduler = LRMultiplier(lazy_optimizer, lazy_multiplier, max_iter)
    warmup, steps = pair.cfg.SOLVER.WARMUP_ITERS, pair.cfg.SOLVER.STEPS
    edges = [i + d for i in (warmup, *steps) for d in (-1, 0, 1)]
    for iteration in [0, 1, warmup // 2, *edges, max_iter // 2, max_iter - 1]:
        scheduler.last_epoch = lazy_scheduler.last_epoch = iteration
        assert scheduler.get_lr() == lazy_scheduler.get_lr(), iteration


def test_data_and_run_are_the_same(pair):
    cfg, lazy = pair.cfg, pair.lazy_cfg
    for is_train, loader in ((True, lazy.dataloader.train), (False, lazy.dataloader.test)):
        mapper = CarafeDatasetMapper(cfg, is_train)
        lazy_mapper = instantiate(loader.mapper)
        if not is_train:  # masks of images that are tested are dropped anyhow
            mapper.use_instance_mask = lazy_mapper.use_instance_mask = False
            mapper.instance_mask_format = lazy_mapper.instance_mask_format
        assert plain(vars(lazy_mapper)) == plain(vars(mapper))
        assert loader.num_workers == cfg.DATALOADER.NUM_WORKERS
    assert (lazy.dataloader.train.dataset.names,) == tuple(cfg.DATASETS.TRAIN)
    assert (lazy.dataloader.test.dataset.names,) == tuple(cfg.DATASETS.TEST)
    assert lazy.dataloader.evaluator.dataset_name == lazy.dataloader.test.dataset.names
    assert lazy.dataloader.evaluator.output_dir == f"{lazy.train.output_dir}/inference"
    assert lazy.dataloader.train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert lazy.dataloader.train.seed == lazy.train.seed == cfg.SEED
    assert lazy.train.init_checkpoint == cfg.MODEL.WEIGHTS
    assert lazy.train.channels_last == cfg.MODEL.CHANNELS_LAST
    assert lazy.train.cudnn_benchmark == cfg.CUDNN_BENCHMARK
    assert lazy.train.amp.enabled == cfg.SOLVER.AMP.ENABLED
    assert lazy.train.checkpointer.period == cfg.SOLVER.CHECKPOINT_PERIOD
    assert lazy.train.eval_period == cfg.TEST.EVAL_PERIOD
    assert Path(lazy.train.output_dir).name == Path(cfg.OUTPUT_DIR).name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_device_is_the_cpu():
    cfg = load_lazy_config(SHAPES, ["train.amp.enabled=true"])
    assert (cfg.train.device, cfg.train.amp.enabled) == ("cpu", False)


def test_overrides():
    cfg = load_lazy_config(
        SHAPES,
        [
            *("train.max_iter=7", "train.ddp.static_graph=true", "optimizer.betas=[0.8,0.9]"),
            *("model.backbone.upsampler.up_kernel=3", "model.roi_heads.mask_head.conv_norm=GN"),
        ],
    )
    assert cfg.train.max_iter == 7
    model = instantiate(cfg.model)
    assert model.backbone.fpn_upsample2.up_kernel == 3
    assert isinstance(model.roi_heads.mask_head.mask_fcn1.norm, nn.GroupNorm)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_iter", r"'train\.max_iter' is not of the form path\.to\.key=value"),
        ("train.max_iter.x=1", r"'train\.max_iter\.x=1' is not of the form .* no such path"),
        ("train.max_iters=1", r"no key 'train\.max_iters'"),
        ("modle.num_classes=1", r"no key 'modle\.num_classes'"),
        ("train.max_iter=many", r"train\.max_iter must be a number like 650, got 'many'"),
        ("model.backbone.uper=1", r"model\.backbone: CarafeFPN has no argument 'uper'"),
        ("optimizer.nesterov=true", r"optimizer: AdamW has no argument 'nesterov'"),
    ],
)
def test_wrong_overrides_are_named(override, message):
    with pytest.raises(UserError, match=message):
        load_lazy_config(SHAPES, [override])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.py", None, r"'.*absent\.py' does not exist.*--config-file"),
        ("config.txt", "", r"config\.txt.* python or yaml file"),
        ("config.py", "model = ", r"config\.py"),
        ("config.py", "train = dict(max_iter=1)", r"config\.py lacks 'model'"),
        ("config.yaml", "MODEL:\n  MASK_ON: True", r"config\.yaml lacks 'model'"),
    ],
)
def test_wrong_files_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_lazy_config(str(tmp_path / name))


def test_evaluation_needs_no_training_keys(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(
        "model = dict(x=1)\ndataloader = dict(test=dict(x=1))\n"
        "train = dict(output_dir='', init_checkpoint='', device='cpu')\n"
    )
    assert load_lazy_config(str(file), eval_only=True).model.x == 1
    with pytest.raises(UserError, match=r"lacks 'dataloader\.train'"):
        load_lazy_config(str(file))


def test_data_are_held_to_the_config(make_shapes, monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(make_shapes(train=4, val=2)))
    register_shapes()
    shapes = ["--config-file", SHAPES]
    output = f"train.output_dir={tmp_path}"
    parse = default_argument_parser().parse_args
    try:
        cfg = lazyconfig_train_net.setup(parse([*shapes, output]))
        expected = data_expectations(cfg)
        assert expected.DATASETS.TRAIN == ("shapes_train",)
        assert expected.MODEL.MASK_ON and expected.INPUT.MASK_FORMAT == "bitmask"
        with pytest.raises(UserError, match=r"there are 6; set MODEL.ROI_HEADS.NUM_CLASSES"):
            lazyconfig_train_net.setup(parse([*shapes, output, "model.roi_heads.num_classes=5"]))
    finally:
        monkeypatch.undo()
        register_shapes()
