import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.options import OptimOptions
from maskrcnn_jax.training.optimizer import make_optimizer, make_schedule


def make(**changes):
    return make_optimizer(OptimOptions(**({"clip_norm": 0.0, "weight_decay": 0.0} | changes)), lambda _: 0.1)


def update(optimizer, params, gradients):
    return optimizer.update(gradients, optimizer.init(params), params)[0]


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine():
    schedule = make_schedule(OptimOptions(lr=1.0, warmup_steps=10), 110)
    assert float(schedule(0)) == pytest.approx(0.001, rel=1e-4)  # a float32
    assert float(schedule(5)) == pytest.approx((0.001 + 1) / 2)
    assert float(schedule(10)) == pytest.approx(1.0)
    assert float(schedule(60)) == pytest.approx(0.5)
    assert float(schedule(110)) == pytest.approx(0.0, abs=1e-7)


def test_warm_up_takes_at_most_a_tenth_of_a_short_run():
    schedule = make_schedule(OptimOptions(lr=1.0), 50)
    assert float(schedule(5)) == pytest.approx(1.0)


def test_a_run_of_a_few_steps_starts_at_the_peak():
    schedule = make_schedule(OptimOptions(lr=1.0), 4)
    assert float(schedule(0)) == pytest.approx(1.0)


@pytest.mark.parametrize("lr", [float("nan"), 0.0, -1.0, float("inf")])
def test_a_learning_rate_that_is_not_a_positive_number_is_refused(lr):
    with pytest.raises(UserError, match="optim.lr is"):
        OptimOptions(lr=lr)


def test_a_run_without_steps_is_refused():
    with pytest.raises(UserError, match="the run has 0 steps"):
        make_schedule(OptimOptions(), 0)


def test_weight_decay_spares_biases_and_norms_unless_asked():
    params = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2)}
    zero = {"kernel": jnp.zeros((2, 2)), "scale": jnp.zeros(2)}
    spared = update(make(weight_decay=0.5), params, zero)
    np.testing.assert_allclose(spared["kernel"], -0.1 * 0.5 * np.ones((2, 2)), rtol=1e-6)
    np.testing.assert_array_equal(spared["scale"], np.zeros(2))
    everything = update(make(weight_decay=0.5, decay_norm_and_bias=True), params, zero)
    np.testing.assert_allclose(everything["scale"], -0.1 * 0.5 * np.ones(2), rtol=1e-6)


def test_adam_takes_a_first_step_of_the_learning_rate_whatever_the_gradient():
    params = {"kernel": jnp.zeros((1, 2))}
    step = update(make(), params, {"kernel": jnp.array([[100.0, -0.01]])})
    np.testing.assert_allclose(step["kernel"], [[-0.1, 0.1]], rtol=1e-4)


def test_clipping_scales_the_whole_gradient_down_to_the_norm():
    # Adam's second moment shows the clipped gradient: (1 - b2) * g^2.
    optimizer = make(clip_norm=1.0)
    params = {"kernel": jnp.zeros((1, 2))}
    _, state = optimizer.update({"kernel": jnp.array([[3.0, 4.0]])}, optimizer.init(params), params)
    second_moment = state[1][0].nu["kernel"]
    np.testing.assert_allclose(second_moment, 0.001 * np.array([[0.36, 0.64]]), rtol=1e-4)


@pytest.mark.parametrize(("frozen_stages", "frozen"), [(0, 0), (1, 1), (3, 3), (5, 5)])
def test_frozen_stages_keep_their_values_and_do_not_count_in_the_norm(frozen_stages, frozen):
    def layer():
        return {"kernel": nnx.Param(jnp.ones((2, 2)))}

    params = nnx.State({"backbone": {"stem": layer(), "stages": {i: layer() for i in range(4)}}, "rpn": layer()})
    gradients = jax.tree.map(lambda p: jnp.full_like(p, 0.5), params)  # each of norm 1
    steps = update(make(kind="sgd", momentum=0.0, clip_norm=1.0, frozen_stages=frozen_stages), params, gradients)
    stages = [steps["backbone"]["stem"], *(steps["backbone"]["stages"][i] for i in range(4)), steps["rpn"]]
    moved = [float(jnp.abs(stage["kernel"][...]).sum()) for stage in stages]
    expected = 0.1 * 2 / (6 - frozen) ** 0.5  # shared by those that are trained
    np.testing.assert_allclose(moved, [0.0] * frozen + [expected] * (6 - frozen), rtol=1e-5)
