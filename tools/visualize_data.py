#!/usr/bin/env python3
r"""Draws a dataset as the training sees it, for a look before the training starts.

Example:
    python tools/visualize_data.py --config-file configs/shapes_mask_rcnn_R18_FPN_carafe.yaml \
        --images 8 --output data.png

With --augmented the images are those that the data loader makes: resized, flipped, cropped.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.utils.visualizer import Visualizer

from carafe_d2.config import find_config_file, load_config
from carafe_d2.data.build import build_train_loader, check_datasets
from carafe_d2.data.checks import check_data
from carafe_d2.diagnosis import named_mistakes
from carafe_d2.errors import UserError, exit_on_user_error
from carafe_d2.inference import contact_sheet, read_image, save_image


def annotated(dataset: str, metadata: Metadata) -> Iterator[np.ndarray]:
    """The images of a dataset with their annotations, RGB, (H, W, 3), uint8."""
    for record in DatasetCatalog.get(dataset):
        visualizer = Visualizer(read_image(record["file_name"]), metadata)
        yield visualizer.draw_dataset_dict(record).get_image()


def augmented(cfg: CfgNode, metadata: Metadata) -> Iterator[np.ndarray]:
    """The images that the model is trained with, and their targets, RGB, (H, W, 3), uint8."""
    for batch in build_train_loader(cfg):
        for inputs in batch:
            image = convert_image_to_rgb(inputs["image"].permute(1, 2, 0), cfg.INPUT.FORMAT)
            visualizer = Visualizer(image, metadata)
            if "sem_seg" in inputs:
                visualizer.draw_sem_seg(inputs["sem_seg"])
            if "instances" in inputs:
                fields = inputs["instances"].get_fields()
                names = metadata.get("thing_classes") or range(10**6)
                visualizer.overlay_instances(
                    labels=[str(names[i]) for i in fields["gt_classes"].tolist()],
                    boxes=fields.get("gt_boxes"),
                    masks=fields.get("gt_masks"),
                    keypoints=fields.get("gt_keypoints"),
                )
            yield visualizer.output.get_image()


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--output", default="data.png", help="the PNG to write")
    parser.add_argument("--images", type=int, default=8, help="how many images to draw")
    parser.add_argument("--columns", type=int, default=4, help="images side by side")
    parser.add_argument("--augmented", action="store_true", help="as the data loader makes them")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    args = parser.parse_args(argv)
    if args.images < 1 or args.columns < 1:
        raise UserError("--images and --columns must be at least 1")
    return args


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    config_file = find_config_file(args.config_file)
    with named_mistakes(config_file, args.opts, lambda cfg: next(iter(build_train_loader(cfg)))):
        run(args)


def run(args: argparse.Namespace) -> None:
    cfg = load_config(args.config_file, args.opts)
    if not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty; it names the dataset that is drawn")
    cfg.defrost()
    cfg.DATASETS.TEST = ()  # need not be there yet
    check_datasets(cfg.DATASETS.TRAIN)
    check_data(cfg)
    dataset = cfg.DATASETS.TRAIN[0]
    metadata = MetadataCatalog.get(dataset)
    pictures = augmented(cfg, metadata) if args.augmented else annotated(dataset, metadata)
    sheet = contact_sheet(list(itertools.islice(pictures, args.images)), args.columns)
    save_image(args.output, sheet)
    print(f"{min(args.images, len(DatasetCatalog.get(dataset)))} images drawn to {args.output}")


if __name__ == "__main__":
    main()
