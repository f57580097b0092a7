"""What the programs that look at a trained detector share: its loading, its input, its pictures."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog, detection_utils
from detectron2.data.transforms import AugInput, AugmentationList
from detectron2.modeling import build_model
from detectron2.structures import Instances
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from . import diagnosis, mmdet
from .checkpoint import CarafeCheckpointer
from .config import find_config_file, is_inpainting
from .errors import UserError
from .files import write_file
from .inpaint.data import InpaintMapper
from .model_settings import ModelSettings

if TYPE_CHECKING:  # they import Matplotlib, which not every program needs
    from detectron2.utils.video_visualizer import VideoVisualizer
    from detectron2.utils.visualizer import VisImage, Visualizer


def split_opts(values: Sequence[str], opts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Gives config keys back that argparse took for further values of the option before them.

    Args:
        values: of an option that takes several, e.g. ["a.jpg", "MODEL.WEIGHTS", "model.pth"].
        opts: the config keys and values that argparse found.

    Returns:
        Both as they were meant: ["a.jpg"] and ["MODEL.WEIGHTS", "model.pth", *opts].
    """
    sections = get_cfg().keys()
    for i, value in enumerate(values):
        if value.split(".")[0] in sections and not os.path.exists(value):
            return list(values[:i]), [*values[i:], *opts]
    return list(values), list(opts)


def known_dataset(cfg: CfgNode) -> Metadata | None:
    """The metadata of the first dataset in DATASETS.TEST, if that is registered.

    Those of a COCO file are there only once its annotations are read, which is done if need be.
    """
    name = cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else ""
    if name not in DatasetCatalog:
        return None
    metadata = MetadataCatalog.get(name)
    if not metadata.get("thing_classes") and os.path.isfile(metadata.get("json_file", "")):
        DatasetCatalog.get(name)
    return metadata


class Inpainting(NamedTuple):
    """What an inpainting model was given, what it made of that, and what is right.

    All are RGB, (H, W, 3), uint8; the first is gray in the hole.
    """

    masked: np.ndarray
    inpainted: np.ndarray
    truth: np.ndarray

    def picture(self, width: int | None = None) -> np.ndarray:
        """The three side by side, each in its own size or of a width."""
        height, own_width = self.truth.shape[:2]
        width = width or own_width
        size = (width, max(1, round(height * width / own_width)))
        return contact_sheet([cv2.resize(image, size) for image in self], columns=3)


class Predictor:
    """A trained model from images to predictions, with the resizing of the evaluation.

    Attributes:
        model: the detector, or the model for semantic segmentation.
        metadata: names and ids of the classes, as in Detectron2's MetadataCatalog.
    """

    def __init__(self, cfg: CfgNode, metadata: Metadata | None = None):
        """
        Args:
            cfg: a config with its weights in MODEL.WEIGHTS.
            metadata: names and ids of the classes; default: those of DATASETS.TEST.

        Raises:
            UserError: there are no such weights, or they are not all that the model needs; model
                and metadata differ in the number of classes; or INPUT.FORMAT is none of RGB, BGR
                and L.
        """
        if cfg.INPUT.FORMAT not in ("RGB", "BGR", "L"):
            raise UserError(f"INPUT.FORMAT must be RGB, BGR or L, got {cfg.INPUT.FORMAT!r}")
        if not cfg.MODEL.WEIGHTS:
            raise UserError("MODEL.WEIGHTS is empty; end the command with MODEL.WEIGHTS and a file")
        self.model = build_model(cfg).eval()
        settings = ModelSettings(cfg, cfg.DATASETS.TEST)
        CarafeCheckpointer(self.model, model_settings=settings).load(cfg.MODEL.WEIGHTS)
        if cfg.MODEL.CHANNELS_LAST:
            self.model.to(memory_format=torch.channels_last)
        self.metadata = metadata or known_dataset(cfg) or Metadata()
        names = self.metadata.get("thing_classes")
        classes = mmdet.num_classes(self.model.state_dict())
        if names and classes and len(names) != classes:
            raise UserError(
                f"the model tells {classes} classes apart and {self.metadata.name!r} has "
                f"{len(names)}; set DATASETS.TEST to a dataset with the model's classes"
            )
        self._mapper = InpaintMapper(cfg, is_train=False) if is_inpainting(cfg) else None
        self._format = cfg.INPUT.FORMAT
        self._resize = AugmentationList(detection_utils.build_augmentation(cfg, is_train=False))

    def resize(self, image: np.ndarray) -> np.ndarray:
        """An RGB image (H, W, 3) in the size and the INPUT.FORMAT that the model sees."""
        image = detection_utils.convert_PIL_to_numpy(Image.fromarray(image), self._format)
        resized = AugInput(image)
        self._resize(resized)
        return resized.image

    @torch.no_grad()
    def __call__(
        self, images: Sequence[np.ndarray]
    ) -> list[Instances] | list[Tensor] | list[Inpainting]:
        """Detects objects in a batch of images, or tells the classes of their pixels, or fills
        holes in them.

        A batch is padded to its largest image, which changes the others' scores a little.

        Args:
            images: RGB, (H, W, 3), uint8; they may differ in size.

        Returns:
            For each, on the CPU and in the pixels of that image, the instances that the model
            found; from a model without instances the number of the class of every pixel (H, W);
            from an inpainting model what it fills into the holes that the evaluation would have.

        Raises:
            UserError: the model puts out none of these, the classes are not those of the metadata,
                or the memory does not suffice.
        """
        inputs = []
        for image in images:
            if self._mapper:
                image = detection_utils.convert_PIL_to_numpy(Image.fromarray(image), self._format)
                inputs.append(self._mapper.prepare(image, "the image"))
                continue
            height, width = image.shape[:2]
            resized = self.resize(image)
            tensor = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
            inputs.append({"image": tensor, "height": height, "width": width})
        try:
            outputs = self.model(inputs)
        except torch.OutOfMemoryError as error:
            raise UserError(f"a batch of {len(images)} does not fit into the GPU") from error
        if self._mapper:
            return [self._inpainting(each, out) for each, out in zip(inputs, outputs, strict=True)]
        if "instances" in outputs[0]:
            return [output["instances"].to("cpu") for output in outputs]
        if "sem_seg" not in outputs[0]:
            raise UserError(f"the model puts out {', '.join(outputs[0])} and no instances")
        scores = [output["sem_seg"] for output in outputs]
        names = self.metadata.get("stuff_classes") or ()
        if len(names) != len(scores[0]):
            raise UserError(
                f"the model tells {len(scores[0])} classes of pixels apart and the dataset has "
                f"{len(names)}; set DATASETS.TEST to a dataset with the model's classes"
            )
        return [score.argmax(dim=0).cpu() for score in scores]

    def _inpainting(self, given: dict, output: dict) -> Inpainting:
        def to_rgb(image: Tensor) -> np.ndarray:
            pixels = image.round().byte().permute(1, 2, 0).cpu().numpy()
            return np.ascontiguousarray(pixels[..., ::-1] if self._format == "BGR" else pixels)

        truth = to_rgb(given["image"])
        masked = np.where(given["mask"].numpy()[..., None], np.uint8(127), truth)
        return Inpainting(masked, to_rgb(output["inpainted"]), truth)


