"""The compiled step under its options, on a network of one layer where the whole one is not what is tested."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from maskrcnn_jax.distributed import make_mesh, place_state, shard_batch
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.options import OptimOptions
from maskrcnn_jax.training.checkpoint import Checkpoints
from maskrcnn_jax.training.optimizer import is_frozen, make_optimizer
from maskrcnn_jax.training.step import TrainStep, create_train_state, updates_done
from tests.models.tiny import tiny_batch, tiny_model
from tests.programs import collectives_in_loops, numbers_summed_over_devices
from tests.training.layer import Training, assert_same, points
from tests.training.optimizers import optimizer as optimizer_of_a_run


def test_float16_skips_a_step_whose_gradient_overflows_and_goes_on_with_half_the_scale():
    training = Training(loss_scale=2.0**127)
    unchanged = training.arrays("params", "variables", "opt_state")
    metrics = training.step(points())
    assert np.isfinite(metrics["loss"])
    assert not np.isfinite(metrics["gradient_norm"])
    assert (metrics["skipped"], metrics["loss_scale"]) == (1, 2.0**127)
    assert_same(training.arrays("params", "variables", "opt_state"), unchanged)
    assert (int(training.state.step), float(training.state.loss_scale.scale)) == (1, 2.0**126)

    rows = [training.step(points()) for _ in range(130)]
    skipped = int(sum(row["skipped"] for row in rows))
    assert 90 < skipped < 127
    assert not any(row["skipped"] for row in rows[skipped:])
    assert rows[-1]["loss_scale"] == 2.0 ** (126 - skipped)
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert updates_done(training.state) == 130 - skipped, "the schedule goes by steps that were taken"


def test_float16_skips_a_loss_that_overflows_in_the_network():
    training = Training(normalized=False)
    training.step(points())
    before = training.arrays("params", "opt_state")
    good = points()
    metrics = training.step(good._replace(x=good.x * 1e6))
    assert not np.isfinite(metrics["loss"])
    assert metrics["skipped"] == 1
    assert_same(training.arrays("params", "opt_state"), before)
    assert training.step(good)["skipped"] == 0


def test_the_loss_scale_doubles_after_good_steps_and_never_falls_below_one():
    training = Training(loss_scale=4.0, loss_scale_interval=3)
    scales = [training.step(points())["loss_scale"] for _ in range(7)]
    assert scales == [4, 4, 4, 8, 8, 8, 16]
    broken = points()._replace(y=np.full((8, 1, 1, 4), np.nan, np.float32))
    scales = [training.step(broken)["loss_scale"] for _ in range(6)]
    assert scales == [16, 8, 4, 2, 1, 1]
    assert [training.step(points())["loss_scale"] for _ in range(4)] == [1, 1, 1, 2], "three in a row"


def test_the_loss_scale_changes_no_gradient_but_for_rounding():
    states = []
    for scale in (1.0, 2.0**12):
        training = Training(loss_scale=scale, optimizer=optax.sgd(0.5))
        training.step(points())
        states.append(training.arrays("params"))
    for a, b in zip(*states, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_dtypes_have_no_loss_scale(dtype):
    training = Training(dtype)
    assert training.state.loss_scale is None
    assert not {"loss_scale", "skipped"} & set(training.step(points()))


def test_the_average_is_that_of_the_parameters_after_each_step():
    training = Training("float32", ema_decay=0.3)
    (expected,) = [a.astype(np.float64) for a in training.arrays("params")[:1]]
    np.testing.assert_array_equal(training.arrays("averaged")[0], expected)
    for decay in (1 / 10, 2 / 11, 3 / 12, 0.3, 0.3):
        training.step(points())
        expected = decay * expected + (1 - decay) * training.arrays("params")[0]
        np.testing.assert_allclose(training.arrays("averaged")[0], expected, rtol=1e-5, atol=1e-7)
    assert np.abs(training.arrays("averaged")[0] - training.arrays("params")[0]).max() > 1e-3


def test_parameters_that_never_change_are_their_own_average():
    training = Training("float32", optimizer=optax.set_to_zero(), ema_decay=0.999)
    before = training.arrays("params")
    for _ in range(5):
        training.step(points())
    assert_same(training.arrays("averaged"), before)


def test_the_average_changes_nothing_in_training_and_not_at_all_in_a_skipped_step():
    with_average, without = Training(ema_decay=0.9, loss_scale=2.0**20), Training(loss_scale=2.0**20)
    skipped = 0
    for seed in range(6):
        before = with_average.arrays("averaged")
        metrics = with_average.step(points(seed=seed))
        np.testing.assert_equal(metrics, without.step(points(seed=seed)))  # NaN where it was skipped
        if metrics["skipped"]:
            assert_same(with_average.arrays("averaged"), before)
            skipped += 1
    assert 0 < skipped < 6
    assert_same(
        with_average.arrays("params", "variables", "opt_state"), without.arrays("params", "variables", "opt_state")
    )


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_cannot_be_is_refused(decay):
    with pytest.raises(UserError, match="optim.ema_decay"):
        Training("float32", ema_decay=decay)


@pytest.mark.parametrize("normalized", [True, False])
def test_two_equal_half_batches_have_the_gradient_of_one(normalized):
    half = points(8, seed=1)
    whole = jax.tree.map(lambda array: np.repeat(array, 2, axis=0), half)  # each of 8 devices has the same image twice
    options = {"dtype": "float32", "optimizer": optax.sgd(1.0), "normalized": normalized}
    in_parts, alone = Training(accumulate=2, **options), Training(**options)
    ours, expected = in_parts.step(whole), alone.step(half)
    for name in ("loss", "loss_y", "gradient_norm"):
        assert ours[name] == pytest.approx(expected[name], rel=1e-5)
    for a, b in zip(in_parts.arrays("params"), alone.arrays("params"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("devices", [8, 2, 1])
def test_the_gradient_is_the_mean_of_those_of_the_parts_and_statistics_follow_part_by_part(devices):
    whole = points(24, seed=1)
    # Every third image, of how many devices ever.
    parts = [jax.tree.map(lambda array, i=i: array[i::3], whole) for i in range(3)]
    in_parts = Training("float32", optimizer=optax.sgd(1.0), accumulate=3, devices=devices)
    separate = Training("float32", optimizer=optax.sgd(1.0))
    start = separate.arrays("params")
    metrics = in_parts.step(whole)

    losses, moves = [], []
    for part in parts:
        params = place_state(
            jax.tree.unflatten(jax.tree.structure(separate.state.params), start), separate.mesh, shard=False
        )
        separate.state = separate.state._replace(params=params)
        losses.append(separate.step(part)["loss"])
        moves.append([after - before for after, before in zip(separate.arrays("params"), start, strict=True)])
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    for after, before, *moved in zip(in_parts.arrays("params"), start, *moves, strict=True):
        np.testing.assert_allclose(after - before, np.mean(moved, axis=0), rtol=1e-4, atol=1e-6)
    for a, b in zip(in_parts.arrays("variables"), separate.arrays("variables"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_every_part_has_draws_of_its_own():
    def draws(accumulate):
        training = Training("float32", accumulate=accumulate)
        return [training.step(points(16))["draw"] for _ in range(2)]

    key = jax.random.key(0)
    expected = [
        np.mean([jax.random.uniform(part) for part in jax.random.split(jax.random.fold_in(key, step))])
        for step in range(2)
    ]
    np.testing.assert_allclose(draws(2), expected, rtol=1e-6)
    np.testing.assert_allclose(
        draws(1), [jax.random.uniform(jax.random.fold_in(key, step)) for step in range(2)], rtol=1e-6
    )


@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize(
    "dtype",
    [pytest.param("float32", marks=pytest.mark.slow), pytest.param("bfloat16", marks=pytest.mark.slow), "float16"],
)
def test_all_options_together_are_finite_and_go_on_from_a_checkpoint(
    dtype, ema_decay, accumulate, clip_norm, tmp_path
):
    def start():
        optim = OptimOptions(lr=1e-2, clip_norm=clip_norm)
        optimizer = make_optimizer(optim, optax.constant_schedule(optim.lr))
        options = {"ema_decay": ema_decay, "accumulate": accumulate, "loss_scale": 2.0**18, "loss_scale_interval": 2}
        return Training(dtype, optimizer=optimizer, **options)

    training = start()
    rows = []
    averages = training.arrays("averaged")
    for step in range(6):
        if step == 3:
            with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
                checkpoints.save(training.state)
        rows.append(training.step(points(16, seed=step)))
        if not rows[-1].get("skipped"):
            decay = min(ema_decay, (1 + step) / (10 + step))
            averages = [decay * a + (1 - decay) * p for a, p in zip(averages, training.arrays("params"), strict=False)]
    for array in training.arrays():
        assert np.all(np.isfinite(array))
    assert training.state.params["conv"]["kernel"].dtype == jnp.float32
    for ours, expected in zip(training.arrays("averaged"), averages, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
    if dtype == "float16":
        assert 0 < sum(row["skipped"] for row in rows) < 6

    again = start()
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        again.state = checkpoints.restore(3, again.state)
    np.testing.assert_equal([again.step(points(16, seed=step)) for step in range(3, 6)], rows[3:])
    assert_same(again.arrays(), training.arrays())


@pytest.mark.slow
def test_frozen_stages_keep_parameters_and_statistics():
    mesh = make_mesh(jax.devices()[:1])
    optim = OptimOptions(lr=1e-3, warmup_steps=0, frozen_stages=2)
    optimizer = optimizer_of_a_run(optim)
    graphdef, state = create_train_state(tiny_model(norm="batch"), optimizer, mesh, optim)
    before = jax.tree.map(np.array, {"params": state.params, "variables": state.variables})
    batch, key = shard_batch(tiny_batch(batch_size=2), mesh), jax.random.key(0)
    model = nnx.merge(*jax.tree.map(jnp.copy, (graphdef, state.params, state.variables)))
    state, metrics = TrainStep(graphdef, optimizer, mesh, optim)(state, batch, key)
    after = {"params": state.params, "variables": state.variables}
    moved = jax.tree.map(lambda old, new: bool(np.any(old != np.asarray(new))), before, after)
    for part in ("params", "variables"):
        backbone = moved[part]["backbone"]
        assert not any(jax.tree.leaves((backbone["stem"], backbone["stages"][0]))), part
        assert all(any(jax.tree.leaves(backbone["stages"][stage])) for stage in (1, 2, 3)), part

    def loss(model):
        return sum(model.losses(batch, jax.random.fold_in(key, 0))[0].values())

    gradients = nnx.jit(nnx.grad(loss))(model)
    trained = nnx.map_state(lambda path, array: array * (not is_frozen(path, 2)), gradients)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(trained), rtol=1e-4)
    assert optax.tree.norm(gradients) > 1.001 * optax.tree.norm(trained)


@pytest.mark.slow
def test_nothing_is_computed_backwards_in_frozen_stages():
    def operations(frozen_stages):
        mesh, optim = make_mesh(jax.devices()[:1]), OptimOptions(frozen_stages=frozen_stages)
        graphdef, state = create_train_state(tiny_model(norm="batch"), optax.sgd(1e-3), mesh, optim)
        step = TrainStep(graphdef, optax.sgd(1e-3), mesh, optim)
        batch = shard_batch(tiny_batch(batch_size=2), mesh)
        return step.lower(state, batch, jax.random.key(0)).cost_analysis()["flops"]

    none, stem, stem_and_stage, backbone = (operations(frozen_stages) for frozen_stages in (0, 1, 2, 5))
    assert none > stem > stem_and_stage > backbone


def lowered(num_devices, norm="batch", **options):
    """Return the compiled step of the tiny network on a batch of 16."""
    mesh = make_mesh(jax.devices()[:num_devices])
    optim = OptimOptions(**options)
    graphdef, state = create_train_state(tiny_model(norm=norm), optax.sgd(1e-3), mesh, optim)
    train_step = TrainStep(graphdef, optax.sgd(1e-3), mesh, optim)
    train_step(state, shard_batch(tiny_batch(batch_size=16), mesh), jax.random.key(0))
    (program,) = train_step.programs.values()
    return program


@pytest.mark.slow
def test_gradients_of_frozen_stages_are_not_summed_over_devices():
    whole, rest = (lowered(2, norm="frozen", frozen_stages=stages).as_text() for stages in (0, 5))
    model = tiny_model(norm="frozen")
    frozen = [param for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)) if is_frozen(path, 5)]
    difference = numbers_summed_over_devices(whole) - numbers_summed_over_devices(rest)
    assert difference == sum(param[...].size for param in frozen) > 0


@pytest.mark.slow
def test_simulated_devices_work_on_parts_without_meeting_in_a_loop():
    assert collectives_in_loops(lowered(8, accumulate=2).as_text()) == []


@pytest.mark.slow
def test_parts_take_less_memory():
    whole, quarters = (lowered(1, accumulate=parts).memory_analysis().temp_size_in_bytes for parts in (1, 4))
    assert quarters < 0.5 * whole


def take_step(**options):
    """Return the state after a step, its metrics, and the bytes that the program takes beside its arguments."""
    mesh, optimizer, optim = make_mesh(), optax.sgd(1e-3), OptimOptions()
    graphdef, state = create_train_state(tiny_model(**options), optimizer, mesh, optim)
    train_step = TrainStep(graphdef, optimizer, mesh, optim)
    arguments = (state, shard_batch(tiny_batch(batch_size=8), mesh), jax.random.key(0))
    memory = train_step.compile(*arguments).memory_analysis().temp_size_in_bytes
    return *train_step(*arguments), memory


@pytest.mark.slow
def test_recomputing_every_block_in_the_gradient_takes_less_memory_and_changes_no_value():
    state, metrics, memory = take_step(norm="batch")
    again, its_metrics, its_memory = take_step(norm="batch", remat=True)
    assert its_memory < memory
    assert metrics["loss"] == pytest.approx(float(its_metrics["loss"]), rel=1e-5)
    for ours, expected in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)


def test_options_that_the_compiler_does_not_know_are_left_out(monkeypatch, caplog):
    monkeypatch.setattr(
        "maskrcnn_jax.training.step.compiler_options", lambda mesh: {"xla_tpu_an_option_of_another_version": True}
    )
    training = Training()
    assert np.isfinite(training.step(points(16))["loss"])
    assert "an_option_of_another_version" in caplog.text
