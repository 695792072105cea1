"""Assignment of objects to boxes, and the balanced sample."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrcnn_jax.ops import matching
from maskrcnn_jax.ops.matching import BACKGROUND, IGNORED, ignore_covered

# Compiled as a whole: op by op, most of the time would go into compiling single operations.
match = jax.jit(matching.match, static_argnames=("high_threshold", "low_threshold", "allow_low_quality"))
sample_balanced = jax.jit(matching.sample_balanced, static_argnames=("size", "positive_fraction"))

GT = jnp.array([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]])
BOXES = jnp.array(
    [
        [0.0, 0.0, 10.0, 10.0],  # IoU 1 with the first
        [0.0, 0.0, 10.0, 7.0],  # 0.7
        [0.0, 0.0, 10.0, 5.0],  # 0.5
        [0.0, 0.0, 10.0, 2.0],  # 0.2
        [50.0, 50.0, 60.0, 54.0],  # 0.4 with the second
        [80.0, 80.0, 90.0, 90.0],  # nothing
    ]
)
BOTH = jnp.array([True, True])


def test_thresholds_split_boxes_into_foreground_ignored_and_background():
    matches = match(BOXES, GT, BOTH, high_threshold=0.7, low_threshold=0.3)
    assert matches.dtype == jnp.int32
    np.testing.assert_array_equal(matches, [0, 0, IGNORED, BACKGROUND, IGNORED, BACKGROUND])


def test_an_overlap_of_exactly_a_threshold_is_not_below_it():
    gt = jnp.array([[0.0, 0.0, 10.0, 8.0]])
    boxes = jnp.array([[0.0, 0.0, 10.0, 4.0], [0.0, 0.0, 10.0, 2.0]])  # 0.5 and 0.25, exact in binary
    matches = match(boxes, gt, jnp.ones(1, bool), high_threshold=0.5, low_threshold=0.25)
    np.testing.assert_array_equal(matches, [0, IGNORED])


def test_low_quality_matches_give_every_object_its_best_box():
    matches = match(BOXES, GT, BOTH, high_threshold=0.7, low_threshold=0.3, allow_low_quality=True)
    np.testing.assert_array_equal(matches, [0, 0, IGNORED, BACKGROUND, 1, BACKGROUND])


def test_low_quality_matches_include_all_boxes_that_tie():
    boxes = jnp.array([[0.0, 0.0, 10.0, 2.0], [0.0, 8.0, 10.0, 10.0], [0.0, 0.0, 10.0, 1.0]])
    matches = match(boxes, GT[:1], BOTH[:1], high_threshold=0.7, low_threshold=0.3, allow_low_quality=True)
    np.testing.assert_array_equal(matches, [0, 0, BACKGROUND])


def test_an_object_that_overlaps_nothing_makes_every_box_foreground():
    """As torchvision's Matcher: zero is then the best overlap of that object, and all boxes tie."""
    gt = jnp.array([[0.0, 0.0, 10.0, 10.0], [200.0, 200.0, 210.0, 210.0]])
    matches = match(BOXES, gt, BOTH, high_threshold=0.7, low_threshold=0.3, allow_low_quality=True)
    np.testing.assert_array_equal(matches, [0] * 6)


@pytest.mark.parametrize("flat", [[20.0, 0.0, 20.0, 9.0], [3.0, 5.0, 9.0, 5.0], [9.0, 9.0, 3.0, 3.0]])
def test_an_object_without_area_takes_no_box(flat):
    gt = jnp.array([[0.0, 0.0, 10.0, 10.0], flat])
    matches = match(BOXES, gt, BOTH, high_threshold=0.7, low_threshold=0.3, allow_low_quality=True)
    np.testing.assert_array_equal(matches, [0, 0, IGNORED, BACKGROUND, BACKGROUND, BACKGROUND])


def test_of_equal_overlaps_the_first_object_is_taken():
    gt = jnp.stack([GT[0], GT[0]])
    matches = match(BOXES[:1], gt, BOTH, high_threshold=0.5, low_threshold=0.5)
    np.testing.assert_array_equal(matches, [0])


