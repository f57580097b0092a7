"""What weights do not tell of the model that they were trained for, kept in its checkpoints.

Another dilation, another interpolation, another mean of the pixels: the weights fit all the same,
and an evaluation yields figures that mean nothing.
"""

import re
from collections.abc import Mapping, Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from .config import keys_of, value_of
from .errors import UserError

# Keys that change what a model predicts, but neither the names nor the shapes of all its weights.
_KEYS = re.compile(
    r"INPUT\.FORMAT|MODEL\.(PIXEL_(MEAN|STD)|CARAFE(_DOWNSAMPLE)?\..*|ANCHOR_GENERATOR\..*|"
    r"RESNETS\.(STRIDE_IN_1X1|RES5_DILATION)|FPN\.FUSE_TYPE|SEM_SEG_HEAD\.COMMON_STRIDE|"
    r"\w+\.(\w*(UP|DOWN)SAMPLE|IN_FEATURES|BBOX_REG_WEIGHTS|POOLER_TYPE|POOLER_RESOLUTION))"
)


class ModelSettings:
    """Something for a checkpointer to save, and to compare when it loads: settings and classes.

    Files of other programs have none, and are loaded unchecked.
    """

    def __init__(self, cfg: CfgNode, datasets: Sequence[str]):
        """
        Args:
            cfg: the config of the model.
            datasets: the registered datasets that it is trained or evaluated with.
        """
        self._settings = {
            key: _plain(value_of(cfg, key)) for key in keys_of(cfg) if _KEYS.fullmatch(key)
        }
        self._datasets = datasets

    def state_dict(self) -> dict:
        classes = [MetadataCatalog.get(name).get("thing_classes") for name in self._datasets]
        return {"config": self._settings, "classes": next(filter(None, classes), None)}

    def load_state_dict(self, state_dict: Mapping) -> None:
        """Compares a checkpoint's settings with those of the model.

        Raises:
            UserError: they differ; the message names the key or the dataset.
        """
        trained = state_dict["config"]
        for key in sorted(self._settings.keys() & trained.keys()):
            if self._settings[key] != trained[key]:
                raise UserError(
                    f"{key} is {self._settings[key]!r}, but the weights were trained with "
                    f"{trained[key]!r}; set it to that"
                )
        for name in self._datasets:
            check_order_of_classes(state_dict["classes"], "the weights", name)


def check_order_of_classes(classes: Sequence[str] | None, owner: str, dataset: str) -> None:
    """Checks that a dataset numbers its classes like a model, or another dataset.

    Names that only one of them has may mean the same, so nothing is said of them.

    Args:
        classes: names by number, if they are known.
        owner: whose they are, for the message.
        dataset: a registered dataset.

    Raises:
        UserError: a class has another number.
    """
    others = MetadataCatalog.get(dataset).get("thing_classes") or ()
    for i, name in enumerate(others):
        if classes and name in classes and name != [*classes, *others][i]:
            raise UserError(
                f"dataset {dataset!r}: its class {i} is {name!r}, which is class "
                f"{classes.index(name)} of {owner}; COCO files number classes by their category ids"
            )


def _plain(value):
    """The value with lists in the place of tuples, which configs hold alike."""
    return [*map(_plain, value)] if isinstance(value, list | tuple) else value
