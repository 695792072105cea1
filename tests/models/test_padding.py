"""What padding may not change: the losses, their gradients, and the detections of the whole network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maskrcnn_jax.models.proposals import select_proposals
from maskrcnn_jax.ops.anchors import grid_anchors
from maskrcnn_jax.structures import Proposals
from tests.models.tiny import SIDE, all_finite, tiny_batch

HEAD_TERMS = ("loss_box_reg", "loss_mask", "loss_rpn_box_reg")


def pad_objects(batch, rows, garbage):
    """Append invalid objects whose fields hold ``garbage``."""

    def pad(array, value):
        fill = np.full((array.shape[0], rows, *array.shape[2:]), value, array.dtype)
        return np.concatenate([array, fill], axis=1)

    gt = batch.gt
    gt = gt._replace(
        boxes=pad(gt.boxes, garbage), labels=pad(gt.labels, 4), masks=pad(gt.masks, 255), valid=pad(gt.valid, False)
    )
    return batch._replace(gt=gt)


def assert_same(actual, expected, rtol=2e-5):
    """Sums over longer arrays may be added in another order: a few float32 roundings."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol * max(float(jnp.max(jnp.abs(e))), 1e-6))


def test_what_invalid_objects_hold_changes_no_loss_and_no_gradient(tiny_functions, key):
    losses = tiny_functions[0]
    batch = tiny_batch()
    expected = losses(batch, key)
    for garbage in (0.0, 1e9, np.nan):
        boxes = np.where(batch.gt.valid[..., None], batch.gt.boxes, np.float32(garbage))
        masks = np.where(batch.gt.valid[..., None, None], batch.gt.masks, np.uint8(255))
        changed = batch._replace(gt=batch.gt._replace(boxes=boxes, masks=masks))
        for a, e in zip(jax.tree.leaves(losses(changed, key)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, e)


def test_more_invalid_objects_change_no_match_of_the_anchors(tiny):
    """The draw of anchors follows from the matches alone; of RoIs, another number of candidates is another draw."""
    batch = tiny_batch()
    anchors = [jnp.asarray(a) for a in grid_anchors((SIDE, SIDE), [(16, 16), (8, 8)], (8, 16), (0.5, 1.0, 2.0))]
    expected = tiny.match_anchors(anchors, batch.gt)
    for garbage in (0.0, 30.0, np.nan):
        np.testing.assert_array_equal(tiny.match_anchors(anchors, pad_objects(batch, 3, garbage).gt), expected)
    assert bool((expected >= 0).any())


def test_invalid_proposals_and_objects_are_never_sampled(tiny, key):
    batch = pad_objects(tiny_batch(), 4, 3.0)
    rng = np.random.default_rng(0)
    corner = rng.uniform(200, 230, (2, 12, 2))  # far from the objects, which are the only foreground
    boxes = np.concatenate([corner, corner + 20], axis=-1).astype(np.float32)
    valid = np.arange(12) < np.array([[8], [0]])
    boxes[~valid] = 1e9
    rois = tiny.sample_rois(key, Proposals(jnp.asarray(boxes), jnp.zeros((2, 12)), jnp.asarray(valid)), batch.gt)
    assert float(jnp.max(jnp.where(rois.valid[..., None], rois.boxes, 0))) < 1000
    # Every valid candidate is drawn: 8 proposals and 2 objects, 0 proposals and 2 objects.
    np.testing.assert_array_equal(rois.valid.sum(axis=1), [10, 2])
    foreground = rois.valid & (rois.labels > 0)
    np.testing.assert_array_equal(np.asarray(rois.gt_index)[np.asarray(foreground)] < 2, True)
    assert not bool(jnp.any((rois.labels > 0) & ~rois.valid))


def test_an_image_without_objects_gives_finite_losses_and_gradients(tiny_functions, key):
    batch = tiny_batch()
    valid = batch.gt.valid.copy()
    valid[1] = False
    terms, metrics, gradients = tiny_functions[0](batch._replace(gt=batch.gt._replace(valid=valid)), key)
    assert all_finite((terms, metrics, gradients))
    assert all(float(term) > 0 for term in terms.values())


def test_a_batch_without_objects_has_no_box_or_mask_loss_and_finite_gradients(tiny_functions, key):
    batch = tiny_batch()
    empty = batch._replace(gt=batch.gt._replace(valid=np.zeros_like(batch.gt.valid)))
    terms, metrics, gradients = tiny_functions[0](empty, key)
    assert all_finite((terms, metrics, gradients))
    assert [float(terms[name]) for name in HEAD_TERMS] == [0, 0, 0]
    assert float(terms["loss_objectness"]) > 0
    assert float(terms["loss_classifier"]) > 0
    assert all(float(jnp.abs(g).max()) == 0 for g in jax.tree.leaves(gradients.mask_head))


def test_a_batch_without_valid_rows_gives_zero_losses_and_zero_gradients(tiny_functions, key):
    batch = tiny_batch()
    batch = batch._replace(valid=np.zeros(2, bool), sizes=np.zeros((2, 2), np.int32))
    terms, metrics, gradients = tiny_functions[0](batch, key)
    assert all_finite(metrics)
    assert [float(term) for term in terms.values()] == [0] * 5
    assert all(float(jnp.abs(g).max()) == 0 for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("filler", ["copy", "zeros"])
def test_batch_rows_marked_invalid_change_no_loss_and_no_gradient(tiny_functions, key, filler):
    """With frozen norms. Trained batch statistics are taken over all rows, so that fillers do count there.

    The keys of the images are split from one key, so the draws agree as long as the number of rows does.
    """
    batch = tiny_batch(batch_size=2)
    other = tiny_batch(batch_size=2, seed=1)
    mask = np.array([True, False])

    def rows(a, b):
        return np.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b if filler == "copy" else np.zeros_like(b))

    filled = jax.tree.map(rows, batch, other)._replace(valid=mask)
    assert_same(tiny_functions[0](filled, key), tiny_functions[0](batch._replace(valid=mask), key))


def test_objects_that_touch_the_border_or_have_no_area_give_finite_losses_and_gradients(tiny_functions, key):
    batch = tiny_batch()
    boxes = batch.gt.boxes.copy()
    boxes[0, 0] = [0, 0, SIDE, SIDE]
    boxes[0, 1] = [SIDE - 1, SIDE - 1, SIDE, SIDE]
    boxes[1, 0] = [5, 5, 5, 5]
    boxes[1, 1] = [5, 5, 5.001, 60]
    assert all_finite(tiny_functions[0](batch._replace(gt=batch.gt._replace(boxes=boxes)), key))


@pytest.mark.slow
def test_detections_stay_inside_the_image_however_large_the_canvas(tiny_functions):
    """Equal detections cannot be asked for: what biases and norms make of the padding reaches into the image."""
    detect = tiny_functions[1]
    images = np.zeros((1, 128, 128, 3), np.uint8)
    images[:, :40, :48] = np.random.default_rng(0).integers(0, 256, (40, 48, 3))
    sizes = np.array([[40, 48]], np.int32)
    small, large = detect(images[:, :64, :64], sizes), detect(images, sizes)
    assert bool(small.valid.any())
    for detections in (small, large):
        boxes = np.asarray(detections.boxes)[np.asarray(detections.valid)]
        assert np.all(boxes >= 0)
        assert np.all(boxes[:, [0, 2]] <= 48)
        assert np.all(boxes[:, [1, 3]] <= 40)


def test_more_anchors_with_lower_scores_change_no_proposal():
    """A larger canvas adds anchors; those that are not among the best of their level leave no trace."""
    rng = np.random.default_rng(0)
    shapes, sizes = [(8, 8), (4, 4)], (8.0, 16.0)
    anchors = grid_anchors((64, 64), shapes, sizes, (1.0, 2.0))
    scores = [rng.normal(size=len(level)).astype(np.float32) for level in anchors]
    deltas = [rng.normal(size=level.shape).astype(np.float32) * 0.2 for level in anchors]
    select = jax.jit(
        lambda o, d, a: select_proposals(
            o, d, a, jnp.array([60, 50]), pre_nms_top_n=20, post_nms_top_n=15, nms_thresh=0.5, min_size=1e-3
        )
    )
    expected = select(scores, deltas, anchors)
    more = [np.concatenate([level, level[:5] + 3]) for level in anchors]
    lower = [np.concatenate([level, np.full(5, -50, np.float32)]) for level in scores]
    padded = select(lower, [np.concatenate([level, level[:5]]) for level in deltas], more)
    assert bool(expected.valid.all())
    for a, e in zip(padded, expected, strict=True):
        np.testing.assert_array_equal(a, e)


def test_what_lies_in_the_padding_changes_no_detection(tiny_functions):
    detect = tiny_functions[1]
    images = np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 3), dtype=np.uint8)
    sizes = np.array([[40, 48]], np.int32)
    clean = images.copy()
    clean[:, 40:], clean[:, :, 48:] = 0, 0
    for a, e in zip(detect(images, sizes), detect(clean, sizes), strict=True):
        np.testing.assert_array_equal(a, e)


