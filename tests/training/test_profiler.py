"""Traces of steps: written when they are due, and divided by stages."""

import logging
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import maskrcnn_jax
from maskrcnn_jax.training import profiler
from maskrcnn_jax.training.profiler import Profiler


class Step:
    """A step of two stages, one of which takes nearly all the time."""

    def __init__(self):
        def step(x):
            with jax.named_scope("backbone"):
                x = jax.lax.fori_loop(0, 20, lambda _, x: jnp.tanh(x @ x), x)
            with jax.named_scope("optimizer"):
                return jnp.sort(x[0])

        self.argument = jnp.ones((200, 200))
        self.programs = {"": jax.jit(step).lower(self.argument).compile()}

    def __call__(self):
        return self.programs[""](self.argument)


def run(tracer, step, num_steps):
    for number in range(1, num_steps + 1):
        tracer.before_step(number)
        tracer.after_step(number, step())
    tracer.close()


@pytest.mark.parametrize("num_steps", [4, 3])  # the second ends before the trace does
def test_a_trace_is_written_and_divided_by_stages(num_steps, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    step = Step()
    run(Profiler(tmp_path, 2, step), step, num_steps)
    assert len(list(tmp_path.rglob("profile/**/*.xplane.pb"))) == 1
    lines = caplog.messages[-1].splitlines()[1:]
    shares = {stage: float(share.rstrip("%")) for share, stage in (line.split() for line in lines)}
    assert shares["backbone"] > 50
    assert 0 < shares["optimizer"] < 50


@pytest.mark.parametrize(("wanted", "taken"), [(0, 5), (2, 2)])
def test_nothing_is_written_that_was_not_wanted_or_did_not_come_to_pass(wanted, taken, tmp_path):
    step = Step()
    run(Profiler(tmp_path, wanted, step), step, taken)
    assert not list(tmp_path.iterdir())


def test_every_named_scope_of_a_training_is_a_stage():
    sources = [path.read_text() for path in Path(maskrcnn_jax.__file__).parent.rglob("*.py")]
    scopes = {name for source in sources for name in re.findall(r'named_scope\("(\w+)"\)', source)}
    assert scopes - profiler._STAGES == {"select"}, "detection alone selects"
    assert scopes >= profiler._STAGES