@pytest.mark.parametrize("low_quality", [False, True])
def test_without_valid_objects_all_is_background(low_quality):
    kwargs = {"high_threshold": 0.7, "low_threshold": 0.3, "allow_low_quality": low_quality}
    np.testing.assert_array_equal(match(BOXES, GT, ~BOTH, **kwargs), [BACKGROUND] * 6)
    np.testing.assert_array_equal(match(BOXES, GT[:0], BOTH[:0], **kwargs), [BACKGROUND] * 6)
    assert match(BOXES[:0], GT, BOTH, **kwargs).shape == (0,)


@pytest.mark.parametrize("low_quality", [False, True])
def test_invalid_objects_change_no_match(low_quality):
    kwargs = {"high_threshold": 0.7, "low_threshold": 0.3, "allow_low_quality": low_quality}
    garbage = jnp.array([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 0.0, 0.0], [1e9, -1e9, -5.0, 1e9]])
    padded = match(BOXES, jnp.concatenate([GT, garbage]), jnp.array([True, True, False, False, False]), **kwargs)
    np.testing.assert_array_equal(padded, match(BOXES, GT, BOTH, **kwargs))


def test_a_box_without_area_is_background_and_an_object_without_area_matches_nothing():
    boxes = jnp.array([[3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 10.0, 10.0]])
    gt = jnp.array([[3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 10.0, 10.0]])
    np.testing.assert_array_equal(match(boxes, gt, BOTH, high_threshold=0.5, low_threshold=0.5), [BACKGROUND, 1])


@pytest.mark.slow
def test_matching_compiled_equals_eager_and_vmap_equals_a_loop(key):
    corner, size = jax.random.uniform(key, (2, 3, 20, 2)) * 50
    boxes = jnp.concatenate([corner, corner + size], axis=-1)
    gt, valid = boxes[:, 10:14] + 3, jnp.array([[True] * 4, [True, False] * 2, [False] * 4])

    def function(boxes, gt, valid):
        return matching.match(boxes, gt, valid, high_threshold=0.7, low_threshold=0.3, allow_low_quality=True)

    loop = jnp.stack([function(*row) for row in zip(boxes, gt, valid, strict=True)])
    np.testing.assert_array_equal(jax.jit(function)(boxes[0], gt[0], valid[0]), loop[0])
    np.testing.assert_array_equal(jax.vmap(function)(boxes, gt, valid), loop)


def counts(sample):
    return int(jnp.sum(sample.valid & sample.foreground)), int(jnp.sum(sample.valid & ~sample.foreground))


@pytest.mark.parametrize(
    ("num_foreground", "num_background", "size", "fraction", "expected"),
    [
        (50, 150, 64, 0.25, (16, 48)),  # plenty of both
        (5, 195, 64, 0.25, (5, 59)),  # background fills what foreground leaves
        (100, 10, 64, 0.25, (16, 10)),  # foreground does not fill what background leaves
        (0, 200, 64, 0.5, (0, 64)),
        (200, 0, 64, 0.5, (32, 0)),
        (0, 0, 64, 0.5, (0, 0)),
        (80, 20, 512, 0.25, (80, 20)),  # fewer candidates than asked for: the limit is 512 / 4, not 100 / 4
        (0, 3, 8, 0.5, (0, 3)),
    ],
)
def test_counts_follow_torchvisions_sampler(key, num_foreground, num_background, size, fraction, expected):
    total = max(num_foreground + num_background, 100)
    kind = jax.random.permutation(key, jnp.arange(total))
    foreground = kind < num_foreground
    background = (kind >= num_foreground) & (kind < num_foreground + num_background)
    sample = sample_balanced(key, foreground, background, size=size, positive_fraction=fraction)
    assert counts(sample) == expected
    index = np.asarray(sample.index)[np.asarray(sample.valid)]
    assert len(set(index.tolist())) == len(index), "drawn twice"
    # Foreground first, then background, then invalid rows.
    f, b = expected
    np.testing.assert_array_equal(sample.foreground, np.arange(len(sample.index)) < f)
    np.testing.assert_array_equal(sample.valid, np.arange(len(sample.index)) < f + b)
    assert np.all(np.asarray(foreground)[index[:f]]) and np.all(np.asarray(background)[index[f:]])
    assert np.all((sample.index >= 0) & (sample.index < total))


