"""Box arithmetic against hand-computed values and its symmetries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrcnn_jax.ops import boxes as box_ops

WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def random_boxes(seed, count, side=100.0):
    corner, size = np.random.default_rng(seed).random((2, count, 2), np.float32)
    return np.concatenate([corner * side, corner * side + size * side / 2 + 1], axis=-1)


def test_area_is_width_times_height_without_a_pixel_added():
    areas = box_ops.box_area(jnp.array([[0.0, 0.0, 10.0, 5.0], [3.0, 3.0, 3.0, 9.0]]))
    np.testing.assert_array_equal(areas, [50.0, 0.0])


def test_iou_of_known_boxes():
    a = jnp.array([[0.0, 0.0, 10.0, 10.0]])
    b = jnp.array(
        [
            [0.0, 0.0, 10.0, 10.0],  # the same
            [5.0, 0.0, 15.0, 10.0],  # half of each: 50 / 150
            [10.0, 0.0, 20.0, 10.0],  # touching
            [2.0, 2.0, 4.0, 4.0],  # inside: 4 / 100
            [20.0, 20.0, 30.0, 30.0],  # apart
        ]
    )
    np.testing.assert_allclose(box_ops.box_iou(a, b), [[1, 1 / 3, 0, 0.04, 0]], rtol=1e-6)


def test_iou_of_boxes_without_area_is_zero_and_never_nan():
    boxes = jnp.array([[5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 0.0, 0.0]])
    iou = box_ops.box_iou(boxes, boxes)
    np.testing.assert_array_equal(iou, [[0, 0, 0], [0, 1, 0], [0, 0, 0]])


def test_iou_does_not_change_when_both_sides_are_shifted_scaled_or_flipped(optimized):
    a, b = random_boxes(0, 7), random_boxes(1, 5)
    box_iou = jax.jit(box_ops.box_iou)
    expected = box_iou(a, b)

    def flip(boxes):
        return np.stack([200 - boxes[:, 2], boxes[:, 1], 200 - boxes[:, 0], boxes[:, 3]], axis=-1)

    # Shifting by integers below 256 loses a few of float32's 24 bits.
    np.testing.assert_allclose(box_iou(a + 32, b + 32), expected, atol=2e-6)
    np.testing.assert_array_equal(box_iou(a * 4, b * 4), expected)
    np.testing.assert_allclose(box_iou(flip(a), flip(b)), expected, atol=2e-6)
    np.testing.assert_array_equal(box_iou(b, a), expected.T)


def test_iou_of_no_boxes_is_an_empty_table():
    assert box_ops.box_iou(jnp.zeros((0, 4)), jnp.zeros((3, 4))).shape == (0, 3)


def test_offsets_of_known_boxes():
    references = jnp.array([[0.0, 0.0, 10.0, 20.0], [0.0, 0.0, 10.0, 20.0]])
    boxes = jnp.array([[0.0, 0.0, 10.0, 20.0], [5.0, -10.0, 25.0, 30.0]])  # the second: centre (15, 10), 20 x 40
    deltas = box_ops.encode_boxes(boxes, references, (1.0, 1.0, 1.0, 1.0))
    np.testing.assert_allclose(deltas, [[0, 0, 0, 0], [1, 0, np.log(2), np.log(2)]], rtol=1e-6)
    weighted = box_ops.encode_boxes(boxes, references, WEIGHTS)
    np.testing.assert_allclose(weighted[1], [10, 0, 5 * np.log(2), 5 * np.log(2)], rtol=1e-6)


def test_decoding_inverts_encoding():
    boxes, references = jnp.asarray(random_boxes(0, 50)), jnp.asarray(random_boxes(1, 50))
    deltas = box_ops.encode_boxes(boxes, references, WEIGHTS)
    # Coordinates up to 150 in float32: 150 * 2^-24 per operation.
    np.testing.assert_allclose(box_ops.decode_boxes(deltas, references, WEIGHTS), boxes, atol=1e-4)


def test_boxes_without_area_have_zero_offsets_and_finite_gradients():
    boxes = jnp.array([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 5.0, 5.0], [4.0, 4.0, 2.0, 8.0]])
    references = jnp.array([[0.0, 0.0, 8.0, 8.0], [2.0, 2.0, 2.0, 9.0], [0.0, 0.0, 8.0, 8.0]])
    np.testing.assert_array_equal(box_ops.encode_boxes(boxes, references, WEIGHTS), jnp.zeros((3, 4)))
    total = jax.grad(lambda b, r: box_ops.encode_boxes(b, r, WEIGHTS).sum(), argnums=(0, 1))
    gradients = jax.jit(total)(boxes, references)
    assert all(jnp.all(jnp.isfinite(g)) for g in gradients)


def test_growth_is_limited_so_that_decoding_never_overflows():
    reference = jnp.array([[0.0, 0.0, 16.0, 16.0]])
    box = box_ops.decode_boxes(jnp.array([[0.0, 0.0, 1e4, 1e4]]), reference, (1.0, 1.0, 1.0, 1.0))
    np.testing.assert_allclose(box, [[-492, -492, 508, 508]], rtol=1e-5)  # 62.5 * 16 = 1000 wide around 8


def test_clipping_is_to_height_and_width_in_this_order():
    clipped = box_ops.clip_boxes(jnp.array([[-5.0, -5.0, 500.0, 500.0], [1.0, 2.0, 3.0, 4.0]]), jnp.array([100, 200]))
    np.testing.assert_array_equal(clipped, [[0, 0, 200, 100], [1, 2, 3, 4]])


def test_a_box_is_large_when_both_sides_reach_the_minimum():
    boxes = jnp.array([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9], [3.0, 0.0, 1.0, 9.0]])
    np.testing.assert_array_equal(box_ops.is_large(boxes, 2.0), [True, False, False])


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    [
        box_ops.box_area,
        lambda b: box_ops.box_iou(b, b[::-1]),
        lambda b: box_ops.encode_boxes(b, b[::-1], WEIGHTS),
        lambda b: box_ops.decode_boxes(b / 100, b[::-1], WEIGHTS),
        lambda b: box_ops.clip_boxes(b, jnp.array([60, 70])),
        lambda b: box_ops.is_large(b, 10.0),
    ],
    ids=["area", "iou", "encode", "decode", "clip", "is_large"],
)
def test_compiled_equals_eager_and_vmap_equals_a_loop(function):
    batch = jnp.asarray(random_boxes(0, 12)).reshape(3, 4, 4)
    loop = jnp.stack([function(boxes) for boxes in batch])
    # Compiled programs may contract a multiplication and an addition, which rounds once instead of twice.
    np.testing.assert_allclose(jax.jit(function)(batch[0]), loop[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(function)(batch), loop, rtol=1e-5, atol=1e-5)
