"""Whole detectors: images a second with random weights, CARAFE beside the baselines."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from detectron2.solver import build_optimizer
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import nn

from ..config import load_config
from ..errors import UserError
from ..export import (
    ExportedDetector,
    Run,
    export_program,
    run_onnx,
    run_package,
    save_package,
)
from ..onnx import require_packages, to_onnx
from .measure import Clock, Measurement, count_flops, interleave, warm_up
from .upsampling import LAYOUTS

CONFIGS = Path(__file__).parents[2] / "configs"
DEFAULT_CONFIGS = [
    "mask_rcnn_R50_FPN_1x",
    "mask_rcnn_R50_FPN_carafe_1x",
    "faster_rcnn_R50_FPN_1x",
    "faster_rcnn_R50_FPN_carafe_1x",
]
INFERENCE, TRAINING = MODES = ("inference", "training")
SEED = 0
OBJECTS = 8  # in the image that a detector is trained on
LOGIT_SPREAD = 3.0  # standard deviation of the classification logits
# Random proposals rarely fit an object. Those that merely touch one count as foreground, so that
# every model trains its mask head on as many RoIs as its config allows.
FOREGROUND_IOU = 1e-6


@dataclass(frozen=True)
class Result(Measurement):
    """One detector in one mode, with the times of an image.

    A row without a time says in `skipped` why there is none.
    """

    config: str  # of an exported detector, then a comma and the runtime
    mode: str
    baseline: str | None  # the config without CARAFE; of an exported detector, itself in PyTorch
    skipped: str | None = None
    images_per_second: float | None = None
    speed: float | None = None  # images a second relative to the baseline's
    gflops: float | None = None  # 1e9 operations for an image
    objects: int | None = None  # detections of inference; foreground RoIs of a training iteration

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def config_path(name: str) -> Path:
    """A YAML file, given as such or by its name in configs/."""
    path = Path(name) if name.endswith(".yaml") else CONFIGS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in CONFIGS.glob("*_1x*.yaml")))
        raise UserError(f"--detector: expected a YAML file or one of {known}, got {name!r}")
    return path


def baseline_of(config: str) -> str:
    """The config without CARAFE, by its name."""
    return re.sub(r"_carafe|(?<=_1x)_\w+$", "", config)


class Detector:
    """A model of a config with random weights, and one image.

    Args:
        cfg: a Detectron2 config.
        size: height and width of the image in pixels.
        layout: contiguous or channels_last.
    """

    def __init__(self, cfg: CfgNode, size: tuple[int, int], layout: str):
        self._cfg = cfg
        torch.manual_seed(SEED)
        self.model = build_model(cfg).to(memory_format=LAYOUTS[layout])
        height, width = size
        generator = torch.Generator().manual_seed(SEED)
        image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
        self._image = {"image": image, "height": height, "width": width}
        self._target = {**self._image, "instances": random_instances(cfg, size)}
        steady_residuals(self.model)
        self.objects: int | None = None
        spread_scores(self.model, self.infer)

    @torch.no_grad()
    def infer(self) -> None:
        """Detects objects in the image."""
        self.model.eval()
        self.objects = len(self.model([self._image])[0]["instances"])

    def infer_in(self, runtime: str) -> Callable[[], None]:
        """What detects objects in the image in one of RUNTIMES.

        Raises:
            UserError: it is not installed, or the model cannot be exported to it.
        """
        with TemporaryDirectory() as folder:
            run = RUNTIMES[runtime](self.model, Path(folder))
        exported = ExportedDetector(run, self.model)

        def infer() -> None:
            self.objects = len(exported([self._image])[0]["instances"])

        return infer

    def trainer(self) -> Callable[[], None]:
        """A training iteration that leaves the weights as they are: its learning rate is zero."""
        cfg = self._cfg.clone()
        cfg.defrost()
        cfg.SOLVER.BASE_LR = 0.0
        optimizer = build_optimizer(cfg, self.model)

        def iteration() -> None:
            self.model.train()
            torch.manual_seed(SEED)  # the same proposals are sampled in every iteration
            with EventStorage() as storage:
                losses = self.model([self._target])
            foreground, _ = storage.latest().get("roi_head/num_fg_samples", (None, 0))
            self.objects = None if foreground is None else round(foreground)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()

        return iteration


def random_instances(cfg: CfgNode, size: tuple[int, int]) -> Instances:
    """Ground truth: elliptic objects of a sixth to a half of the image's size."""
    generator = torch.Generator().manual_seed(SEED)
    extent = torch.tensor([size[1], size[0]])
    radii = extent * (1 / 12 + torch.rand(OBJECTS, 2, generator=generator) / 6)
    centers = radii + (extent - 2 * radii) * torch.rand(OBJECTS, 2, generator=generator)
    angles = torch.linspace(0, 2 * math.pi, 33)[:-1]
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    polygons = [
        [(center + radius * circle).flatten().double().numpy()]
        for center, radius in zip(centers, radii, strict=True)
    ]
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.cat([centers - radii, centers + radii], dim=1))
    instances.gt_classes = torch.arange(OBJECTS) % cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if cfg.MODEL.MASK_ON:
        bitmask = cfg.INPUT.MASK_FORMAT == "bitmask"
        instances.gt_masks = (
            BitMasks.from_polygon_masks(polygons, *size) if bitmask else PolygonMasks(polygons)
        )
    return instances


