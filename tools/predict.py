#!/usr/bin/env python3
r"""Draws what a model detects in images and videos, and saves it in COCO's result format.

Of a model for semantic segmentation it draws the classes of the pixels. Of one for inpainting it
draws the image with a hole, what the model makes of that, and the image, cut to the model's size.

Examples:
    python tools/predict.py --config-file configs/shapes_mask_rcnn_R18_FPN_carafe.yaml \
        --input datasets/shapes/val --output output/predicted \
        MODEL.WEIGHTS output/shapes_mask_rcnn_R18_FPN_carafe/model_final.pth
    python tools/predict.py --config-file configs/mask_rcnn_R50_FPN_carafe_1x.yaml \
        --input a.jpg 'more/*.png' clip.mp4 --json MODEL.WEIGHTS model.pth
    python tools/predict.py --config-file configs/mask_rcnn_R50_FPN_carafe_1x.yaml \
        --webcam MODEL.WEIGHTS model.pth

Pictures keep the names of the images, videos become MP4. With --json, OUTPUT holds besides:

- coco_instances_results.json: detections in the images, as COCO's evaluation reads them, with the
  category ids of the dataset.
- coco_images.json: `images` and `categories` of an annotation file: which id is which image. The
  ids come from --annotations; else they are the file names, where all are different numbers, as
  in COCO; else they count from 1.
- VIDEO.json, e.g. clip.mp4.json: detections in a video; the image_id is the frame, from 0.
"""

import argparse
import glob
import itertools
import json
import operator
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from detectron2.data import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import SemanticSegmentor
from detectron2.structures import Instances
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import Visualizer
from torch import Tensor
from tqdm import tqdm

from carafe_d2.config import is_inpainting, load_config
from carafe_d2.data.builtin import IMAGE_SUFFIXES
from carafe_d2.errors import UserError, exit_on_user_error
from carafe_d2.files import write_file
from carafe_d2.inference import (
    Inpainting,
    Predictor,
    draw_prediction,
    known_dataset,
    named_mistakes,
    read_image,
    save_image,
    split_opts,
)

# What cannot be read is named below; FFmpeg is to be silent about it.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
# What is taken of a folder, beside images. Any other file that is named itself is tried as one.
VIDEOS = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv"}
WRITTEN = {".jpg", ".jpeg", ".png", ".mp4"}  # the suffixes that outputs keep


# --- input and output files ---------------------------------------------------------------------


def find_inputs(values: Iterable[str]) -> list[Path]:
    """The image and video files that the user named, each once.

    Args:
        values: files, folders (without their subfolders), and glob patterns.

    Raises:
        UserError: one of them gives no file.
    """
    found: dict[Path, Path] = {}
    for value in values:
        path = Path(value).expanduser()
        if path.is_dir():
            files = [f for f in path.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES | VIDEOS]
        elif path.is_file():
            files = [path]
        else:
            files = [f for f in map(Path, glob.glob(str(path), recursive=True)) if f.is_file()]
        if not files:
            reason = "holds no image or video" if path.is_dir() else "names no file"
            raise UserError(f"--input: {value} {reason}")
        found |= {file.absolute(): file for file in sorted(files)}
    return list(found.values())


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS


def output_files(inputs: list[Path], folder: Path) -> dict[Path, Path]:
    """Where the picture or video of each input goes.

    They keep their names; where two inputs have the same one, all keep their paths below the
    folder that the inputs share.

    Raises:
        UserError: an output would overwrite an input.
    """
    shared = os.path.commonpath([file.absolute().parent for file in inputs])
    unique = len({file.name for file in inputs}) == len(inputs)
    existing = {file.resolve() for file in inputs}
    outputs = {}
    for file in inputs:
        output = folder / (file.name if unique else file.absolute().relative_to(shared))
        if output.suffix.lower() not in WRITTEN:
            output = output.with_name(output.name + (".mp4" if is_video(file) else ".png"))
        if output.resolve() in existing:
            raise UserError(f"--output {folder} would overwrite {output}; name another folder")
        outputs[file] = output
    return outputs


