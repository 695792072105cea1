"""A run small enough for a test: 64-pixel shapes, a narrow ResNet-18, two steps an epoch."""

from collections.abc import Callable

import pytest
from ml_collections import ConfigDict

from maskrcnn_jax.config import load_config
from maskrcnn_jax.data.shapes import write_dataset


@pytest.fixture(scope="session")
def shapes_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "shapes"
    write_dataset(directory, num_train=16, num_val=5, image_size=64, seed=3)
    return directory


def _small(shapes_dir) -> ConfigDict:
    config = load_config("shapes")
    config.batch_size = 8
    config.eval_batch_size = 2
    config.epochs = 2
    config.eval_every = 1
    config.log_every = 2
    config.data.coco_dir = str(shapes_dir)
    config.data.short_side = config.data.long_side = 64
    tiny = {
        "stem_channels": 8,
        "stage_channels": 8,
        "fpn_channels": 16,
        "box_fc_channels": (32, 32),
        "mask_channels": 8,
        "rpn_batch_size_per_image": 32,
        "rpn_pre_nms_top_n_train": 32,
        "rpn_post_nms_top_n_train": 32,
        "rpn_pre_nms_top_n_test": 32,
        "rpn_post_nms_top_n_test": 32,
        "box_batch_size_per_image": 16,
        "box_detections_per_img": 10,
    }
    config.model.update(tiny)
    return config


@pytest.fixture
def config(shapes_dir) -> ConfigDict:
    return _small(shapes_dir)


@pytest.fixture(scope="session")
def make_config(shapes_dir) -> Callable[[], ConfigDict]:
    """Return what makes such a config, for fixtures of several tests."""
    return lambda: _small(shapes_dir)
