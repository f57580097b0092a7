import itertools

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from PIL import Image

from carafe_d2.data.build import (
    CarafeDatasetMapper,
    TrainLoader,
    build_test_loader,
    build_train_loader,
    check_datasets,
)
from carafe_d2.errors import UserError


class RandomItems:
    """A dataset whose items hold their index and a number of each random generator."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return index, np.random.rand(), torch.rand(()).item()


def loader(seed=7, num_workers=0, wide=None, batch_size=3):
    return TrainLoader(
        RandomItems(),
        wide,
        lambda seed: TrainingSampler(10, seed=seed),
        seed=seed,
        batch_size=batch_size,
        num_workers=num_workers,
    )


def steps(loader, count):
    """The batches, each with a number that a model would draw while it works on the batch."""
    return [(batch, torch.rand(()).item()) for batch in itertools.islice(loader, count)]


def steps_of_two(monkeypatch, count):
    """The steps of each of two processes, whose batches have two images each."""
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        yield steps(loader(batch_size=2), count)


def test_resumed_batches_and_random_state_are_those_of_the_uninterrupted_run():
    whole = steps(loader(), 12)
    resumed = loader(seed=1)
    resumed.load_state_dict(loader().state_dict())
    resumed.start_iter = 5
    assert steps(resumed, 7) == whole[5:]


def test_workers_change_nothing():
    assert steps(loader(num_workers=2), 6) == steps(loader(), 6)


def test_state_set_after_the_iterator_was_made_counts():
    """Detectron2's trainer makes the iterator first and loads the checkpoint then."""
    late = loader(seed=1)
    iterator = iter(late)
    late.seed, late.start_iter = 7, 2
    assert next(iterator) == steps(loader(), 3)[2][0]


def test_seeds_and_iterations_differ():
    draws = [
        draw
        for batch, step_draw in steps(loader(), 5) + steps(loader(seed=8), 5)
        for draw in [step_draw, *(d for item in batch for d in item[1:])]
    ]
    assert len(set(draws)) == len(draws)


def test_an_epoch_has_every_image_once():
    indices = [item[0] for batch, _ in steps(loader(batch_size=5), 4) for item in batch]
    assert sorted(indices[:10]) == sorted(indices[10:]) == list(range(10))
    assert indices[:10] != indices[10:]


def test_images_and_augmentation_do_not_depend_on_the_number_of_processes(monkeypatch):
    whole = [sorted(batch) for batch, _ in steps(loader(batch_size=4), 6)]
    shares = steps_of_two(monkeypatch, 6)
    assert [sorted(a + b) for (a, _), (b, _) in zip(*shares, strict=True)] == whole


def test_processes_draw_numbers_of_their_own(monkeypatch):
    """In the model, say for the sampling of RoIs."""
    draws = {draw for share in steps_of_two(monkeypatch, 3) for _, draw in share}
    assert len(draws) == 6


def test_orientations_are_batched_as_by_detectron2():
    wide = [i % 3 == 0 for i in range(10)]
    ours = [[item[0] for item in batch] for batch, _ in steps(loader(wide=wide), 20)]
    stream = ({"index": i, "width": 1 + wide[i], "height": 1} for i in TrainingSampler(10, seed=7))
    # Detectron2 counts only width > height as wide, so does the loader's caller.
    theirs = itertools.islice(AspectRatioGroupedDataset(stream, 3), 20)
    assert ours == [[item["index"] for item in batch] for batch in theirs]


@pytest.fixture
def broken_dataset(tmp_path):
    """Registers a dataset of one image, to be spoilt by the test; yields its file."""
    name = "broken_for_test"
    file = tmp_path / "image.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file)
    record = {"file_name": str(file), "image_id": 0, "width": 8, "height": 8, "annotations": []}
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(thing_classes=["thing"])
    yield file
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def broken_config():
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("broken_for_test",)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 1
    return cfg


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(b"no image"),
        lambda file: file.write_bytes(file.read_bytes()[:40]),
        lambda file: file.unlink(),
        lambda file: Image.new("RGB", (9, 8)).save(file),
    ],
    ids=["foreign", "truncated", "missing", "other size"],
)
def test_unreadable_image_is_named(broken_dataset, spoil):
    spoil(broken_dataset)
    cfg = broken_config()
    for batches in (build_train_loader(cfg), build_test_loader(cfg, cfg.DATASETS.TEST[0])):
        with pytest.raises(UserError, match=f"cannot read image {broken_dataset}"):
            next(iter(batches))


def test_mapper_passes_good_images(broken_dataset):
    record = DatasetCatalog.get("broken_for_test")[0]
    assert CarafeDatasetMapper(broken_config(), is_train=False)(record)["image"].shape[0] == 3


def test_loader_from_explicit_arguments(broken_dataset):
    """What LazyConfigs call; an image in each batch of the one that the dataset has."""
    records = DatasetCatalog.get("broken_for_test")
    options = {"mapper": lambda record: record["image_id"], "total_batch_size": 2}
    samplers = ["TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"]
    for sampler in samplers:
        built = build_train_loader(records, sampler=sampler, seed=3, **options)
        assert built.seed == 3
        assert next(iter(built)) == [0, 0]


def test_repeat_factors_without_a_square_root(broken_dataset, monkeypatch):
    """By a key that Detectron2 0.6 lacks, as its sampler does."""
    cfg = broken_config()
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.5
    seen = []
    monkeypatch.setattr(
        RepeatFactorTrainingSampler,
        "repeat_factors_from_category_frequency",
        lambda dataset, threshold, sqrt=True: seen.append((threshold, sqrt)) or torch.ones(1),
    )
    for sqrt in (True, False):
        cfg.DATALOADER.REPEAT_SQRT = sqrt
        next(iter(build_train_loader(cfg, mapper=lambda record: record["image_id"])))
    assert seen == [(0.5, True), (0.5, False)]


def test_wrong_keys_are_named(broken_dataset, monkeypatch):
    cfg = broken_config()
    cfg.DATALOADER.SAMPLER_TRAIN = "BestSampler"
    with pytest.raises(UserError, match=r"DATALOADER.SAMPLER_TRAIN .*'BestSampler'"):
        build_train_loader(cfg)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match=r"batch of 1 images .* 2 processes: SOLVER\.IMS_PER_BATCH"):
        build_train_loader(broken_config())


def test_missing_dataset_names_path_and_variable(tmp_path):
    name = "missing_for_test"
    DatasetCatalog.register(name, list)
    try:
        check_datasets([name])  # nothing is known of where its files are
        MetadataCatalog.get(name).set(json_file=str(tmp_path / "absent.json"))
        with pytest.raises(UserError, match=r"absent\.json does not exist.*DETECTRON2_DATASETS"):
            check_datasets([name])
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    with pytest.raises(UserError, match=r"'nonsense' .* is not registered"):
        check_datasets(["nonsense"])
