"""The training recipes of torchvision and detectron2 in configs/."""

import numpy as np
import pytest

from maskrcnn_jax.config import load_config, to_options
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.training.optimizer import make_schedule

TRAIN2017 = 118_287  # images


@pytest.mark.parametrize(
    ("name", "num_steps", "rates"),
    [
        # Images of COCO fall into four padded sizes, so that an epoch has a few steps more than these.
        (
            "torchvision_r50_fpn:train",
            26 * 7393,
            {0: 2e-5, 1000: 0.02, 16 * 7393 - 1: 0.02, 16 * 7393: 2e-3, 22 * 7393: 2e-4},
        ),
        ("torchvision_r50_fpn_v2:train", 400 * 1849, {0: 1e-4, 1000: 0.1, 352 * 1849: 0.01, 384 * 1849: 1e-3}),
        ("detectron2_r50_fpn:1x", 90_000, {0: 2e-5, 500: 0.01001, 59_999: 0.02, 60_000: 2e-3, 80_000: 2e-4}),
        ("detectron2_r101_fpn:3x", 270_000, {0: 2e-5, 209_999: 0.02, 210_000: 2e-3, 250_000: 2e-4}),
        ("detectron2_r50_fpn_lsj", 184_375, {0: 6.7e-3, 500: 0.1, 163_889: 0.01, 177_546: 1e-3}),
        # Its warm-up is four times as long, because detectron2 gives it as a share of the run.
        ("detectron2_r50_fpn_lsj:400ep", 737_500, {0: 6.7e-3, 1000: 0.05335, 2000: 0.1, 4 * 163_889: 0.01}),
    ],
)
def test_the_learning_rate_is_that_of_the_published_recipe(name, num_steps, rates):
    options = to_options(load_config(name))
    steps_per_epoch = -(-TRAIN2017 // options.batch_size)
    all_epochs = options.epochs * steps_per_epoch
    assert min(all_epochs, options.max_steps or all_epochs) == num_steps
    schedule = make_schedule(options.optim, num_steps, steps_per_epoch)
    np.testing.assert_allclose([schedule(step) for step in rates], list(rates.values()), rtol=1e-4)  # float32


@pytest.mark.parametrize("name", ["detectron2_r50_fpn:1x", "detectron2_r101_fpn:3x", "detectron2_r50_fpn_lsj:400ep"])
def test_recipes_in_steps_have_as_many_with_a_larger_batch(name):
    options = to_options(load_config(name))
    assert options.epochs * (TRAIN2017 // (4 * options.batch_size)) >= options.max_steps > 0


@pytest.mark.parametrize(
    ("name", "schedule"),
    [("torchvision_r50_fpn", "train"), ("torchvision_r50_fpn_v2", "train"), ("detectron2_r50_fpn", "1x")],
)
def test_a_recipe_trains_the_network_of_the_published_weights(name, schedule):
    published, trained = (to_options(load_config(which)).model for which in (name, f"{name}:{schedule}"))
    differences = {field for field, value in vars(published).items() if value != getattr(trained, field)}
    # torchvision trained with the epsilon of its ImageNet backbone, and set the COCO weights' to 0 afterwards.
    assert differences == ({"norm_eps"} if name == "torchvision_r50_fpn" else set())


def test_other_schedules_are_refused_with_those_that_exist():
    for name, message in {
        "torchvision_r50_fpn:1x": "no '1x' after the colon; give train",
        "torchvision_r50_fpn_v2:lsj": "no 'lsj' after the colon; give train",
        "detectron2_r101_fpn:2x": "no schedule '2x'; give one of 1x, 3x",
        "detectron2_r50_fpn_lsj:50ep": "no schedule '50ep'; give one of 100ep, 200ep, 400ep",
    }.items():
        with pytest.raises(UserError, match=message):
            load_config(name)
