"""The losses: hand-computed values, what padding may not change, finite gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.models import losses
from tests.models.tiny import tiny_model

LOG2 = np.log(2)


def test_smooth_l1_is_quadratic_below_beta_and_linear_above():
    distance = losses.smooth_l1(jnp.array([0.0, 0.05, 1 / 9, 1.0, -1.0]), jnp.zeros(5))
    np.testing.assert_allclose(distance, [0, 0.05**2 * 4.5, 1 / 18, 1 - 1 / 18, 1 - 1 / 18], rtol=1e-5)

    distance = losses.smooth_l1(jnp.array([0.0, 0.05, -1.0]), jnp.zeros(3), 0.0)
    np.testing.assert_allclose(distance, [0, 0.05, 1], rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 1e-40])  # the second is 0 in float32
def test_the_gradient_of_l1_is_the_sign_as_torch_has_it(beta):
    gradient = jax.grad(lambda x: jnp.sum(losses.smooth_l1(x, jnp.zeros(3), beta)))(jnp.array([0.0, 0.05, -1.0]))
    np.testing.assert_array_equal(gradient, [0, 1, -1])


def test_objectness_of_undecided_logits_is_log_two_over_the_valid_anchors():
    foreground = jnp.array([[True, False, True]])
    valid = jnp.array([[True, True, False]])
    assert losses.objectness_loss(jnp.zeros((1, 3)), foreground, valid) == pytest.approx(LOG2)
    logits = jnp.array([[0.0, 3.0, 99.0]])
    expected = (LOG2 + np.log1p(np.exp(3))) / 2
    assert losses.objectness_loss(logits, foreground, valid) == pytest.approx(expected, rel=1e-6)


def test_box_loss_sums_foreground_over_the_number_of_all_samples():
    deltas = jnp.array([[[1.0, 1.0, 0.0, 0.0], [5.0, 5.0, 5.0, 5.0], [7.0, 7.0, 7.0, 7.0]]])
    foreground = jnp.array([[True, False, True]])
    valid = jnp.array([[True, True, False]])
    loss = losses.box_loss(deltas, jnp.zeros((1, 3, 4)), foreground, valid)
    assert loss == pytest.approx(2 * (1 - 1 / 18) / 2, rel=1e-6)


def test_classification_of_equal_logits_is_the_log_of_the_number_of_classes():
    labels = jnp.array([[0, 3], [1, 2]])
    valid = jnp.array([[True, True], [False, True]])
    assert losses.classification_loss(jnp.zeros((2, 2, 5)), labels, valid) == pytest.approx(np.log(5), rel=1e-6)
    # The mean is over the RoIs of the whole batch, not over images: 2 of the first, 1 of the second.
    logits = jnp.zeros((2, 2, 5)).at[1, 1, 2].set(50.0)
    assert losses.classification_loss(logits, labels, valid) == pytest.approx(2 / 3 * np.log(5), rel=1e-6)


def test_class_weights_weigh_the_mean_and_a_batch_without_weight_costs_nothing():
    labels, valid = jnp.array([[0, 2, 1, 2]]), jnp.array([[True, True, True, False]])
    logits = jnp.zeros((1, 4, 3)).at[0, 2, 1].set(jnp.log(4.0))  # 4 of 6: the others are undecided
    loss = losses.classification_loss(logits, labels, valid, (0.1, 0.3, 0.2))
    wanted = (0.1 * np.log(3) + 0.2 * np.log(3) + 0.3 * np.log(6 / 4)) / (0.1 + 0.2 + 0.3)
    assert loss == pytest.approx(wanted, rel=1e-6)
    function = jax.value_and_grad(losses.classification_loss)
    value, gradient = function(logits, jnp.zeros((1, 4), jnp.int32), valid, (0.0, 1.0, 1.0))
    assert value == 0 and not gradient.any()
    equal = losses.classification_loss(logits, labels, valid, (5.0, 5.0, 5.0))
    assert equal == pytest.approx(float(losses.classification_loss(logits, labels, valid)), rel=1e-6)


def test_another_number_of_class_weights_than_of_classes_is_refused():
    with pytest.raises(UserError, match="class_weights has 4 numbers; use 5: the weight of the background, then"):
        tiny_model(class_weights=(1, 2, 3, 4))


def test_mask_loss_is_the_mean_over_the_pixels_of_foreground_rois():
    logits = jnp.zeros((1, 3, 2, 2)).at[0, 2].set(40.0)
    targets = jnp.zeros((1, 3, 2, 2)).at[0, 0].set(0.3)  # undecided logits cost log 2 whatever the soft target
    foreground = jnp.array([[True, True, False]])
    assert losses.mask_loss(logits, targets, foreground) == pytest.approx(LOG2, rel=1e-6)


def test_focal_loss_of_a_sure_class_is_less_than_that_of_an_undecided_one():
    # One RoI of class 1, one of background; two classes. Undecided: p = 1/2, so (1 - p)^2 = 1/4.
    labels, valid = jnp.array([[1, 0]]), jnp.ones((1, 2), bool)
    undecided = 0.25 * LOG2 * (0.25 + 0.75 + 2 * 0.75)  # alpha for the class that is there, 1 - alpha for the others
    assert losses.focal_loss(jnp.zeros((1, 2, 3)), labels, valid) == pytest.approx(undecided, rel=1e-6)
    p = 1 / (1 + np.exp(-2))
    logits = jnp.array([[[9.0, 2.0, -2.0], [-9.0, -2.0, -2.0]]])  # that of background counts for nothing
    expected = (1 - p) ** 2 * -np.log(p) * (0.25 + 0.75 + 2 * 0.75)
    assert losses.focal_loss(logits, labels, valid) == pytest.approx(expected, rel=1e-5)


def test_iou_and_giou_loss_of_half_overlapping_and_of_separate_boxes():
    boxes = jnp.array([[[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 9.0, 9.0]]])
    targets = jnp.array([[[1.0, 0.0, 3.0, 2.0], [3.0, 0.0, 4.0, 1.0], [7.0, 7.0, 8.0, 8.0]]])
    foreground = jnp.array([[True, True, False]])
    # IoU 2 / 6 and 0; in the hull of the second pair, 4 x 1, half is covered by neither.
    assert losses.iou_loss(boxes, targets, foreground) == pytest.approx((2 / 3 + 1) / 2, rel=1e-6)
    assert losses.giou_loss(boxes, targets, foreground) == pytest.approx((2 / 3 + 1.5) / 2, rel=1e-6)
    gradient = jax.grad(losses.giou_loss)(boxes, targets, foreground)
    assert float(gradient[0, 1, 2]) < 0, "the right side of the separate box is pulled towards its target"


def test_dice_loss_of_a_half_covered_mask():
    targets = jnp.zeros((1, 2, 2, 2)).at[0, 0, 0].set(1.0)
    logits = jnp.full((1, 2, 2, 2), -50.0).at[0, 0, :, 0].set(50.0)
    # One of two pixels each: (2 * 1 + 1) / (2 + 2 + 1). An empty mask found empty costs nothing.
    assert losses.dice_loss(logits, targets, jnp.array([[True, False]])) == pytest.approx(1 - 3 / 5, rel=1e-6)
    assert losses.dice_loss(logits, targets, jnp.array([[False, True]])) == pytest.approx(0, abs=1e-6)
    # Undecided everywhere: (2 * 1 + 1) / (4 / 4 + 2 + 1).
    assert losses.dice_loss(0 * logits, targets, jnp.array([[True, False]])) == pytest.approx(1 - 3 / 4, rel=1e-6)


def test_the_dice_loss_draws_back_from_a_mask_that_fills_its_box():
    targets = jnp.zeros((1, 1, 28, 28)).at[..., :14, :].set(1.0)
    gradient = jax.grad(lambda level: losses.dice_loss(level + 0 * targets, targets, jnp.ones((1, 1), bool)))
    low, high = (float(gradient(jax.scipy.special.logit(jnp.sqrt(0.5)) + step)) for step in (-0.1, 0.1))
    assert low < 0 < high, "the best level is the root of the share of the object"
    soft = targets * 0.5  # with shares of cells that are right everywhere nothing is to be moved
    slope = jax.grad(lambda logits: losses.dice_loss(logits, soft, jnp.ones((1, 1), bool)))(
        jnp.where(soft, 0.0, -50.0)
    )
    np.testing.assert_allclose(slope, 0, atol=1e-6)


def arguments(rng, rows):
    """Return the inputs of every loss with ``rows`` samples in each of two images."""

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    def flag():
        return rng.random((2, rows)) > 0.4

    def boxes():
        corner = rng.random((2, rows, 2), np.float32)
        return np.concatenate([corner, corner + rng.random((2, rows, 2), np.float32)], axis=-1)

    return {
        "objectness_loss": (normal(2, rows), flag(), flag()),
        "box_loss": (normal(2, rows, 4), normal(2, rows, 4), flag(), flag()),
        "classification_loss": (normal(2, rows, 6), rng.integers(0, 6, (2, rows)).astype(np.int32), flag()),
        "focal_loss": (normal(2, rows, 6), rng.integers(0, 6, (2, rows)).astype(np.int32), flag()),
        "iou_loss": (boxes(), boxes(), flag()),
        "giou_loss": (boxes(), boxes(), flag()),
        "dice_loss": (normal(2, rows, 4, 4), rng.random((2, rows, 4, 4), np.float32), flag()),
        "mask_loss": (normal(2, rows, 4, 4), rng.random((2, rows, 4, 4), np.float32), flag()),
    }


LOSSES = sorted(arguments(np.random.default_rng(0), 2))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("garbage", [0.0, 1e6])
def test_invalid_rows_change_no_loss(name, garbage):
    loss, inputs = jax.jit(jax.value_and_grad(getattr(losses, name))), arguments(np.random.default_rng(0), 8)[name]

    def pad(array):
        rows = np.full((2, 5, *array.shape[2:]), garbage if array.dtype == np.float32 else 0, array.dtype)
        return np.concatenate([array, rows], axis=1)

    padded = [pad(array) for array in inputs]
    # A sum of another length may be added in another order.
    (value, gradient), (expected, expected_gradient) = loss(*padded), loss(*inputs)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_array_equal(gradient[:, 8:], 0)
    np.testing.assert_allclose(gradient[:, :8], expected_gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", LOSSES)
def test_without_any_valid_row_the_loss_and_its_gradient_are_zero(name):
    loss, inputs = jax.jit(jax.value_and_grad(getattr(losses, name))), arguments(np.random.default_rng(0), 4)[name]
    value, gradient = loss(*inputs[:-1], np.zeros((2, 4), bool))
    assert float(value) == 0
    np.testing.assert_array_equal(gradient, 0)
    value, _ = loss(*(array[:, :0] for array in inputs))
    assert float(value) == 0


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_give_finite_losses_and_gradients(name):
    loss, inputs = jax.jit(jax.value_and_grad(getattr(losses, name))), arguments(np.random.default_rng(0), 4)[name]
    value, gradient = loss(inputs[0] * np.float32(1e4), *inputs[1:])
    assert bool(jnp.isfinite(value))
    assert bool(jnp.all(jnp.isfinite(gradient)))


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_losses_equal_eager_ones(name):
    loss, inputs = getattr(losses, name), arguments(np.random.default_rng(1), 7)[name]
    np.testing.assert_allclose(jax.jit(loss)(*inputs), loss(*map(jnp.asarray, inputs)), rtol=1e-6)


def test_the_gradient_of_smooth_l1_is_finite_and_bounded_everywhere():
    distances = jnp.array([0.0, 1 / 9, -1 / 9, 100.0, -100.0])
    gradient = jax.vmap(jax.grad(losses.smooth_l1))(distances, jnp.zeros(5))
    np.testing.assert_allclose(gradient, [0, 1, -1, 1, -1], rtol=1e-5)