def test_images_of_a_batch_do_not_influence_each_other(tiny_functions):
    """With running or frozen statistics every image is on its own."""
    detect = tiny_functions[1]
    images = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    sizes = np.array([[64, 64], [40, 48]], np.int32)
    both = detect(images, sizes)
    swapped = detect(images[::-1], sizes[::-1])
    for a, e in zip(swapped, both, strict=True):
        # The position in the batch may change how a convolution is blocked.
        np.testing.assert_allclose(np.asarray(a)[::-1], e, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("used", [0, 1, 2, 3, 6])
def test_masks_of_used_slots_do_not_depend_on_how_many_are_computed(tiny, used):
    rng = np.random.default_rng(0)
    features = [jnp.asarray(rng.normal(size=(2, SIDE // s, SIDE // s, 16)), jnp.float32) for s in (4, 8, 16, 32)]
    corner = rng.uniform(0, SIDE / 2, (2, 6, 2))
    boxes = jnp.asarray(np.concatenate([corner, corner + SIDE / 3], axis=-1), jnp.float32)
    labels = jnp.asarray(rng.integers(1, 5, (2, 6)), jnp.int32)
    valid = np.zeros((2, 6), bool)
    valid[0, :used] = valid[1, : used // 2] = True
    graphdef, state = nnx.split(tiny)
    run = jax.jit(
        lambda state, valid: nnx.merge(graphdef, state).mask_logits(features, boxes, labels, valid, (64, 64))
    )
    some, everything = run(state, valid), run(state, np.ones((2, 6), bool))
    np.testing.assert_allclose(some[valid], everything[valid], rtol=0, atol=1e-5)
