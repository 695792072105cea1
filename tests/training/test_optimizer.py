import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.options import ModelOptions, OptimOptions
from maskrcnn_jax.training.optimizer import is_decayed, make_optimizer, make_schedule


def make(**changes):
    return make_optimizer(OptimOptions(**({"clip_norm": 0.0, "weight_decay": 0.0} | changes)), lambda _: 0.1)


def update(optimizer, params, gradients):
    return optimizer.update(gradients, optimizer.init(params), params)[0]


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine():
    schedule = make_schedule(OptimOptions(lr=1.0, warmup_steps=10), 110, 1)
    assert float(schedule(0)) == pytest.approx(0.001, rel=1e-4)  # a float32
    assert float(schedule(5)) == pytest.approx((0.001 + 1) / 2)
    assert float(schedule(10)) == pytest.approx(1.0)
    assert float(schedule(60)) == pytest.approx(0.5)
    assert float(schedule(110)) == pytest.approx(0.0, abs=1e-7)


def test_milestones_count_epochs_or_steps_from_the_start_of_the_run():
    optim = OptimOptions(lr=1.0, warmup_steps=2, schedule="multistep", milestones=(2, 3), gamma=0.5)
    schedule = make_schedule(optim, 40, 10)
    assert [float(schedule(step)) for step in (2, 19, 20, 29, 30, 39)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    schedule = make_schedule(dataclasses.replace(optim, milestone_unit="steps"), 40, 10)
    assert [float(schedule(step)) for step in (1, 2, 3)] == [pytest.approx(0.5005), 0.5, 0.25]


def test_a_constant_learning_rate_only_warms_up():
    schedule = make_schedule(OptimOptions(lr=1.0, warmup_steps=4, warmup_factor=0.5, schedule="constant"), 40, 1)
    np.testing.assert_allclose(jax.vmap(schedule)(jnp.arange(40)), [0.5, 0.625, 0.75, 0.875] + [1.0] * 36)


def test_milestones_that_no_schedule_uses_are_warned_of(caplog):
    make_schedule(OptimOptions(milestones=(2, 4)), 40, 10)
    assert "optim.milestones (2, 4) are not used by optim.schedule cosine" in caplog.text


def test_milestones_in_the_warm_up_are_refused():
    optim = OptimOptions(warmup_steps=3, schedule="multistep", milestones=(2, 40), milestone_unit="steps")
    with pytest.raises(UserError, match=r"\(2, 40\) \(steps\) is at step 2, .* to step 3 or later"):
        make_schedule(optim, 40, 10)


def test_milestones_beyond_the_run_are_warned_of_and_never_reached(caplog):
    optim = OptimOptions(lr=1.0, schedule="multistep", milestones=(2, 4))
    assert float(make_schedule(optim, 40, 10)(39)) == pytest.approx(0.1)
    assert "optim.milestones (2, 4) (epochs) is at step 40, but the run ends at step 40" in caplog.text
    caplog.clear()
    make_schedule(optim, 41, 10)
    assert not caplog.text


def test_warm_up_takes_at_most_a_tenth_of_a_short_run():
    schedule = make_schedule(OptimOptions(lr=1.0), 50, 1)
    assert float(schedule(5)) == pytest.approx(1.0)


def test_a_run_of_a_few_steps_starts_at_the_peak():
    schedule = make_schedule(OptimOptions(lr=1.0), 4, 1)
    assert float(schedule(0)) == pytest.approx(1.0)


@pytest.mark.parametrize("lr", [float("nan"), 0.0, -1.0, float("inf")])
def test_a_learning_rate_that_is_not_a_positive_number_is_refused(lr):
    with pytest.raises(UserError, match="optim.lr is"):
        OptimOptions(lr=lr)


def test_a_run_without_steps_is_refused():
    with pytest.raises(UserError, match="the run has 0 steps"):
        make_schedule(OptimOptions(), 0, 1)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("decayed", [set(), {"norms"}, {"biases"}, {"norms", "biases"}])
def test_weight_decay_spares_norms_and_biases_unless_asked(kind, decayed):
    params = {
        "conv": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
        "norm": {"scale": jnp.ones(2), "bias": jnp.ones(2)},
        "logits_bias": jnp.ones(2),
        "layer_scale": jnp.ones(2),
    }
    optim = {"kind": kind, "momentum": 0.0, "weight_decay": 0.5} | {f"decay_{part}": True for part in decayed}
    steps = update(make(**optim), params, jax.tree.map(jnp.zeros_like, params))
    norms, biases = -0.05 * ("norms" in decayed), -0.05 * ("biases" in decayed)
    expected = {
        "conv": {"kernel": -0.05, "bias": biases},
        "norm": {"scale": norms, "bias": norms},
        "logits_bias": biases,
        "layer_scale": -0.05,
    }
    jax.tree.map(lambda step, value: np.testing.assert_allclose(step, value, rtol=1e-6), steps, expected)


def test_norms_and_biases_of_the_network_are_its_arrays_of_one_axis():
    options = ModelOptions(backbone="resnet18", head_norm="batch", box_conv_channels=(8,))
    params = nnx.state(nnx.eval_shape(lambda: MaskRCNN(3, options, rngs=nnx.Rngs(0))), nnx.Param)
    kinds = [OptimOptions(), OptimOptions(decay_norms=True), OptimOptions(decay_biases=True)]
    spared, spared_biases, spared_norms = (
        [not decayed for decayed in jax.tree.leaves(is_decayed(optim, params))] for optim in kinds
    )
    assert spared == [array.ndim == 1 for array in jax.tree.leaves(params)]
    assert sum(spared_norms) > 40 and sum(spared_norms) + sum(spared_biases) == sum(spared)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_the_backbone_has_a_learning_rate_of_its_own(kind):
    rng = np.random.default_rng(0)
    start, *gradients = rng.normal(size=(5, 2, 3))
    backbone, head = (torch.nn.Parameter(torch.tensor(start)) for _ in range(2))
    groups = [{"params": [backbone], "lr": 0.01}, {"params": [head]}]
    theirs = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5),
        "sgd": lambda: torch.optim.SGD(groups, lr=0.1, weight_decay=0.5, momentum=0.9),
    }[kind]()
    with jax.enable_x64(True):
        ours = make(kind=kind, weight_decay=0.5, backbone_lr_factor=0.1)
        params = {"backbone": {"kernel": jnp.asarray(start)}, "rpn": {"kernel": jnp.asarray(start)}}
        state = ours.init(params)
        for gradient in gradients:
            backbone.grad = head.grad = torch.tensor(gradient)
            theirs.step()
            both = {"kernel": jnp.asarray(gradient)}
            steps, state = ours.update({"backbone": both, "rpn": both}, state, params)
            params = optax.apply_updates(params, steps)
        np.testing.assert_allclose(params["backbone"]["kernel"], backbone.detach(), rtol=1e-12)
        np.testing.assert_allclose(params["rpn"]["kernel"], head.detach(), rtol=1e-12)


def test_a_learning_rate_of_the_backbone_leaves_frozen_stages_and_the_state_as_they_are():
    def layer():
        return {"kernel": nnx.Param(jnp.ones((2, 2)))}

    params = nnx.State({"backbone": {"stem": layer(), "stages": {i: layer() for i in range(4)}}, "rpn": layer()})
    gradients = jax.tree.map(lambda p: jnp.full_like(p, 0.5), params)
    same, slower = (make(kind="sgd", frozen_stages=2, backbone_lr_factor=factor) for factor in (1.0, 0.5))
    expected, ours = update(same, params, gradients), update(slower, params, gradients)
    assert_same = functools.partial(np.testing.assert_array_equal, strict=True)
    jax.tree.map(assert_same, same.init(params), slower.init(params))
    assert_same(ours["rpn"]["kernel"][...], expected["rpn"]["kernel"][...])
    for part, whole in zip(jax.tree.leaves(ours["backbone"]), jax.tree.leaves(expected["backbone"]), strict=True):
        assert_same(part, whole * 0.5)
    assert not np.any(ours["backbone"]["stem"]["kernel"][...])


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
