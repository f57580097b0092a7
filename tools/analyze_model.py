#!/usr/bin/env python3
r"""Counts parameters, FLOPs and activations of a model, as Detectron2's tool of this name does.

Examples:
    python tools/analyze_model.py --config-file configs/mask_rcnn_R50_FPN_carafe_1x.yaml
    python tools/analyze_model.py --config-file configs/mask_rcnn_R50_FPN_carafe_1x.yaml \
        --tasks flop --num-inputs 100 MODEL.WEIGHTS model.pth

A multiply-add counts as one FLOP; activations are what convolutions, linear layers and CARAFE put
out. Heads run on as many boxes as are found, so that both depend on image and weights. With random
weights, without MODEL.WEIGHTS at the end of the command, all scores are low and their threshold is
0: as many boxes count as TEST.DETECTIONS_PER_IMAGE allows.
"""

import argparse
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.export import TracingAdapter
from detectron2.modeling import build_model
from detectron2.utils.analysis import FlopCountAnalysis, parameter_count_table
from fvcore.nn import ActivationCountAnalysis, flop_count_table
from torch import nn

from carafe_d2.config import find_config_file, is_inpainting, load_config
from carafe_d2.data.build import build_test_loader, check_datasets
from carafe_d2.diagnosis import named_mistakes
from carafe_d2.errors import UserError, exit_on_user_error
from carafe_d2.inference import Predictor, split_opts
from carafe_d2.ops import flop_count_ops

TASKS = ("flop", "activation", "parameter", "structure")
WITH_RANDOM_WEIGHTS = [
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
    *("MODEL.BACKBONE.PRETRAINED", "False"),  # would be a download
]


def names_weights(opts: Sequence[str]) -> bool:
    """Whether the command line does; those of a config file are what a training starts from."""
    return bool(dict(zip(opts[::2], opts[1::2], strict=False)).get("MODEL.WEIGHTS"))


def model_of(cfg: CfgNode, opts: Sequence[str]) -> nn.Module:
    """The model, with the weights that the command line names or random ones."""
    return Predictor(cfg).model if names_weights(opts) else build_model(cfg).eval()


def blank_image(cfg: CfgNode, height: int, width: int) -> list[dict]:
    """An empty image as a model's input; one for inpainting has a size of its own, and a hole."""
    if is_inpainting(cfg):
        height = width = cfg.MODEL.INPAINT.CROP_SIZE
    image = torch.zeros(len(cfg.MODEL.PIXEL_MEAN), height, width, dtype=torch.uint8)
    mask = {"mask": torch.ones(height, width, dtype=torch.bool)} if is_inpainting(cfg) else {}
    return [{"image": image, "height": height, "width": width, **mask}]


def dataset_images(cfg: CfgNode, count: int) -> Iterator[list[dict]]:
    """The first images of DATASETS.TEST, each as a model's input."""
    if not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty; --num-inputs takes its images from there")
    check_datasets(cfg.DATASETS.TEST[:1])
    return itertools.islice(build_test_loader(cfg, cfg.DATASETS.TEST[0]), count)


def analyses_of(
    model: nn.Module, inputs: list[dict]
) -> tuple[FlopCountAnalysis, ActivationCountAnalysis]:
    """FLOPs and activations of one image; each runs the model when it is first asked."""
    flops = FlopCountAnalysis(model, inputs)
    traced = TracingAdapter(model, inputs, allow_non_tensor=True)
    activations = ActivationCountAnalysis(traced, traced.flattened_inputs)
    activations.set_op_handle(**dict.fromkeys(flop_count_ops, carafe_activations))
    for analysis in (flops, activations):
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.tracer_warnings("none")
    return flops, activations


def carafe_activations(inputs: list, outputs: list) -> int:
    return math.prod(outputs[0].type().sizes())


def count(model: nn.Module, images: Iterable[list[dict]], tasks: Sequence[str], depth: int) -> None:
    """Prints a table of the first image, and for each task what the images need on average."""
    operators = {task: Counter[str]() for task in ("flop", "activation") if task in tasks}
    totals: dict[str, list[int]] = {task: [] for task in operators}
    for number, inputs in enumerate(images):
        analyses = dict(zip(("flop", "activation"), analyses_of(model, inputs), strict=True))
        if not number and "flop" in operators:
            activations = analyses["activation"] if "activation" in operators else None
            print(flop_count_table(analyses["flop"], depth, activations, show_param_shapes=False))
        for task in operators:
            operators[task].update(analyses[task].by_operator())
            totals[task].append(analyses[task].total())
    for task, unit, size in (("flop", "G", 1e9), ("activation", "M", 1e6)):
        if task not in operators:
            continue
        values = [total / size for total in totals[task]]
        spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        means = {name: n / size / len(values) for name, n in operators[task].most_common()}
        parts = ", ".join(f"{name} {mean:.2f}" for name, mean in means.items() if mean >= 0.005)
        print(f"{task}s: {statistics.mean(values):.2f}{spread} {unit} ({parts})")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=TASKS[:3],
        metavar="TASK",
        help=f"of {', '.join(TASKS)}; default: all but the last",
    )
    parser.add_argument(
        "-n",
        "--num-inputs",
        type=int,
        metavar="N",
        help="take the first N images of DATASETS.TEST in place of a blank one",
    )
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        default=(800, 1333),
        metavar=("HEIGHT", "WIDTH"),
        help="of the blank image, but for inpainting; default: %(default)s",
    )
    parser.add_argument(
        "--depth", type=int, default=2, help="of the modules in the tables; default: %(default)s"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    args = parser.parse_args(argv)
    args.tasks, args.opts = split_opts(args.tasks, args.opts)
    if unknown := set(args.tasks) - set(TASKS):
        raise UserError(f"--tasks must be among {', '.join(TASKS)}, got {', '.join(unknown)}")
    if args.num_inputs is not None and args.num_inputs < 1:
        raise UserError(f"--num-inputs must be at least 1, got {args.num_inputs}")
    if min(*args.size, args.depth) < 1:
        raise UserError("--size and --depth must be at least 1")
    return args


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if not names_weights(args.opts):
        args.opts = [*WITH_RANDOM_WEIGHTS, *args.opts]

    def attempt(cfg: CfgNode) -> None:
        analyses_of(model_of(cfg, args.opts), blank_image(cfg, 64, 64))[0].total()

    with named_mistakes(find_config_file(args.config_file), args.opts, attempt):
        run(args)


def run(args: argparse.Namespace) -> None:
    cfg = load_config(args.config_file, args.opts)
    if args.num_inputs:
        images: Iterable[list[dict]] = dataset_images(cfg, args.num_inputs)
    else:
        images = [blank_image(cfg, *args.size)]
    torch.manual_seed(0)  # for random weights: the same boxes in every run
    model = model_of(cfg, args.opts)
    if "structure" in args.tasks:
        print(model)
    if {"flop", "activation"} & set(args.tasks):
        count(model, images, args.tasks, args.depth)
    if "parameter" in args.tasks:
        if "flop" not in args.tasks:
            print(parameter_count_table(model, args.depth))
        print(f"parameters: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M")


if __name__ == "__main__":
    main()
