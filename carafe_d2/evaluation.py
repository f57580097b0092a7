"""The evaluators of a dataset, by the ``evaluator_type`` in its metadata."""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import convert_to_coco_json
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.utils import comm

from .data.checks import complete_annotations
from .errors import UserError
from .inpaint.evaluation import InpaintingEvaluator

logger = logging.getLogger(__name__)

_COCO_LIMIT = 100  # detections of an image that COCO's metrics count


class CarafeCOCOEvaluator(COCOEvaluator):
    """Detectron2's evaluator, of annotations as they are today and complete.

    Its arguments are those of :class:`detectron2.evaluation.COCOEvaluator`.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int | None = None,
        use_fast_impl: bool = True,
        kpt_oks_sigmas: Sequence[float] = (),
    ):
        if output_dir and not hasattr(MetadataCatalog.get(dataset_name), "json_file"):
            # Of a dataset that is a function, Detectron2 would take what an earlier run wrote.
            if comm.is_main_process():
                cache = os.path.join(output_dir, f"{dataset_name}_coco_format.json")
                convert_to_coco_json(dataset_name, cache, allow_cached=False)
            comm.synchronize()
        super().__init__(
            dataset_name,
            tasks,
            distributed,
            output_dir,
            max_dets_per_image=max_dets_per_image,
            use_fast_impl=use_fast_impl,
            kpt_oks_sigmas=kpt_oks_sigmas,
        )
        complete_annotations(self._coco_api, self._metadata.json_file)


def _coco_evaluator(name: str, folder: str, cfg: CfgNode | None) -> COCOEvaluator:
    limit = cfg.TEST.DETECTIONS_PER_IMAGE if cfg else _COCO_LIMIT
    if limit > _COCO_LIMIT:
        logger.info(f"AP counts up to {limit} detections of an image, not COCO's {_COCO_LIMIT}.")
    return CarafeCOCOEvaluator(
        name,
        output_dir=folder,
        max_dets_per_image=limit if limit > _COCO_LIMIT else None,
        kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS if cfg else (),
    )


# As in Detectron2's tools/train_net.py, and that of image folders. Each is made of a dataset, an
# output folder and a config.
EVALUATORS: dict[str, list[Callable[[str, str, CfgNode | None], DatasetEvaluator]]] = {
    "coco": [_coco_evaluator],
    "sem_seg": [lambda name, folder, _: SemSegEvaluator(name, output_dir=folder)],
    "coco_panoptic_seg": [
        lambda name, folder, _: SemSegEvaluator(name, output_dir=folder),
        _coco_evaluator,
        lambda name, folder, _: COCOPanopticEvaluator(name, folder),
    ],
    "lvis": [lambda name, folder, _: LVISEvaluator(name, output_dir=folder)],
    "cityscapes_instance": [lambda name, *_: CityscapesInstanceEvaluator(name)],
    "cityscapes_sem_seg": [lambda name, *_: CityscapesSemSegEvaluator(name)],
    "pascal_voc": [lambda name, *_: PascalVOCDetectionEvaluator(name)],
    "inpainting": [lambda *_: InpaintingEvaluator()],
}

# Detectron2 imports these only when the evaluation is at its end.
_NEEDS = {
    "coco_panoptic_seg": (
        "panopticapi",
        "pip install git+https://github.com/cocodataset/panopticapi.git",
    ),
    "lvis": ("lvis", "pip install lvis"),
    "cityscapes_instance": ("cityscapesscripts", "pip install cityscapesscripts"),
    "cityscapes_sem_seg": ("cityscapesscripts", "pip install cityscapesscripts"),
}


def check_evaluators(dataset_names: Iterable[str]) -> None:
    """Checks that registered datasets can be evaluated, before anything expensive starts.

    Raises:
        UserError: a dataset is of a type without evaluator, or a package that its evaluator needs
            is not installed; the message says how to install it.
    """
    for name in dataset_names:
        kind = MetadataCatalog.get(name).get("evaluator_type")
        if kind not in EVALUATORS:
            raise UserError(
                f"dataset {name!r}: the evaluator_type in its metadata must be one of "
                f"{', '.join(EVALUATORS)}, got {kind!r}"
            )
        package, installation = _NEEDS.get(kind, ("", ""))
        if package and not find_spec(package):
            raise UserError(
                f"dataset {name!r}: its evaluation needs {package}; install it by `{installation}`"
            )


def build_evaluator(
    dataset_name: str, output_folder: str, cfg: CfgNode | None = None
) -> DatasetEvaluator:
    """Builds the evaluator of a dataset; for panoptic segmentation that of boxes, masks, semantic
    segmentation and panoptic quality.

    Args:
        dataset_name: a registered dataset.
        output_folder: where the evaluators put their files.
        cfg: TEST.DETECTIONS_PER_IMAGE and TEST.KEYPOINT_OKS_SIGMAS count, if it is given.

    Raises:
        UserError: as :func:`check_evaluators`.
    """
    check_evaluators([dataset_name])
    kind = MetadataCatalog.get(dataset_name).evaluator_type
    evaluators = [build(dataset_name, output_folder, cfg) for build in EVALUATORS[kind]]
    return DatasetEvaluators(evaluators) if len(evaluators) > 1 else evaluators[0]