# --- COCO's formats -----------------------------------------------------------------------------


def read_annotations(path: Path) -> tuple[dict[tuple[str, ...], int], Metadata]:
    """Reads images and categories of a COCO annotation file.

    Returns:
        The id of each image by the parts of its path, and names and ids of the classes in the
        order in which Detectron2 numbers them: by id.

    Raises:
        UserError: it is missing or is no such file.
    """
    try:
        content = json.loads(path.read_bytes())
        ids = {Path(image["file_name"]).parts: image["id"] for image in content["images"]}
        categories = sorted((operator.index(c["id"]), c["name"]) for c in content["categories"])
    except OSError as error:
        raise UserError(f"cannot read --annotations {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"--annotations {path} is no COCO annotation file") from error
    return ids, Metadata(
        name=str(path),
        thing_classes=[name for _, name in categories],
        thing_dataset_id_to_contiguous_id={id: i for i, (id, _) in enumerate(categories)},
    )


def image_ids(images: list[Path], annotated: dict[tuple[str, ...], int] | None) -> dict[Path, int]:
    """The COCO id of each image; the module's docstring has the rule.

    Args:
        images: their files.
        annotated: the ids that :func:`read_annotations` found, if there are annotations.

    Raises:
        UserError: the annotations lack an image.
    """
    if annotated is None:
        stems = [image.stem for image in images]
        if all(stem.isascii() and stem.isdigit() for stem in stems):
            ids = {image: int(image.stem) for image in images}
            if len(set(ids.values())) == len(images):
                return ids
        return {image: i for i, image in enumerate(images, start=1)}
    ids = {}
    for image in images:
        # A file name there may have folders in front, and the path has others before these.
        parts = image.absolute().parts
        endings = [parts[i:] for i in range(len(parts)) if parts[i:] in annotated]
        if not endings:
            raise UserError(f"--annotations has no image of the name {image.name}")
        ids[image] = annotated[endings[0]]
    return ids


def categories_of(metadata: Metadata) -> dict[int, int]:
    """The dataset's category id of each class of the model; empty where they are the same."""
    ids = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    return {contiguous: dataset_id for dataset_id, contiguous in ids.items()}


def to_coco(instances: Instances, image_id: int, metadata: Metadata) -> list[dict]:
    """Detections in COCO's result format, with boxes XYWH in pixels and masks as RLE.

    Args:
        instances: what the model found in one image.
        image_id: its COCO id.
        metadata: maps the model's classes to the dataset's category ids.
    """
    categories = categories_of(metadata)
    results = instances_to_coco_json(instances, image_id)
    for result in results:
        result["category_id"] = categories.get(result["category_id"], result["category_id"])
    return results


# --- prediction ---------------------------------------------------------------------------------

Key = TypeVar("Key")


def predictions(
    predictor: Predictor, images: Iterable[tuple[Key, np.ndarray]], batch_size: int
) -> Iterator[tuple[Key, np.ndarray, Instances | Tensor | Inpainting]]:
    """Predicts one batch after the other.

    Args:
        images: RGB, (H, W, 3), uint8, each after what it is known by.
        batch_size: how many are predicted at once.

    Yields:
        Each image again, with its prediction as :class:`Predictor` gives it.
    """
    images = iter(images)
    while batch := list(itertools.islice(images, batch_size)):
        found = predictor([image for _, image in batch])
        for (key, image), prediction in zip(batch, found, strict=True):
            yield key, image, prediction


def predict_images(
    predictor: Predictor,
    ids: dict[Path, int],
    outputs: dict[Path, Path],
    args: argparse.Namespace,
    skip: Callable[[UserError], None],
) -> None:
    """Draws what is found in images, and saves it.

    Args:
        ids: of each image the COCO id.
        outputs: of each image the picture's file.
        args: the command line.
        skip: called for each image that cannot be read.
    """

    def read():
        for file in tqdm(ids, unit="image", desc="images"):
            try:
                yield file, read_image(file)
            except UserError as error:
                skip(error)

    results: list[dict] = []
    described: list[dict] = []
    metadata = predictor.metadata
    try:
        for file, image, prediction in predictions(predictor, read(), args.batch_size):
            height, width = image.shape[:2]
            described.append(
                {"id": ids[file], "file_name": file.name, "height": height, "width": width}
            )
            if args.json:
                results += to_coco(prediction, ids[file], metadata)
            if isinstance(prediction, Inpainting):
                save_image(outputs[file], prediction.picture(args.width))
            elif not args.no_images:
                np.random.seed(0)  # of the visualizer's colors: the same ones in every run
                visualizer = Visualizer(image, metadata, scale=(args.width or width) / width)
                drawn = draw_prediction(visualizer, prediction)
                save_image(outputs[file], drawn.get_image())
    finally:
        if args.json:
            category_ids = categories_of(metadata)
            names = metadata.get("thing_classes") or []
            categories = [{"id": category_ids.get(i, i), "name": n} for i, n in enumerate(names)]
            content = {"images": described, "categories": categories}
            write_file(args.output / "coco_instances_results.json", json.dumps(results))
            write_file(args.output / "coco_images.json", json.dumps(content))


def frames_of(video: cv2.VideoCapture, source: str) -> Iterator[np.ndarray]:
    """The frames of a video or a camera, RGB, (H, W, 3), uint8.

    Args:
        source: its name, for the message.

    Raises:
        UserError: there are none.
    """
    if not video.grab():
        raise UserError(f"cannot read {source}: OpenCV decodes no frame of it")

    def frames():
        grabbed = True
        while grabbed:
            yield cv2.cvtColor(video.retrieve()[1], cv2.COLOR_BGR2RGB)
            grabbed = video.grab()

    return frames()


def open_mp4(path: Path, frames_per_second: float, size: Sequence[int]) -> cv2.VideoWriter:
    """Opens an MP4 for frames of a size (width, height).

    Raises:
        UserError: it cannot be written.
    """
    write_file(path, b"")  # OpenCV does not say why it cannot write
    codec = cv2.VideoWriter.fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(path), codec, frames_per_second, size)
    if not writer.isOpened():
        raise UserError(f"cannot write {path}: this OpenCV writes no MP4")
    return writer