def draw_prediction(
    visualizer: "Visualizer | VideoVisualizer",
    *frame_and_prediction: np.ndarray | Instances | Tensor,
) -> "VisImage":
    """Draws what a :class:`Predictor` gave for an image.

    Args:
        visualizer: of the image, or of a video.
        *frame_and_prediction: of a video the frame; what was predicted.
    """
    if isinstance(frame_and_prediction[-1], Instances):
        return visualizer.draw_instance_predictions(*frame_and_prediction)
    return visualizer.draw_sem_seg(*frame_and_prediction)


def named_mistakes(config_file: str, overrides: Sequence[str]) -> AbstractContextManager[None]:
    """:func:`carafe_d2.diagnosis.named_mistakes` for programs with a :class:`Predictor`."""

    def attempt(cfg: CfgNode) -> None:
        Predictor(cfg)([np.zeros((64, 64, 3), np.uint8)])

    return diagnosis.named_mistakes(find_config_file(config_file), overrides, attempt)


def read_image(path: str | Path) -> np.ndarray:
    """Reads an image file, turned as its EXIF data says.

    Returns:
        RGB, (H, W, 3), uint8.

    Raises:
        UserError: the file is missing or no image that Pillow can decode.
    """
    try:
        return detection_utils.read_image(str(path), format="RGB")
    except Exception as error:  # each of Pillow's decoders has errors of its own
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "it is in no format that Pillow knows"
        raise UserError(f"cannot read image {path}: {reason}") from error


def save_image(path: str | Path, image: np.ndarray) -> None:
    """Writes an RGB image (H, W, 3), uint8, in the format of the file name's suffix.

    Raises:
        UserError: the suffix is of no image format, or the file cannot be written.
    """
    path = Path(path)
    try:
        data = cv2.imencode(path.suffix, image[:, :, ::-1])[1]
    except cv2.error as error:
        raise UserError(f"cannot write {path}: name it .png or .jpg") from error
    write_file(path, data.tobytes())


def contact_sheet(pictures: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Puts pictures into the cells of one, each as large as the largest.

    Args:
        pictures: RGB, (H, W, 3), uint8.
        columns: pictures side by side, if there are as many.

    Returns:
        RGB, (H, W, 3), uint8, white between the pictures.
    """
    height, width = np.max([picture.shape[:2] for picture in pictures], axis=0)
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * (height + 8), columns * (width + 24) - 24, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = i // columns * (height + 8), i % columns * (width + 24)
        sheet[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    return sheet
