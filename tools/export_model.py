#!/usr/bin/env python3
r"""Exports a trained detector for other runtimes: ONNX, AOTInductor, torch.export, TorchScript.

Example:
    python tools/export_model.py --config-file configs/shapes_mask_rcnn_R18_FPN_carafe.yaml \
        --format onnx --output output/export --run-eval MODEL.WEIGHTS output/model_final.pth
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.evaluation import inference_on_dataset
from torch import nn

from carafe_d2 import export
from carafe_d2.config import load_config
from carafe_d2.data.build import build_test_loader, check_datasets
from carafe_d2.errors import UserError, exit_on_user_error
from carafe_d2.evaluation import build_evaluator, check_evaluators
from carafe_d2.files import format_table, write_file
from carafe_d2.inference import Predictor, named_mistakes, read_image
from carafe_d2.onnx import to_onnx

FILES = {
    "onnx": "model.onnx",
    "aotinductor": "model.pt2",
    "torch_export": "program.pt2",
    "torchscript": "model.ts",
}


def sample_image(cfg: CfgNode, predictor: Predictor, file: Path | None) -> torch.Tensor:
    """The image to trace with, (3, H, W): of a file, else the first of DATASETS.TEST.

    Raises:
        UserError: there is none.
    """
    if file:
        image = torch.from_numpy(predictor.resize(read_image(file)).transpose(2, 0, 1).copy())
    elif cfg.DATASETS.TEST:
        check_datasets(cfg.DATASETS.TEST[:1])
        image = next(iter(build_test_loader(cfg, cfg.DATASETS.TEST[0])))[0]["image"]
    else:
        raise UserError("DATASETS.TEST is empty; give an image to trace with by --sample-image")
    return image.to(predictor.model.device, torch.float32)


def export_model(cfg: CfgNode, predictor: Predictor, args: argparse.Namespace) -> export.Run:
    """Writes the model in the format asked for; returns what runs it."""
    path, model = args.output / FILES[args.format], predictor.model
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {args.output}: {error.strerror}") from error
    if args.format == "torchscript":
        traced, run = export.trace(model, sample_image(cfg, predictor, args.sample_image))
        traced.save(str(path))
        return run
    program = export.export_program(model)
    if args.format == "onnx":
        write_file(path, to_onnx(program, args.inline).SerializeToString())
        return export.run_onnx(path)
    if args.format == "aotinductor":
        export.save_package(program, path)
        return export.run_package(path)
    torch.export.save(program, path)
    return torch.export.load(path).module()


def compare(cfg: CfgNode, model: nn.Module, exported: nn.Module, args: argparse.Namespace) -> str:
    """Evaluates the model and what was exported on DATASETS.TEST; returns a table."""
    rows = []
    for name in cfg.DATASETS.TEST:
        results = []
        for label, detector in (("PyTorch", model), (args.format, exported)):
            evaluator = build_evaluator(name, str(args.output / f"inference_{label}"), cfg)
            loader = build_test_loader(cfg, name)
            results.append(inference_on_dataset(detector, loader, evaluator))
        for task, metrics in results[0].items():
            metric = next(iter(metrics))  # AP, mIoU or PQ
            values = (f"{result[task][metric]:.2f}" for result in results)
            rows.append([name, f"{task} {metric}", *values])
    return format_table(["dataset", "metric", "PyTorch", args.format], rows, text_columns=2)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--format", default="onnx", help=f"{', '.join(FILES)}; default: onnx")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output/export"),
        metavar="FOLDER",
        help=f"where {', '.join(FILES.values())} is written; default: %(default)s",
    )
    parser.add_argument(
        "--inline",
        action="store_true",
        help="ONNX with standard operators only, without functions of the domain carafe_d2",
    )
    parser.add_argument(
        "--sample-image",
        type=Path,
        metavar="FILE",
        help="what to trace with, for torchscript; default: the first image of DATASETS.TEST",
    )
    parser.add_argument(
        "--run-eval",
        action="store_true",
        help="evaluate the model and what was exported on DATASETS.TEST",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    args = parser.parse_args(argv)
    if args.format not in FILES:
        raise UserError(f"--format must be one of {', '.join(FILES)}, got {args.format!r}")
    if args.inline and args.format != "onnx":
        raise UserError("--inline goes with --format onnx only")
    if args.sample_image and args.format != "torchscript":
        raise UserError("--sample-image goes with --format torchscript only")
    return args


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with named_mistakes(args.config_file, args.opts):
        run(args)


def run(args: argparse.Namespace) -> None:
    cfg = load_config(args.config_file, args.opts)
    if args.run_eval:  # which fails before minutes of exporting
        if not cfg.DATASETS.TEST:
            raise UserError("--run-eval: DATASETS.TEST is empty")
        check_datasets(cfg.DATASETS.TEST)
        check_evaluators(cfg.DATASETS.TEST)
    predictor = Predictor(cfg)
    if args.format == "onnx":
        predictor.model.to("cpu")
    exported = export_model(cfg, predictor, args)
    print(f"written to {args.output / FILES[args.format]}")
    if args.run_eval:
        exported_detector = export.ExportedDetector(exported, predictor.model)
        print(compare(cfg, predictor.model, exported_detector, args))


if __name__ == "__main__":
    main()