def test_ignored_candidates_are_never_drawn_and_all_others_about_equally_often():
    foreground = jnp.arange(40) < 10
    background = (jnp.arange(40) >= 10) & (jnp.arange(40) < 30)  # 30..39 are ignored
    keys = jax.random.split(jax.random.key(7), 2000)
    sample = jax.vmap(lambda k: sample_balanced(k, foreground, background, size=12, positive_fraction=0.5))(keys)
    assert bool(jnp.all(sample.valid))
    drawn = np.bincount(np.asarray(sample.index).reshape(-1), minlength=40) / 2000
    np.testing.assert_array_equal(drawn[30:], 0)
    # Binomial with p = 0.6 and 0.3: standard deviation 0.011, so 0.05 is beyond four of them.
    np.testing.assert_allclose(drawn[:10], 6 / 10, atol=0.05)
    np.testing.assert_allclose(drawn[10:30], 6 / 20, atol=0.05)


def test_the_key_decides_the_draw(key):
    foreground = jnp.arange(100) < 30

    def draw(key):
        return matching.sample_balanced(key, foreground, ~foreground, size=16, positive_fraction=0.5).index

    np.testing.assert_array_equal(draw(key), draw(key))
    np.testing.assert_array_equal(jax.jit(draw)(key), draw(key))
    keys = jax.random.split(key, 3)
    np.testing.assert_array_equal(jax.vmap(draw)(keys), jnp.stack([draw(k) for k in keys]))
    assert not np.array_equal(draw(keys[0]), draw(keys[1]))


def test_background_inside_a_region_is_ignored_and_foreground_is_not():
    boxes = jnp.array([[0, 0, 10, 10], [0, 0, 10, 10], [6, 0, 16, 10], [5, 0, 15, 10], [30, 30, 40, 40.0]])
    matches = jnp.array([BACKGROUND, 3, BACKGROUND, BACKGROUND, BACKGROUND])
    regions = jnp.array([[0, 0, 10, 20], [30, 30, 50, 50.0]])
    ignored = ignore_covered(matches, boxes, regions, jnp.array([True, False]))
    # The third box has 4 of its 10 columns in the region, the fourth 5: half is enough. The last region is invalid.
    assert ignored.tolist() == [IGNORED, 3, BACKGROUND, IGNORED, BACKGROUND]


def test_without_regions_nothing_is_ignored():
    matches = jnp.array([BACKGROUND, 0])
    boxes = jnp.array([[0, 0, 10, 10], [0, 0, 0, 0.0]])
    for regions in (jnp.zeros((0, 4)), jnp.zeros((2, 4))):
        assert ignore_covered(matches, boxes, regions, jnp.ones(len(regions), bool)).tolist() == [BACKGROUND, 0]


def test_blocks_of_objects_are_matched_as_all_at_once(monkeypatch):
    """Among them equal objects in different blocks, of which the first counts, and invalid ones."""
    rng = np.random.default_rng(5)
    corner, gt_corner = rng.uniform(0, 60, (300, 2)), rng.uniform(0, 60, (37, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 30, (300, 2))], axis=1)
    gt = np.concatenate([gt_corner, gt_corner + rng.uniform(5, 30, (37, 2))], axis=1)
    boxes[0] = gt[20] = gt[3]
    valid = jnp.asarray(rng.uniform(size=37) < 0.8).at[jnp.array([3, 20])].set(True)

    def matches(block):
        monkeypatch.setattr(matching, "_BLOCK", block)
        options = {"high_threshold": 0.6, "low_threshold": 0.3, "allow_low_quality": True}
        return np.asarray(matching.match(jnp.asarray(boxes), jnp.asarray(gt), valid, **options))

    whole = matches(37)
    assert len(set(whole.tolist())) > 20 and whole[0] == 3
    for block in (1, 8, 16):
        np.testing.assert_array_equal(matches(block), whole)
