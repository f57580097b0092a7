"""COCO 2017, shorter side 800, longer side at most 1333, half of the training images flipped."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts

from carafe_d2.data.build import CarafeDatasetMapper, build_train_loader
from carafe_d2.evaluation import CarafeCOCOEvaluator

dataloader = dict(
    train=L(build_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_train"),
        mapper=L(CarafeDatasetMapper)(
            is_train=True,
            augmentations=[
                L(T.ResizeShortestEdge)(
                    short_edge_length=(800,), max_size=1333, sample_style="choice"
                ),
                L(T.RandomFlip)(),
            ],
            image_format="RGB",
            use_instance_mask=True,
        ),
        total_batch_size=16,
        num_workers=4,
        seed="${train.seed}",
    ),
    test=L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_val", filter_empty=False),
        mapper=L(CarafeDatasetMapper)(
            is_train=False,
            augmentations=[
                L(T.ResizeShortestEdge)(short_edge_length=800, max_size=1333, sample_style="choice")
            ],
            image_format="${...train.mapper.image_format}",
        ),
        num_workers="${..train.num_workers}",
    ),
    evaluator=L(CarafeCOCOEvaluator)(
        dataset_name="${..test.dataset.names}",
        output_dir="${train.output_dir}/inference",
    ),
)