def steady_residuals(model: nn.Module) -> None:
    """Keeps activations finite, which random weights do not under frozen batch normalization.

    Every residual block would double their variance; with a small scale in its last normalization
    it hardly changes it.
    """
    for block in model.modules():
        if isinstance(block, (BasicBlock, BottleneckBlock)):
            last = block.conv3 if isinstance(block, BottleneckBlock) else block.conv2
            nn.init.constant_(last.norm.weight, 0.2)


def spread_scores(model: nn.Module, infer: Callable[[], object]) -> None:
    """Sets the classifiers' weights so that some scores lie above the threshold, most below it.

    Freshly initialized ones give all classes the same low score, so nothing is detected and the
    mask head has nothing to do.
    """
    outputs: dict[nn.Linear | nn.Conv2d, torch.Tensor] = {}

    def record(classifier, _, logits: torch.Tensor) -> None:
        outputs.setdefault(classifier, logits.transpose(0, 1).flatten(1))  # (classes, samples)

    classifiers = [module for name, module in model.named_modules() if name.endswith("cls_score")]
    hooks = [module.register_forward_hook(record) for module in classifiers]
    infer()
    for hook in hooks:
        hook.remove()
    for classifier, logits in outputs.items():
        mean = logits.mean(dim=1)
        factor = LOGIT_SPREAD / (logits - mean[:, None]).std()
        with torch.no_grad():
            bias = classifier.get_parameter("bias")
            bias.sub_(factor * (mean - bias))
            classifier.weight.mul_(factor)


def _in_onnxruntime(model: nn.Module, folder: Path) -> Run:
    require_packages("onnx", "onnxscript", "onnxruntime")
    if (device := next(model.parameters()).device).type != "cpu":
        raise UserError(f"ONNX Runtime is measured on the CPU only, not on {device}")
    path = folder / "model.onnx"
    path.write_bytes(to_onnx(export_program(model)).SerializeToString())
    return run_onnx(path)


def _in_aotinductor(model: nn.Module, folder: Path) -> Run:
    path = folder / "model.pt2"
    save_package(export_program(model), path)
    return run_package(path)


# What exported detectors run in.
RUNTIMES = {"onnxruntime": _in_onnxruntime, "aotinductor": _in_aotinductor}


class Benchmark:
    """Measures detectors one beside the other.

    Args:
        names: see :func:`config_path`.
        size: height and width of the image in pixels.
        layout: contiguous or channels_last.
        device: where.
        runtimes: some of RUNTIMES, for inference beside PyTorch's.

    Raises:
        UserError: a config is unknown or wrong.
    """

    def __init__(
        self,
        names: Sequence[str],
        size: tuple[int, int],
        layout: str,
        device: torch.device,
        runtimes: Sequence[str] = (),
    ):
        overrides = [
            *("MODEL.WEIGHTS", "", "MODEL.DEVICE", str(device)),
            *("MODEL.ROI_HEADS.IOU_THRESHOLDS", str([FOREGROUND_IOU])),
        ]
        configs = {path.stem: load_config(str(path), overrides) for path in map(config_path, names)}
        self._detectors = {name: Detector(cfg, size, layout) for name, cfg in configs.items()}
        self._runtimes = runtimes
        # The host's work between launches and synchronizations is part of a detector's time.
        self._clock = Clock(device, hide_host=False)

    def run(self, mode: str, seconds: float) -> Iterator[Result]:
        """Measures all detectors in one of MODES, `seconds` each."""
        functions: dict[str, Callable[[], None]] = {}
        flops: dict[str, int] = {}
        baselines: dict[str, str] = {}
        skipped: dict[str, str] = {}
        objects: dict[str, int | None] = {}
        for config, detector in self._detectors.items():
            functions[config] = detector.infer if mode == INFERENCE else detector.trainer()
            flops[config] = count_flops(functions[config])
            baselines[config] = baseline_of(config)
            objects[config] = detector.objects
            for runtime in self._runtimes if mode == INFERENCE else ():
                name = f"{config}, {runtime}"
                baselines[name] = config
                try:
                    functions[name] = detector.infer_in(runtime)
                    functions[name]()
                except UserError as error:
                    skipped[name] = str(error)
                objects[name] = detector.objects
        estimates = {name: warm_up(function, self._clock) for name, function in functions.items()}
        timings = interleave(functions, estimates, self._clock, seconds)
        for name, baseline in baselines.items():
            row = partial(Result, name, mode, baseline if baseline in timings else None)
            if name in skipped:
                yield row(skipped=skipped[name])
                continue
            timing = timings[name]
            yield row(
                images_per_second=1 / timing.seconds,
                speed=timings[baseline].seconds / timing.seconds if baseline in timings else None,
                gflops=flops[name] / 1e9 if name in flops else None,
                objects=objects[name],
                **timing.as_dict(),
            )
