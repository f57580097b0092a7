"""Data loaders for training that resumes exactly, and for evaluation."""

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from detectron2.config import CfgNode, configurable
from detectron2.data import (
    DatasetCatalog,
    DatasetFromList,
    DatasetMapper,
    MapDataset,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.build import trivial_batch_collator
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.file_io import PathManager
from torch.utils.data import DataLoader, Dataset

from ..config import is_inpainting
from ..errors import UserError
from ..inpaint.data import InpaintMapper
from .checks import check_image

logger = logging.getLogger(__name__)


def check_datasets(names: Iterable[str]) -> None:
    """Checks that the files of registered datasets are there, before anything expensive starts.

    Raises:
        UserError: a dataset is unknown, or its annotations or images are missing; the message
            names the path looked for and the variable that sets it.
    """
    for name in names:
        if name not in DatasetCatalog:
            raise UserError(f"dataset {name!r} of DATASETS.TRAIN or TEST is not registered")
        metadata = MetadataCatalog.get(name)
        for key in ("json_file", "image_root", "panoptic_json", "panoptic_root", "sem_seg_root"):
            path = metadata.get(key)
            if path and not PathManager.exists(path):
                cure = metadata.get("how_to_get", "put it there")
                raise UserError(
                    f"dataset {name!r}: {os.path.abspath(path)} does not exist; {cure}, or set "
                    "DETECTRON2_DATASETS to the folder that holds your datasets "
                    f"(now {os.environ.get('DETECTRON2_DATASETS', 'datasets')!r})"
                )


class CarafeDatasetMapper(DatasetMapper):
    """Detectron2's mapper, but an image that cannot be read is reported by its file name.

    Raises:
        UserError: the image is missing, does not decode, would be misread, or is not of the
            annotated size.
    """

    def __call__(self, dataset_dict: dict) -> dict:
        check_image(dataset_dict)
        try:
            return super().__call__(dataset_dict)
        # What Pillow raises for files it cannot decode, and Detectron2 for a wrong size.
        except (OSError, SyntaxError, SizeMismatchError) as error:
            raise UserError(f"cannot read image {dataset_dict['file_name']}: {error}") from error


def build_mapper(cfg: CfgNode, is_train: bool) -> Callable[[dict], dict]:
    """Builds what makes of Detectron2's dict of an image the input of the config's model."""
    mapper = InpaintMapper if is_inpainting(cfg) else CarafeDatasetMapper
    return mapper(cfg, is_train)


class _SeededDataset(Dataset):
    """Maps (seed, index) to ``dataset[index]`` with the augmentation's randomness set by seed."""

    def __init__(self, dataset: Dataset):
        self._dataset = dataset

    def __getitem__(self, seed_and_index: tuple[int, int]):
        seed, index = seed_and_index
        seed_all_rng(seed)
        return self._dataset[index]


class TrainLoader:
    """An endless loader of training batches whose iteration i is the same whenever it is asked for.

    The order of the images, their augmentation and the random state that the model sees in
    iteration i are functions of ``seed``, i and the rank alone. So training goes on after an
    interruption exactly as it would have gone on without it: set ``seed`` and ``start_iter`` to
    those of the checkpoint before the first batch is taken.

    The images of all processes' batches together, and their augmentation, are the same whatever
    the number of processes is, unless orientations are batched apart.

    Attributes:
        seed: determines everything random in training.
        start_iter: the iteration of the first batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        wide: Sequence[bool] | None,
        build_sampler,
        *,
        seed: int,
        batch_size: int,
        num_workers: int = 0,
        keep_seed: bool = False,
    ):
        """
        Args:
            dataset: map-style dataset of mapped images.
            wide: for each image whether it is wider than high, to batch images of one orientation
                together; None batches them as they come.
            build_sampler: makes of a seed the endless sampler of indices into ``dataset``.
            seed: see above.
            batch_size: images in a batch of this process.
            num_workers: data-loading processes.
            keep_seed: whether the seed of a checkpoint is not to replace ``seed``.
        """
        self.seed = seed
        self._keep_seed = keep_seed
        self.start_iter = 0
        self._dataset = _SeededDataset(dataset)
        self._wide = wide
        self._build_sampler = build_sampler
        self._batch_size = batch_size
        self._num_workers = num_workers

    def state_dict(self) -> dict:
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict) -> None:
        if not self._keep_seed:
            self.seed = state_dict["seed"]
        elif self.seed != state_dict["seed"]:
            logger.warning(f"Resuming with SEED changed from {state_dict['seed']} to {self.seed}.")

    def _seed_of(self, *key: int) -> int:
        """A seed for one thing in training, independent of those of other keys."""
        return int(np.random.SeedSequence([self.seed, *key]).generate_state(1)[0])

    def _batches(self) -> Iterator[list[int]]:
        """All batches of indices, from iteration 0."""
        groups: tuple[list[int], list[int]] = ([], [])
        for index in self._build_sampler(self.seed):
            group = groups[self._wide is not None and self._wide[index]]
            group.append(index)
            if len(group) == self._batch_size:
                yield group.copy()
                group.clear()

    def _seeded_batches(self) -> Iterator[list[tuple[int, int]]]:
        batches = itertools.islice(enumerate(self._batches()), self.start_iter, None)
        # The samplers deal the images out to the processes in turn; counted from 1, for a key with
        # a zero at its end gives the seed of the key without it.
        rank, processes = comm.get_rank(), comm.get_world_size()
        for iteration, batch in batches:
            yield [
                (self._seed_of(0, iteration, 1 + rank + processes * i), index)
                for i, index in enumerate(batch)
            ]

    def __iter__(self) -> Iterator[list[dict]]:
        # A generator, so that nothing happens before the first batch is taken: the trainer makes
        # its iterator before it knows the iteration that it resumes from.
        loader = DataLoader(
            self._dataset,
            batch_sampler=self._seeded_batches(),
            num_workers=self._num_workers,
            collate_fn=trivial_batch_collator,
        )
        for iteration, batch in enumerate(loader, start=self.start_iter):
            seed_all_rng(self._seed_of(comm.get_rank(), iteration))
            yield batch


def _train_loader_from_config(cfg: CfgNode) -> dict:
    loader = cfg.DATALOADER
    # Read only for the sampler that takes them, so that they are known to be idle. Those of `get`
    # are missing in Detectron2 0.6.
    options = {}
    if loader.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
        options["repeat_threshold"] = loader.REPEAT_THRESHOLD
        options["repeat_sqrt"] = loader.get("REPEAT_SQRT", True)
    if loader.SAMPLER_TRAIN == "RandomSubsetTrainingSampler":
        options["random_subset_ratio"] = loader.get("RANDOM_SUBSET_RATIO", 1.0)
    return {
        **options,
        "dataset": get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=loader.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=(
                cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
            ),
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        ),
        "mapper": build_mapper(cfg, True),
        "total_batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "sampler": loader.SAMPLER_TRAIN,
        "aspect_ratio_grouping": loader.ASPECT_RATIO_GROUPING,
        "num_workers": loader.NUM_WORKERS,
        "seed": cfg.SEED,
    }


@configurable(from_config=_train_loader_from_config)
def build_train_loader(
    dataset: list[dict],
    *,
    mapper: Callable[[dict], dict],
    total_batch_size: int,
    sampler: str = "TrainingSampler",
    repeat_threshold: float = 0.0,
    repeat_sqrt: bool = True,
    random_subset_ratio: float = 1.0,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    seed: int = -1,
) -> TrainLoader:
    """Builds the training loader; the counterpart of Detectron2's ``build_detection_train_loader``,
    from a config with the same keys or from explicit arguments.

    Args:
        dataset: Detectron2's dicts of images, see
            :func:`detectron2.data.get_detection_dataset_dicts`.
        mapper: makes of such a dict what the model takes, e.g. :class:`CarafeDatasetMapper`.
        total_batch_size: images in a batch of all processes together (SOLVER.IMS_PER_BATCH).
        sampler: "TrainingSampler", "RepeatFactorTrainingSampler" or "RandomSubsetTrainingSampler"
            of Detectron2 (DATALOADER.SAMPLER_TRAIN).
        repeat_threshold: of the second (DATALOADER.REPEAT_THRESHOLD).
        repeat_sqrt: likewise, whether images are repeated by the square root of what they are rarer
            than that (DATALOADER.REPEAT_SQRT); Detectron2 0.6 knows no other way.
        random_subset_ratio: of the third (DATALOADER.RANDOM_SUBSET_RATIO).
        aspect_ratio_grouping: whether a process batches images of one orientation together.
        num_workers: data-loading processes of each process.
        seed: determines everything random in training; a negative one is replaced by a random one.

    Raises:
        UserError: the sampler is unknown, or the batch cannot be shared among the processes.
    """
    samplers = {
        "TrainingSampler": lambda seed: TrainingSampler(len(dataset), seed=seed),
        "RepeatFactorTrainingSampler": lambda seed: RepeatFactorTrainingSampler(
            RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
                dataset, repeat_threshold, **({} if repeat_sqrt else {"sqrt": False})
            ),
            seed=seed,
        ),
        "RandomSubsetTrainingSampler": lambda seed: RandomSubsetTrainingSampler(
            len(dataset), random_subset_ratio, seed_shuffle=seed, seed_subset=seed
        ),
    }
    if sampler not in samplers:
        raise UserError(
            "the sampler, DATALOADER.SAMPLER_TRAIN or dataloader.train.sampler, must be one of "
            f"{', '.join(samplers)}, got {sampler!r}"
        )

    batch_size, rest = divmod(total_batch_size, comm.get_world_size())
    if rest or not batch_size:
        raise UserError(
            f"a batch of {total_batch_size} images cannot be shared among {comm.get_world_size()} "
            "processes: SOLVER.IMS_PER_BATCH or dataloader.train.total_batch_size must be a "
            "multiple of their number"
        )

    # Datasets of semantic segmentation alone do not know the sizes of their images.
    grouped = aspect_ratio_grouping and all("width" in d for d in dataset)
    return TrainLoader(
        MapDataset(DatasetFromList(dataset, copy=False), mapper),
        [d["width"] > d["height"] for d in dataset] if grouped else None,
        samplers[sampler],
        seed=seed if seed >= 0 else comm.shared_random_seed(),
        batch_size=batch_size,
        num_workers=num_workers,
        keep_seed=seed >= 0,
    )


def build_test_loader(cfg: CfgNode, dataset_name: str):
    """Detectron2's test loader with the mapper that reports unreadable images by name."""
    return build_detection_test_loader(cfg, dataset_name, mapper=build_mapper(cfg, is_train=False))
