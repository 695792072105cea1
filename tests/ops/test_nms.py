"""Non-maximum suppression against hand-computed results and a plain greedy loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrcnn_jax import ops
from maskrcnn_jax.ops.cpu.nms import nms_one_by_one
from maskrcnn_jax.ops.nms import nms_in_rounds

# Compiled as a whole: op by op, most of the time would go into compiling single operations.
_STATIC = ("iou_threshold", "score_threshold", "max_picks", "method", "sigma", "class_agnostic")
class_nms = jax.jit(ops.class_nms, static_argnames=_STATIC)


@pytest.fixture(params=[ops.nms, nms_one_by_one, nms_in_rounds], ids=lambda form: form.__name__)
def nms(request):
    return jax.jit(request.param, static_argnames="iou_threshold")


def random_boxes(seed, *shape):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 60, (*shape, 2))
    return np.concatenate([corner, corner + rng.uniform(1, 40, (*shape, 2))], axis=-1).astype(np.float32)


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    intersection = width * height
    return intersection / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection)


def greedy(boxes, threshold):
    kept = []
    for i, box in enumerate(boxes):
        if all(iou(boxes[j], box) <= threshold for j in kept):
            kept.append(i)
    return kept


def test_only_boxes_that_overlap_a_kept_box_go(nms):
    boxes = jnp.array(
        [
            [0.0, 0.0, 10.0, 10.0],
            [0.0, 0.0, 10.0, 8.0],  # 0.8 with the first: goes
            [0.0, 0.0, 10.0, 5.0],  # 0.5 with the first, 0.625 with the second, which is gone: stays
            [30.0, 0.0, 40.0, 10.0],
        ]
    )
    keep = nms(boxes, jnp.ones(4, bool), iou_threshold=0.6)
    np.testing.assert_array_equal(keep, [True, False, True, True])


def test_an_overlap_of_exactly_the_threshold_is_kept(nms):
    boxes = jnp.array([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 5.0]])  # IoU 0.5, exact in binary
    valid = jnp.ones(2, bool)
    np.testing.assert_array_equal(nms(boxes, valid, iou_threshold=0.5), [True, True])
    np.testing.assert_array_equal(nms(boxes, valid, iou_threshold=0.4999), [True, False])


def test_invalid_boxes_are_never_kept_and_suppress_nothing(nms):
    boxes = jnp.array([[0.0, 0.0, 10.0, 10.0]] * 3)
    keep = nms(boxes, jnp.array([False, True, True]), iou_threshold=0.5)
    np.testing.assert_array_equal(keep, [False, True, False])
    np.testing.assert_array_equal(nms(boxes, jnp.zeros(3, bool), iou_threshold=0.5), [False] * 3)


def test_boxes_without_area_do_not_suppress_each_other(nms):
    boxes = jnp.zeros((3, 4))
    np.testing.assert_array_equal(nms(boxes, jnp.ones(3, bool), iou_threshold=0.5), [True] * 3)


def test_no_boxes_give_an_empty_mask():
    assert ops.nms(jnp.zeros((0, 4)), jnp.zeros(0, bool), iou_threshold=0.5).shape == (0,)


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_the_kept_boxes_are_those_of_the_greedy_loop(nms, threshold):
    boxes = random_boxes(0, 120)
    keep = nms(jnp.asarray(boxes), jnp.ones(120, bool), iou_threshold=threshold)
    np.testing.assert_array_equal(np.flatnonzero(keep), greedy(boxes, threshold))


def test_shifted_and_scaled_boxes_keep_the_same_rows(nms):
    boxes = random_boxes(1, 60)
    valid = jnp.ones(60, bool)
    expected = nms(jnp.asarray(boxes), valid, iou_threshold=0.5)
    np.testing.assert_array_equal(nms(jnp.asarray(boxes * 8), valid, iou_threshold=0.5), expected)
    np.testing.assert_array_equal(nms(jnp.asarray(boxes + 16), valid, iou_threshold=0.5), expected)


@pytest.mark.parametrize("form", [nms_one_by_one, nms_in_rounds])
@pytest.mark.slow
def test_nms_compiled_equals_eager_and_vmap_equals_a_loop(form):
    boxes, valid = jnp.asarray(random_boxes(2, 3, 30)), jnp.asarray(np.random.default_rng(0).random((3, 30)) > 0.3)
    function = functools.partial(form, iou_threshold=0.4)
    loop = jnp.stack([function(b, v) for b, v in zip(boxes, valid, strict=True)])
    np.testing.assert_array_equal(jax.jit(function)(boxes[0], valid[0]), loop[0])
    np.testing.assert_array_equal(jax.vmap(function)(boxes, valid), loop)


def test_rounds_go_on_as_long_as_the_longest_chain(nms):
    # Each box overlaps its neighbours only: the second goes, so that the third stays, so that the fourth goes, ...
    left = jnp.arange(40.0)
    boxes = jnp.stack([left * 6, jnp.zeros(40), left * 6 + 10, jnp.full(40, 10.0)], axis=1)
    keep = nms(boxes, jnp.ones(40, bool), iou_threshold=0.2)
    np.testing.assert_array_equal(np.flatnonzero(keep), np.arange(0, 40, 2))


def full_class_nms(boxes, scores, iou_threshold, score_threshold, max_picks):
    """Suppress class by class, then merge: the textbook form, as (score, class, box)."""
    picks = []
    for c in range(scores.shape[1]):
        order = [n for n in np.argsort(-scores[:, c], kind="stable") if scores[n, c] > score_threshold]
        kept = greedy(boxes[order, c], iou_threshold)
        picks += [(scores[order[i], c], c, order[i]) for i in kept]
    return sorted(picks, key=lambda pick: (-pick[0], pick[1], pick[2]))[:max_picks]


@pytest.mark.parametrize("max_picks", [5, 400])
@pytest.mark.parametrize("ties", [False, True])
def test_class_nms_equals_suppressing_every_class_alone(max_picks, ties):
    rng = np.random.default_rng(3)
    boxes = random_boxes(3, 40, 5)
    scores = rng.uniform(0, 1, (40, 5)).astype(np.float32)
    if ties:
        scores = np.round(scores, 1)
    expected = full_class_nms(boxes, scores, 0.3, 0.2, max_picks)
    picks = class_nms(
        jnp.asarray(boxes), jnp.asarray(scores), iou_threshold=0.3, score_threshold=0.2, max_picks=max_picks
    )
    assert int(picks.valid.sum()) == len(expected)
    assert np.all(np.asarray(picks.valid)[: len(expected)])
    actual = zip(picks.scores.tolist(), picks.class_index.tolist(), picks.box_index.tolist(), strict=True)
    assert list(actual)[: len(expected)] == [(float(s), c, n) for s, c, n in expected]


def test_a_score_of_exactly_the_threshold_is_not_picked():
    boxes = jnp.array([[[0.0, 0.0, 10.0, 10.0]], [[20.0, 0.0, 30.0, 10.0]]])
    picks = class_nms(boxes, jnp.array([[0.25], [0.5]]), iou_threshold=0.5, score_threshold=0.25, max_picks=2)
    np.testing.assert_array_equal(picks.valid, [True, False])
    assert int(picks.box_index[0]) == 1


def test_class_nms_keeps_an_overlap_of_exactly_the_threshold():
    boxes = jnp.array([[[0.0, 0.0, 10.0, 10.0]], [[0.0, 0.0, 10.0, 5.0]]])
    picks = class_nms(boxes, jnp.array([[0.9], [0.8]]), iou_threshold=0.5, score_threshold=0.0, max_picks=2)
    np.testing.assert_array_equal(picks.valid, [True, True])


def test_rows_without_score_change_no_pick():
    boxes, scores = (
        jnp.asarray(random_boxes(4, 20, 3)),
        jnp.asarray(np.random.default_rng(4).random((20, 3), np.float32)),
    )
    options = {"iou_threshold": 0.3, "score_threshold": 0.05, "max_picks": 10}
    expected = class_nms(boxes, scores, **options)
    padded = class_nms(jnp.concatenate([boxes, boxes[:7]]), jnp.concatenate([scores, jnp.zeros((7, 3))]), **options)
    for actual, wanted in zip(padded, expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)


def test_nothing_above_the_threshold_gives_no_picks():
    picks = class_nms(jnp.zeros((4, 2, 4)), jnp.zeros((4, 2)), iou_threshold=0.5, score_threshold=0.05, max_picks=3)
    assert not bool(picks.valid.any())


@pytest.mark.slow
def test_class_nms_compiled_equals_eager_and_vmap_equals_a_loop():
    boxes = jnp.asarray(random_boxes(5, 3, 15, 4))
    # The images stop after different numbers of picks.
    scores = (
        jnp.asarray(np.random.default_rng(5).random((3, 15, 4), np.float32)) * jnp.array([1, 0.3, 0.06])[:, None, None]
    )

    def function(boxes, scores):
        return ops.class_nms(boxes, scores, iou_threshold=0.5, score_threshold=0.05, max_picks=20)

    loop = [function(b, s) for b, s in zip(boxes, scores, strict=True)]
    compiled, mapped = jax.jit(function)(boxes[0], scores[0]), jax.vmap(function)(boxes, scores)
    for i in range(4):
        np.testing.assert_array_equal(compiled[i], loop[0][i])
        np.testing.assert_array_equal(mapped[i], jnp.stack([picks[i] for picks in loop]))


def soft_nms(boxes, scores, method, iou_threshold, score_threshold, sigma=0.5):
    """Soft-NMS of one class, line by line as in the paper, in float64: (score, row) of what is kept."""
    left = {row: float(score) for row, score in enumerate(scores) if score > score_threshold}
    kept = []
    while left:
        best = max(left, key=left.get)
        kept.append((left.pop(best), best))
        for row in list(left):
            overlap = iou(boxes[best], boxes[row])
            if method == "gaussian":
                left[row] *= np.exp(-(overlap**2) / sigma)
            elif overlap > iou_threshold:
                left[row] *= 1 - overlap
            if left[row] <= score_threshold:
                del left[row]
    return kept


def test_soft_suppression_lowers_scores_as_computed_by_hand():
    # The second box is the upper half of the first one, IoU 1/2, the third apart.
    boxes = jnp.array([[[0.0, 0.0, 10.0, 10.0]], [[0.0, 0.0, 10.0, 5.0]], [[20.0, 0.0, 30.0, 10.0]]])
    scores = jnp.array([[0.9], [0.8], [0.5]])
    options = {"iou_threshold": 0.3, "score_threshold": 0.1, "max_picks": 3}
    hard = class_nms(boxes, scores, **options)
    linear = class_nms(boxes, scores, method="linear", **options)
    gaussian = class_nms(boxes, scores, method="gaussian", sigma=0.5, **options)
    np.testing.assert_allclose(hard.scores, [0.9, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(linear.scores, [0.9, 0.5, 0.4], atol=1e-6)  # 0.8 * (1 - 1/2)
    np.testing.assert_array_equal(linear.box_index, [0, 2, 1])
    np.testing.assert_allclose(gaussian.scores, [0.9, 0.5, 0.8 * np.exp(-0.5)], rtol=1e-6)  # (1/2)^2 / 0.5 = 0.5
    dropped = class_nms(boxes, scores, method="linear", **(options | {"score_threshold": 0.4}))
    np.testing.assert_array_equal(dropped.valid, [True, True, False])  # 0.4 is not above 0.4


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_suppression_equals_the_algorithm_of_the_paper_in_each_class(method):
    boxes = random_boxes(6, 30, 3)
    scores = np.random.default_rng(6).uniform(0, 1, (30, 3)).astype(np.float32)
    picks = class_nms(
        jnp.asarray(boxes), jnp.asarray(scores), iou_threshold=0.3, score_threshold=0.2, max_picks=90, method=method
    )
    expected = []
    for c in range(3):
        expected += [(score, c, row) for score, row in soft_nms(boxes[:, c], scores[:, c], method, 0.3, 0.2)]
    expected.sort(reverse=True)
    number = int(picks.valid.sum())
    assert number == len(expected) and 10 < number < 90
    np.testing.assert_allclose(picks.scores[:number], [score for score, _, _ in expected], rtol=1e-5)
    np.testing.assert_array_equal(picks.class_index[:number], [c for _, c, _ in expected])
    np.testing.assert_array_equal(picks.box_index[:number], [row for _, _, row in expected])


@pytest.mark.parametrize("method", ["hard", "gaussian"])
def test_suppression_among_all_classes_equals_that_of_one_class_with_all_boxes(method):
    boxes = random_boxes(7, 20, 4)
    scores = np.random.default_rng(7).uniform(0, 1, (20, 4)).astype(np.float32)
    options = {"iou_threshold": 0.4, "score_threshold": 0.1, "max_picks": 80, "method": method}
    picks = class_nms(jnp.asarray(boxes), jnp.asarray(scores), class_agnostic=True, **options)
    one = class_nms(jnp.asarray(boxes.reshape(80, 1, 4)), jnp.asarray(scores.reshape(80, 1)), **options)
    np.testing.assert_array_equal(picks.scores, one.scores)
    number = int(one.valid.sum())
    rows = np.asarray(picks.box_index * 4 + picks.class_index)
    np.testing.assert_array_equal(rows[:number], one.box_index[:number])
    apart = class_nms(jnp.asarray(boxes), jnp.asarray(scores), **options)
    assert number < int(apart.valid.sum())
