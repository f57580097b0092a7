#!/usr/bin/env python3
r"""Draws what a model detects in images and videos, and saves it in COCO's result format.

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
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from detectron2.data import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import Visualizer
from tqdm import tqdm

from carafe_d2.config import load_config
from carafe_d2.errors import UserError, exit_on_user_error
from carafe_d2.files import write_file
from carafe_d2.inference import (
    Predictor,
    known_dataset,
    named_mistakes,
    read_image,
    save_image,
    split_opts,
)

# What cannot be read is named below; FFmpeg is to be silent about it.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
# What is taken of a folder. Any other file that is named itself is tried as an image.
IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
VIDEOS = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv"}


# --- input and output files ---------------------------------------------------------------------


def find_inputs(values: Iterable[str]) -> list[Path]:
    """The image and video files that the user named, each once.

    Args:
        values: files, folders (without their subfolders), and glob patterns.

    Raises:
        UserError: one of them gives no file.
    """
    found: list[Path] = []
    for value in map(os.path.expanduser, values):
        path = Path(value)
        if path.is_dir():
            files = sorted(f for f in path.iterdir() if f.suffix.lower() in IMAGES | VIDEOS)
            reason = "holds no image or video"
        elif glob.has_magic(value) and not path.exists():
            files = sorted(f for f in map(Path, glob.glob(value, recursive=True)) if f.is_file())
            reason = "matches no file"
        else:
            files = [path] if path.is_file() else []
            reason = "does not exist"
        if not files:
            raise UserError(f"--input: {value} {reason}")
        found += files
    return list({file.absolute(): file for file in found}.values())


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
    outputs = {}
    for file in inputs:
        output = folder / (file.name if unique else file.absolute().relative_to(shared))
        kept, written = (
            ({".mp4"}, ".mp4") if is_video(file) else ({".jpg", ".jpeg", ".png"}, ".png")
        )
        if output.suffix.lower() not in kept:
            output = output.with_name(output.name + written)
        outputs[file] = output
    existing = {file.resolve() for file in inputs}
    for output in outputs.values():
        if output.resolve() in existing:
            raise UserError(f"--output {folder} would overwrite {output}; name another folder")
    return outputs


# --- COCO's formats -----------------------------------------------------------------------------


def read_annotations(path: Path) -> dict:
    """Reads `images` and `categories` of a COCO annotation file.

    Raises:
        UserError: it is missing or is no such file.
    """
    try:
        content = json.loads(path.read_text())
        return {
            "images": [
                {"id": i["id"], "file_name": os.fspath(i["file_name"])} for i in content["images"]
            ],
            "categories": [
                {"id": operator.index(c["id"]), "name": c["name"]} for c in content["categories"]
            ],
        }
    except OSError as error:
        raise UserError(f"cannot read --annotations {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"--annotations {path} is no COCO annotation file") from error


def metadata_of(annotations: dict, name: str) -> Metadata:
    """Names and ids of the classes in the order in which Detectron2 numbers them: by id."""
    categories = sorted(annotations["categories"], key=lambda category: category["id"])
    return Metadata(
        name=name,
        thing_classes=[category["name"] for category in categories],
        thing_dataset_id_to_contiguous_id={c["id"]: i for i, c in enumerate(categories)},
    )


def image_ids(images: list[Path], annotations: dict | None) -> dict[Path, int]:
    """The COCO id of each image; the module's docstring has the rule.

    Raises:
        UserError: the annotations lack an image.
    """
    if annotations:
        known = {Path(image["file_name"]).parts: image["id"] for image in annotations["images"]}
        ids = {}
        for image in images:
            # A file name there may have folders in front, and the path has others before these.
            endings = (image.absolute().parts[i:] for i in range(len(image.absolute().parts)))
            found = next((known[ending] for ending in endings if ending in known), None)
            if found is None:
                raise UserError(f"--annotations has no image of the name {image.name}")
            ids[image] = found
        return ids
    stems = [image.stem for image in images]
    if all(s.isascii() and s.isdigit() for s in stems) and len({*map(int, stems)}) == len(stems):
        return {image: int(image.stem) for image in images}
    return {image: i for i, image in enumerate(images, start=1)}


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


def save_json(path: Path, content) -> None:
    write_file(path, json.dumps(content).encode())


# --- prediction ---------------------------------------------------------------------------------


def batched(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    return iter(lambda: list(itertools.islice(iterator, size)), [])


def draw(
    image: np.ndarray, instances: Instances, metadata: Metadata, width: int | None, seed: int
) -> np.ndarray:
    """Draws instances into an image.

    Args:
        image: RGB, (H, W, 3), uint8.
        instances: what is drawn.
        metadata: names of the classes.
        width: of the picture; default: that of the image.
        seed: determines the colors, which the visualizer draws by lot.

    Returns:
        RGB, (height, width, 3), uint8.
    """
    np.random.seed(seed)
    visualizer = Visualizer(image, metadata, scale=width / image.shape[1] if width else 1)
    return visualizer.draw_instance_predictions(instances).get_image()


class ImagePrediction:
    """Predicts images one batch after the other.

    Attributes:
        unreadable: what is to be said of each image that was skipped.
        results: all detections in COCO's result format.
        images: id, file name and size of each image, as in a COCO annotation file.
    """

    def __init__(self, predictor: Predictor, ids: dict[Path, int]):
        self.unreadable: list[str] = []
        self.results: list[dict] = []
        self.images: list[dict] = []
        self._predictor = predictor
        self._ids = ids

    def _read(self, files: Iterable[Path]) -> Iterator[tuple[Path, np.ndarray]]:
        for file in files:
            try:
                yield file, read_image(file)
            except UserError as error:
                self.unreadable.append(str(error))
                tqdm.write(f"skipped: {error}", file=sys.stderr)

    def run(self, batch_size: int) -> Iterator[tuple[Path, np.ndarray, Instances]]:
        """Yields path, RGB image and what was found in it, image by image."""
        files = tqdm(self._ids, unit="image", desc="images")
        for batch in batched(self._read(files), batch_size):
            predictions = self._predictor([image for _, image in batch])
            for (file, image), instances in zip(batch, predictions, strict=True):
                image_id, (height, width) = self._ids[file], image.shape[:2]
                self.images.append(
                    {"id": image_id, "file_name": file.name, "height": height, "width": width}
                )
                self.results += to_coco(instances, image_id, self._predictor.metadata)
                yield file, image, instances

    def save(self, folder: Path) -> None:
        """Writes the two JSON files of the images."""
        ids = categories_of(self._predictor.metadata)
        names = self._predictor.metadata.get("thing_classes") or []
        categories = [{"id": ids.get(i, i), "name": name} for i, name in enumerate(names)]
        save_json(folder / "coco_instances_results.json", self.results)
        save_json(folder / "coco_images.json", {"images": self.images, "categories": categories})


def frames_of(file: Path | int) -> tuple[Iterator[np.ndarray], float, int | None]:
    """Opens a video, or the camera of a number.

    Returns:
        Its frames, RGB (H, W, 3), frames per second, and the number of frames if it is known.

    Raises:
        UserError: it does not decode.
    """
    video = cv2.VideoCapture(file if isinstance(file, int) else str(file))
    readable, first = video.read()
    if not readable:
        raise UserError(f"cannot read video {file}: OpenCV decodes no frame of it")

    def frames():
        frame = first
        while frame is not None:
            yield frame[:, :, ::-1]
            frame = video.read()[1]
        video.release()

    count = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    return frames(), video.get(cv2.CAP_PROP_FPS) or 30.0, count if count > 0 else None


class VideoFile:
    """Writes RGB frames to an MP4, from the first one on; a context manager.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path: Path, frames_per_second: float):
        self._path = path
        self._frames_per_second = frames_per_second
        self._writer: cv2.VideoWriter | None = None

    def __enter__(self):
        return self

    def write(self, frame: np.ndarray) -> None:
        # The codec halves the colors' resolution and drops what is odd of the sides.
        height, width = frame.shape[:2]
        frame = cv2.copyMakeBorder(frame, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        if self._writer is None:
            write_file(self._path, b"")  # OpenCV does not say why it cannot write
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            size = frame.shape[1::-1]
            self._writer = cv2.VideoWriter(str(self._path), codec, self._frames_per_second, size)
            if not self._writer.isOpened():
                raise UserError(f"cannot write {self._path}: this OpenCV writes no MP4")
        self._writer.write(frame[:, :, ::-1])

    def __exit__(self, *exception):
        if self._writer is not None:
            self._writer.release()


def predict_video(predictor: Predictor, file: Path, output: Path, args) -> None:
    """Draws what is found in a video, and saves it, frame by frame.

    Raises:
        UserError: the video does not decode, or the output cannot be written.
    """
    frames, frames_per_second, count = frames_of(file)
    progress = tqdm(frames, total=count, unit="frame", desc=file.name)
    visualizer = VideoVisualizer(predictor.metadata)  # an object keeps its color
    results: list[dict] = []
    number = itertools.count()
    try:
        with VideoFile(output, frames_per_second) as video:
            for batch in batched(progress, args.batch_size):
                for frame, instances in zip(batch, predictor(batch), strict=True):
                    results += to_coco(instances, next(number), predictor.metadata)
                    if not args.no_images:
                        drawn = visualizer.draw_instance_predictions(frame, instances)
                        video.write(drawn.get_image())
    finally:
        if args.json:
            save_json(output.with_name(f"{file.name}.json"), results)


def show_camera(predictor: Predictor) -> None:
    """Shows what is found in the pictures of the first camera, in a window, until Esc is pressed.

    Raises:
        UserError: there is no camera, or this OpenCV has no windows.
    """
    frames = frames_of(0)[0]
    visualizer = VideoVisualizer(predictor.metadata)
    try:
        for frame in frames:
            (instances,) = predictor([frame])
            drawn = visualizer.draw_instance_predictions(frame, instances).get_image()
            cv2.imshow("carafe_d2, Esc ends", drawn[:, :, ::-1])
            if cv2.waitKey(1) == 27:
                return
    except cv2.error as error:
        raise UserError("--webcam needs windows: pip install opencv-python") from error


# --- command line -------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    description, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    return args


def check_args(args: argparse.Namespace) -> None:
    if not 0 <= args.confidence_threshold <= 1:
        raise UserError(
            f"--confidence-threshold must be from 0 to 1, got {args.confidence_threshold}"
        )
    for name in ("batch_size", "width"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.webcam == bool(args.input):
        raise UserError("name files by --input, or a camera by --webcam")
    if args.no_images and not args.json:
        raise UserError("--no-images leaves nothing to write; add --json")


def make_config(args: argparse.Namespace):
    cfg = load_config(args.config_file, args.opts)
    cfg.defrost()
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = args.confidence_threshold
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = args.confidence_threshold
    cfg.freeze()
    return cfg


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with named_mistakes(args.config_file, args.opts):
        run(args)


def run(args: argparse.Namespace) -> None:
    check_args(args)
    cfg = make_config(args)
    if args.webcam:
        show_camera(Predictor(cfg))
        return
    inputs = find_inputs(args.input)
    outputs = output_files(inputs, args.output)
    annotations = read_annotations(args.annotations) if args.annotations else None
    ids = image_ids([file for file in inputs if not is_video(file)], annotations)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {args.output}: {error.strerror}") from error
    metadata = metadata_of(annotations, str(args.annotations)) if annotations else None
    if args.json and not (metadata or known_dataset(cfg)):
        raise UserError(
            "--json needs the category ids of the model's dataset: name it in DATASETS.TEST, "
            "register it by DATASETS.REGISTER, or give --annotations"
        )
    predictor = Predictor(cfg, metadata)

    images = ImagePrediction(predictor, ids)
    try:
        for file, image, instances in images.run(args.batch_size) if ids else ():
            if not args.no_images:
                seed = zlib.crc32(file.name.encode())  # the same colors in every run
                drawn = draw(image, instances, predictor.metadata, args.width, seed)
                save_image(outputs[file], drawn)
    finally:
        if args.json and ids:
            images.save(args.output)

    failures = images.unreadable
    for file in filter(is_video, inputs):
        try:
            predict_video(predictor, file, outputs[file], args)
        except UserError as error:
            failures.append(str(error))
            print(f"skipped: {error}", file=sys.stderr)
    print(f"{len(inputs) - len(failures)} of {len(inputs)} files predicted, to {args.output}")
    if failures:
        raise UserError(f"skipped {len(failures)} of {len(inputs)} files, for the reasons above")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted: what was predicted before is kept", file=sys.stderr)
        sys.exit(130)