def predict_video(predictor: Predictor, file: Path, output: Path, args: argparse.Namespace) -> None:
    """Draws what is found in a video, and saves it, frame by frame.

    Raises:
        UserError: the video does not decode, or the output cannot be written.
    """
    video = cv2.VideoCapture(str(file))
    frames = frames_of(video, f"video {file}")
    count = max(int(video.get(cv2.CAP_PROP_FRAME_COUNT)), 0) or None  # some do not tell
    progress = tqdm(enumerate(frames), total=count, unit="frame", desc=file.name)
    visualizer = VideoVisualizer(predictor.metadata)  # an object keeps its color
    results: list[dict] = []
    writer = None
    try:
        for number, frame, prediction in predictions(predictor, progress, args.batch_size):
            if args.json:
                results += to_coco(prediction, number, predictor.metadata)
            if args.no_images:
                continue
            drawn = draw_prediction(visualizer, frame, prediction).get_image()
            # The codec halves the colors' resolution and drops what is odd of the sides.
            height, width = drawn.shape[:2]
            drawn = cv2.copyMakeBorder(drawn, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
            if writer is None:
                rate = video.get(cv2.CAP_PROP_FPS) or 30.0
                writer = open_mp4(output, rate, drawn.shape[1::-1])
            writer.write(cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
    finally:
        if writer:
            writer.release()
        if args.json:
            write_file(output.with_name(f"{file.name}.json"), json.dumps(results))


def show_camera(predictor: Predictor) -> None:
    """Shows what is found in the pictures of the first camera, in a window, until Esc is pressed.

    Raises:
        UserError: there is no camera, or this OpenCV has no windows.
    """
    frames = frames_of(cv2.VideoCapture(0), "the first camera")
    visualizer = VideoVisualizer(predictor.metadata)
    try:
        for _, frame, prediction in predictions(predictor, enumerate(frames), batch_size=1):
            drawn = draw_prediction(visualizer, frame, prediction).get_image()
            cv2.imshow("carafe_d2, Esc ends", cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
            if cv2.waitKey(1) == 27:
                return
    except cv2.error as error:
        raise UserError("--webcam needs windows: pip install opencv-python") from error


# --- command line -------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument(
        "--input", nargs="+", default=[], help="images, videos, folders or glob patterns"
    )
    parser.add_argument(
        "--webcam",
        action="store_true",
        help="show what the first camera sees in a window, in place of --input",
    )
    parser.add_argument("--output", type=Path, default=Path("output/predictions"), metavar="FOLDER")
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="lowest score that counts, also with --json; default: %(default)s; use 0.05 to "
        "evaluate",
    )
    parser.add_argument("--batch-size", type=int, default=1, help="images at once; default: 1")
    parser.add_argument("--json", action="store_true", help="save detections as JSON, too")
    parser.add_argument("--no-images", action="store_true", help="draw nothing; needs --json")
    parser.add_argument(
        "--annotations",
        type=Path,
        metavar="FILE",
        help="a COCO annotation file with the ids of the images and the classes of the model",
    )
    parser.add_argument(
        "--width", type=int, help="width of the drawn images in pixels; default: their own"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    args = parser.parse_args(argv)
    args.input, args.opts = split_opts(args.input, args.opts)

    if not 0 <= args.confidence_threshold <= 1:
        raise UserError(
            f"--confidence-threshold must be from 0 to 1, got {args.confidence_threshold}"
        )
    if args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.width is not None and args.width < 1:
        raise UserError(f"--width must be at least 1, got {args.width}")
    if args.webcam == bool(args.input):
        raise UserError("name files by --input, or a camera by --webcam")
    if args.no_images and not args.json:
        raise UserError("--no-images leaves nothing to write; add --json")
    return args


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with named_mistakes(args.config_file, args.opts):
        predict(args)


def predict(args: argparse.Namespace) -> None:
    sections = ("ROI_HEADS", "RETINANET")
    threshold = [(f"MODEL.{s}.SCORE_THRESH_TEST", args.confidence_threshold) for s in sections]
    cfg = load_config(args.config_file, [*args.opts, *itertools.chain(*threshold)])
    if is_inpainting(cfg) and (args.webcam or args.json):
        raise UserError("an inpainting model fills holes in images; leave out --webcam and --json")
    if args.webcam:
        show_camera(Predictor(cfg))
        return
    inputs = find_inputs(args.input)
    outputs = output_files(inputs, args.output)
    if is_inpainting(cfg) and any(map(is_video, inputs)):
        raise UserError("an inpainting model fills holes in images, and --input names a video")
    if args.annotations:
        annotated, metadata = read_annotations(args.annotations)
    else:
        annotated, metadata = None, known_dataset(cfg)
    ids = image_ids([file for file in inputs if not is_video(file)], annotated)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {args.output}: {error.strerror}") from error
    if args.json and not metadata:
        raise UserError(
            "--json needs the category ids of the model's dataset: name it in DATASETS.TEST, "
            "register it by DATASETS.REGISTER, or give --annotations"
        )
    predictor = Predictor(cfg, metadata)
    if args.json and isinstance(predictor.model, SemanticSegmentor):
        raise UserError("--json saves detections, but this model tells only the classes of pixels")

    skipped = []

    def skip(error: UserError) -> None:
        skipped.append(error)
        tqdm.write(f"skipped: {error}", file=sys.stderr)

    if ids:
        predict_images(predictor, ids, outputs, args, skip)
    for file in filter(is_video, inputs):
        try:
            predict_video(predictor, file, outputs[file], args)
        except UserError as error:
            skip(error)
    print(f"{len(inputs) - len(skipped)} of {len(inputs)} files predicted, to {args.output}")
    if skipped:
        raise UserError(f"skipped {len(skipped)} of {len(inputs)} files, for the reasons above")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted: what was predicted before is kept", file=sys.stderr)
        sys.exit(130)
