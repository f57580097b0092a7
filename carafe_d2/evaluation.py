"""The evaluators of a dataset, by the ``evaluator_type`` in its metadata."""

from collections.abc import Callable, Iterable
from importlib.util import find_spec

from detectron2.data import MetadataCatalog
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

from .errors import UserError

# As in Detectron2's tools/train_net.py. Each is made of a dataset and an output folder.
EVALUATORS: dict[str, list[Callable[[str, str], DatasetEvaluator]]] = {
    "coco": [lambda name, folder: COCOEvaluator(name, output_dir=folder)],
    "sem_seg": [lambda name, folder: SemSegEvaluator(name, output_dir=folder)],
    "coco_panoptic_seg": [
        lambda name, folder: SemSegEvaluator(name, output_dir=folder),
        lambda name, folder: COCOEvaluator(name, output_dir=folder),
        lambda name, folder: COCOPanopticEvaluator(name, folder),
    ],
    "lvis": [lambda name, folder: LVISEvaluator(name, output_dir=folder)],
    "cityscapes_instance": [lambda name, folder: CityscapesInstanceEvaluator(name)],
    "cityscapes_sem_seg": [lambda name, folder: CityscapesSemSegEvaluator(name)],
    "pascal_voc": [lambda name, folder: PascalVOCDetectionEvaluator(name)],
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


def build_evaluator(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    """Builds the evaluator of a dataset; for panoptic segmentation that of boxes, masks, semantic
    segmentation and panoptic quality.

    Args:
        dataset_name: a registered dataset.
        output_folder: where the evaluators put their files.

    Raises:
        UserError: as :func:`check_evaluators`.
    """
    check_evaluators([dataset_name])
    kind = MetadataCatalog.get(dataset_name).evaluator_type
    evaluators = [build(dataset_name, output_folder) for build in EVALUATORS[kind]]
    return DatasetEvaluators(evaluators) if len(evaluators) > 1 else evaluators[0]
