"""Buckets, and the plan of the images that each step loads."""

import numpy as np
import pytest

from maskrcnn_jax.data import transforms
from maskrcnn_jax.data.dataset import load_coco
from maskrcnn_jax.data.plan import Plan, buckets_for, draw_repeats, repeat_factors
from maskrcnn_jax.options import DataOptions
from tests.data.loading import load
from tests.limits import cpu_time_below


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
    with cpu_time_below(0.5):
        plan.step(plan.steps_per_epoch * 7)


# Repeat-factor sampling


def labelled(dataset, labels, **fields):
    """A dataset whose image i has one object of each category in ``labels[i]``."""
    pairs = [(image, label) for image, of_image in enumerate(labels, 1) for label in of_image]
    objects = [
        {"id": i, "image_id": image, "category_id": label, "bbox": [4, 4, 8, 8], "iscrowd": 0} | fields
        for i, (image, label) in enumerate(pairs, 1)
    ]
    names = [(1, "common"), (2, "rare"), (3, "rarer")]
    return load_coco(dataset.write([(24, 32)] * len(labels), objects, names=names), "train2017")


def test_rare_categories_repeat_their_images_as_in_lvis(dataset):
    index = labelled(dataset, [[1], [1], [1], [1], [1, 2], [1, 1, 2], [1, 3], []])
    factors = repeat_factors(index, np.arange(8), 0.5)
    # The categories are in 7, 2 and 1 of 8 images: sqrt(0.5 / 0.25) and sqrt(0.5 / 0.125).
    np.testing.assert_allclose(factors, [1, 1, 1, 1, 2**0.5, 2**0.5, 2, 1], rtol=1e-12)
    assert repeat_factors(index, np.arange(8), 0.1).tolist() == [1] * 8, "nothing is so rare"
    # Of the last four images 2 and 1 have them.
    np.testing.assert_allclose(repeat_factors(index, np.arange(4, 8), 0.75), [1.5**0.5, 1.5**0.5, 3**0.5, 1])


def test_systematic_sampling_rounds_every_factor_and_their_sum():
    factors = np.array([1.0, 1.25, 2.5, 1.0, 1.75])
    # Sums 1, 2.25, 4.75, 5.75, 7.5; with the offset floored to 1, 2, 5, 6, 8 and 1, 2, 4, 5, 7.
    assert draw_repeats(factors, 0.5).tolist() == [1, 1, 3, 1, 2]
    assert draw_repeats(factors, 0.0).tolist() == [1, 1, 2, 1, 2]
    drawn = np.array([draw_repeats(factors, offset) for offset in (np.arange(1000) + 0.5) / 1000])
    np.testing.assert_allclose(drawn.mean(axis=0), factors, atol=1e-9)


def repeating_plan(**changes):
    sizes = np.array([(24, 32)] * 9 + [(32, 24)] * 4)
    repeats = np.array([1, 1, 1.3, 1.3, 2.6, 1, 1, 1, 1.2, 1, 3.5, 1, 1])
    arguments = {"batch_size": 4, "buckets": [(24, 32), (32, 24)], "shuffle": True, "seed": 0, "repeats": repeats}
    return Plan(sizes, np.arange(13), **arguments | changes), repeats


def test_an_epoch_shows_each_image_its_factor_rounded_down_or_up_and_always_has_as_many_steps():
    plan, repeats = repeating_plan(batch_size=1)
    # The factors of the buckets add up to 11.4 + 6.5; rows that an epoch does not fill show other images again.
    assert plan.steps_per_epoch == 12 + 7
    totals = np.zeros(13)
    for epoch in range(300):
        images = [plan.step(epoch * 19 + step)[0][0] for step in range(19)]
        counts = np.bincount(images, minlength=13)
        assert (counts >= np.floor(repeats)).all()
        assert (counts > np.ceil(repeats)).sum() <= 2
        totals += counts
    assert (totals / 300 >= repeats - 0.1).all()
    assert (totals / 300 <= repeats + 0.3).all()


def test_repeated_images_keep_their_bucket_and_depend_on_seed_and_epoch_alone():
    plan, _ = repeating_plan()
    assert plan.steps_per_epoch == 3 + 2
    steps = [plan.step(step) for step in range(50)]
    assert {bucket for images, bucket in steps if (images < 9).all()} == {(24, 32)}
    assert all((images < 9).all() or (images >= 9).all() for images, _ in steps)
    again, _ = repeating_plan()
    for step in (31, 4, 49):  # as a resumed run asks, in any order
        np.testing.assert_array_equal(again.step(step)[0], steps[step][0])
    other, _ = repeating_plan(seed=1)
    assert any((other.step(step)[0] != steps[step][0]).any() for step in range(5))


def test_the_threshold_makes_epochs_of_the_loader_longer(dataset):
    index = labelled(dataset, [[1]] * 15 + [[2]])
    settings = {"batch_size": 1, "short_side": 24, "long_side": 32, "train": True, "annotations": True}
    assert load(index, **settings).steps_per_epoch == 16
    repeated = load(index, **settings, repeat_threshold=1.0)
    # The category is in a sixteenth: its image appears four times; the other is in 15: sqrt(16 / 15) of 15 images.
    assert repeated.steps_per_epoch == int(np.ceil(4 + 15 * (16 / 15) ** 0.5))
    assert sum(batch.image_index[0] == 15 for batch in repeated) in (4, 5)
    assert load(index, **settings | {"train": False}, repeat_threshold=1.0).steps_per_epoch == 16
