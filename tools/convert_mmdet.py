#!/usr/bin/env python3
"""Converts checkpoints between MMDetection and Detectron2, without loss in either direction.

Examples:
    python tools/convert_mmdet.py mask_rcnn_r50_fpn_carafe_1x_coco.pth carafe_d2.pth
    python tools/convert_mmdet.py output/model_final.pth carafe_mmdet.pth --dataset coco_2017_val
    python tools/convert_mmdet.py published_in_2019.pth for_mmdet_3.pth --to mmdet --layout 3.x

Detectron2's own checkpointer reads what is written for it. What only MMDetection has (class names
and other meta information, the counters of batch normalization, and the background's rows in 1.x)
is kept under the key "mmdet" of that file for the way back. Optimizers and the like are left out.
"""

import argparse
import os
from collections import OrderedDict
from collections.abc import Sequence

import torch
from detectron2.data import MetadataCatalog

from carafe_d2 import mmdet
from carafe_d2.checkpoint import check_is_state_dict, read_checkpoint
from carafe_d2.data.register import dataset_name
from carafe_d2.errors import UserError, exit_on_user_error


def detectron2_file(content: dict) -> dict:
    """What Detectron2's file contains, for the content of a file of MMDetection's."""
    state_dict = mmdet.find_state_dict(content)
    assert state_dict is not None
    converted = mmdet.to_detectron2(state_dict)
    if converted.unknown:
        raise UserError(f"Detectron2's models have no place for {mmdet.listed(converted.unknown)}")
    for difference in mmdet.differences(content, converted):
        print(f"Note: {difference}")
    weights, counters = converted.weights, {}
    if content.get("__author__") != "Detectron2":
        # FrozenBatchNorm, which most of Detectron2's models have, has no place for them.
        counters = {name: weights.pop(name) for name in [*weights] if mmdet.is_counter(name)}
    return {
        "model": weights,
        "__author__": content.get("__author__", "MMDetection"),
        "matching_heuristics": False,
        "mmdet": {
            "layout": converted.layout,
            "meta": plain(content.get("meta", {})),
            "background": converted.background,
            "counters": counters,
        },
    }


def mmdet_file(content: dict, layout: str | None, classes: tuple[str, ...] | None) -> dict:
    """What MMDetection's file contains, for the content of a file of Detectron2's.

    Args:
        content: the content of Detectron2's file.
        layout: one of ``mmdet.LAYOUTS``; default is the one that the weights come from, else 2.x.
        classes: names of the classes by label; default are those that the file names.
    """
    weights, origin = content.get("model", content), content.get("mmdet", {})
    check_is_state_dict("the input", weights)
    found = mmdet.num_classes(weights)
    if classes and found != len(classes):
        raise UserError(f"the dataset has {len(classes)} classes, the checkpoint {found}")
    layout = layout or origin.get("layout", "2.x")
    # Weights from elsewhere have no rows for the background, which 1.x wants.
    background = origin.get("background") if origin.get("layout") == "1.x" else None
    state_dict = mmdet.to_mmdet({**weights, **origin.get("counters", {})}, layout, background)
    meta = {**origin.get("meta", {}), **({"CLASSES": classes} if classes else {})}
    author = {} if content.get("__author__") == "MMDetection" else {"__author__": "Detectron2"}
    return {"meta": meta, "state_dict": OrderedDict(state_dict), **author}


def plain(value):
    """Meta information as far as reading it needs no code; None for the rest of it."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    return value if isinstance(value, str | int | float | bool) else None


def class_names(dataset: str) -> tuple[str, ...]:
    """The names of a registered dataset's classes, by label."""
    dataset = dataset_name(dataset)
    if dataset not in MetadataCatalog.list():
        raise UserError(f"dataset {dataset!r} is not registered")
    classes = MetadataCatalog.get(dataset).get("thing_classes")
    if not classes:
        raise UserError(f"dataset {dataset!r} has no names of classes in its metadata")
    return tuple(classes)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", help="a .pth file of either, or its address")
    parser.add_argument("output", help="the .pth file to write")
    parser.add_argument("--to", choices=["detectron2", "mmdet"], help="default: the other one")
    parser.add_argument(
        "--layout",
        choices=["1.x", "2.x", "3.x"],
        help="the MMDetection to write for; default: the one it comes from, else 2.x; those of "
        "2.x and 3.x are the same",
    )
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        help="take the class names for MMDetection from this dataset; "
        "NAME=ANNOTATIONS.json:IMAGES/ is one of your own",
    )
    return parser.parse_args(argv)


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if os.path.abspath(args.input) == os.path.abspath(args.output):
        raise UserError(f"{args.output} is the input; name another output")
    content = read_checkpoint(args.input)
    if not isinstance(content, dict):
        raise UserError(f"{args.input} is no checkpoint: it holds a {type(content).__name__}")
    is_mmdet = mmdet.find_state_dict(content) is not None
    to = args.to or ("detectron2" if is_mmdet else "mmdet")
    if not is_mmdet and to == "detectron2":
        raise UserError(f"{args.input} is no checkpoint of MMDetection's")
    if to == "detectron2" and (args.layout or args.dataset):
        raise UserError("--layout and --dataset are for writing MMDetection's checkpoints")

    left_out = mmdet.beside_weights(content)
    if is_mmdet:
        content = detectron2_file(content)
    if to == "mmdet":
        layout = "2.x" if args.layout == "3.x" else args.layout
        content = mmdet_file(content, layout, args.dataset and class_names(args.dataset))
    try:
        os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
        torch.save(content, args.output)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {args.output}: {error}") from error
    weights = content["model"] if to == "detectron2" else content["state_dict"]
    print(f"{len(weights)} weights written to {args.output}")
    if left_out:
        print(f"Left out: {', '.join(left_out)}")


if __name__ == "__main__":
    main()
