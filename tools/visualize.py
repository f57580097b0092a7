#!/usr/bin/env python3
r"""Draws a model's predictions beside the ground truth of a dataset, as one PNG.

Example:
    python tools/visualize.py --config-file configs/shapes_mask_rcnn_R18_FPN_carafe.yaml \
        --output predictions.png MODEL.WEIGHTS output/model_final.pth
"""

import argparse
import os
from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer

from carafe_d2.config import load_config
from carafe_d2.data.build import check_datasets
from carafe_d2.data.register import dataset_name
from carafe_d2.errors import UserError, exit_on_user_error
from carafe_d2.inference import (
    Inpainting,
    Predictor,
    contact_sheet,
    draw_prediction,
    named_mistakes,
    read_image,
    save_image,
)


def titled(image: np.ndarray, title: str) -> np.ndarray:
    """Puts a line of text above an RGB image."""
    bar = np.full((28, image.shape[1], 3), 255, np.uint8)
    cv2.putText(bar, title, (6, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([bar, image])


def draw_pair(predictor: Predictor, record: dict, threshold: float, width: int) -> np.ndarray:
    """Draws one image of a dataset twice, with ground truth and with predictions.

    Args:
        record: the image's entry in Detectron2's dataset format.
        threshold: the lowest score that is drawn, of instances.
        width: width in pixels of each of the two pictures.

    Returns:
        RGB image (height, 2 * width + 8, 3), uint8; of an inpainting model three pictures wide.
    """
    image = read_image(record["file_name"])
    (prediction,) = predictor([image])
    if isinstance(prediction, Inpainting):
        title = f"hole, filled, truth: {os.path.basename(record['file_name'])}"
        return titled(prediction.picture(width), title)
    title = "predictions"
    if isinstance(prediction, Instances):
        prediction = prediction[prediction.scores >= threshold]
        title += f", score >= {threshold}"

    metadata, scale = predictor.metadata, width / image.shape[1]
    truth = Visualizer(image, metadata, scale=scale).draw_dataset_dict(record)
    predicted = draw_prediction(Visualizer(image, metadata, scale=scale), prediction)
    left = titled(truth.get_image(), f"ground truth: {os.path.basename(record['file_name'])}")
    right = titled(predicted.get_image(), title)
    return np.concatenate([left, np.full((len(left), 8, 3), 255, np.uint8), right], axis=1)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--output", default="predictions.png", help="the PNG to write")
    parser.add_argument(
        "--dataset",
        help="a registered dataset, or one of your own, NAME=ANNOTATIONS.json:IMAGES/; default: "
        "the config's test set",
    )
    parser.add_argument("--images", type=int, default=8, help="how many images of it to draw")
    parser.add_argument("--columns", type=int, default=2, help="pairs side by side")
    parser.add_argument("--width", type=int, default=384, help="width of one picture in pixels")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score drawn")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    args = parser.parse_args(argv)
    for name in ("images", "columns", "width"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with named_mistakes(args.config_file, args.opts):
        run(args)


def run(args: argparse.Namespace) -> None:
    cfg = load_config(args.config_file, args.opts)
    if not (args.dataset or cfg.DATASETS.TEST):
        raise UserError("DATASETS.TEST is empty; name a dataset with --dataset")
    dataset = dataset_name(args.dataset or cfg.DATASETS.TEST[0])
    check_datasets([dataset])

    records = DatasetCatalog.get(dataset)[: args.images]
    predictor = Predictor(cfg, MetadataCatalog.get(dataset))
    pairs = [draw_pair(predictor, record, args.threshold, args.width) for record in records]

    save_image(args.output, contact_sheet(pairs, args.columns))
    print(f"{len(pairs)} images drawn to {args.output}")


if __name__ == "__main__":
    main()
