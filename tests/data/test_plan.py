"""Buckets, and the plan of the images that each step loads."""

import time

import numpy as np
import pytest

from maskrcnn_jax.data import transforms
from maskrcnn_jax.data.plan import Plan, buckets_for
from maskrcnn_jax.options import DataOptions


def buckets(short_side, long_side, mode="auto"):
    return buckets_for(DataOptions(short_side=short_side, long_side=long_side, buckets=mode))


def test_buckets_for_cocos_sizes():
    assert buckets(800, 1333) == [(800, 1088), (1088, 800), (800, 1344), (1344, 800)]


def test_buckets_are_rounded_up_and_listed_once():
    assert buckets(128, 128) == [(128, 128)]
    assert buckets(600, 1000) == [(608, 800), (800, 608), (608, 1024), (1024, 608)]
    assert buckets(100, 110) == [(128, 128)]
    assert buckets(800, 1333, "exact") == []


def plan_of(num_images, *, shuffle, batch_size=16, mode="auto", seed=3):
    rng = np.random.default_rng(0)
    sizes = np.array([(480, 640), (640, 480), (427, 640), (640, 359), (500, 500)])[rng.integers(5, size=num_images)]
    sizes = transforms.resized_sizes(sizes, 800, 1333)
    plan = Plan(
        sizes,
        np.arange(num_images),
        batch_size=batch_size,
        buckets=buckets(800, 1333, mode),
        shuffle=shuffle,
        seed=seed,
    )
    return plan, sizes


@pytest.mark.parametrize("mode", ["auto", "exact"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_image_of_a_batch_fits_the_bucket_of_the_batch(mode, shuffle):
    plan, sizes = plan_of(203, shuffle=shuffle, mode=mode)
    for step in range(plan.steps_per_epoch):
        images, bucket = plan.step(step)
        images = images[images >= 0]
        assert (sizes[images] <= bucket).all()
        if mode == "exact":
            assert (-(-sizes[images] // 32) * 32 == bucket).all()


def test_an_image_goes_to_the_smallest_bucket_that_holds_it():
    plan, sizes = plan_of(300, shuffle=False, batch_size=1)
    expected = {(800, 1066): (800, 1088), (1066, 800): (1088, 800), (800, 1199): (800, 1344), (1333, 747): (1344, 800)}
    for step in range(plan.steps_per_epoch):
        (image,), bucket = plan.step(step)
        assert bucket == expected.get(tuple(sizes[image].tolist()), (800, 1088))


def test_the_plan_of_evaluation_loses_and_repeats_nothing():
    plan, _ = plan_of(203, shuffle=False)
    images = np.concatenate([plan.step(step)[0] for step in range(plan.steps_per_epoch)])
    assert sorted(images[images >= 0]) == list(range(203))
    per_bucket = [plan.step(step)[0] for step in range(plan.steps_per_epoch)]
    assert all((np.diff(rows[rows >= 0]) > 0).all() and (rows[: (rows >= 0).sum()] >= 0).all() for rows in per_bucket)


def test_training_sees_every_image_every_epoch_and_fills_up_with_others_of_the_bucket():
    plan, _ = plan_of(203, shuffle=True)
    for epoch in range(3):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        images = np.concatenate([plan.step(step)[0] for step in steps])
        assert set(images) == set(range(203))
        assert all(len(set(plan.step(step)[0])) == 16 for step in steps)  # no image twice in a batch


def test_epochs_differ_and_seeds_differ_and_the_same_seed_repeats():
    def order(seed, epoch):
        plan, _ = plan_of(203, shuffle=True, seed=seed)
        return [plan.step(epoch * plan.steps_per_epoch + k)[0].tolist() for k in range(plan.steps_per_epoch)]

    assert order(3, 0) == order(3, 0)
    assert order(3, 5) == order(3, 5)
    assert order(3, 0) != order(3, 1)
    assert order(3, 0) != order(4, 0)


def test_cocos_training_set_is_planned_in_well_under_a_second():
    plan, _ = plan_of(118_287, shuffle=True)
    start = time.process_time()
    plan.step(plan.steps_per_epoch * 7)
    assert time.process_time() - start < 0.5
