import jax
import numpy as np
import pytest

from maskrcnn_jax import distributed
from maskrcnn_jax.distributed import make_local_mesh, make_mesh, place_locally, place_state
from maskrcnn_jax.errors import UserError


@pytest.fixture
def initialised(monkeypatch):
    """Record how JAX is asked to join other processes, in an environment without a launcher."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given: calls.append(given))
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_a_process_alone_joins_nobody(initialised, monkeypatch):
    distributed.join()
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node1")
    distributed.join()
    # In a batch script itself, which srun has not started, nobody else is there.
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.delenv("SLURM_STEP_NODELIST")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    distributed.join()
    assert initialised == []
    assert distributed.gather({"a": 1}) == [{"a": 1}]


def test_what_a_launcher_started_and_what_options_say_is_joined(initialised, monkeypatch):
    distributed.join("host:1234", 2, 1)
    distributed.join(search=True)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-8]")
    distributed.join()
    monkeypatch.delenv("SLURM_NTASKS")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "host-0,host-1")
    distributed.join()
    assert initialised == [("host:1234", 2, 1), *[(None, None, None)] * 3]


@pytest.mark.parametrize("given", [("host:1234", 2, None), (None, None, 0), ("host:1234", 2, 2)])
def test_options_that_do_not_fit_are_refused(initialised, given):
    with pytest.raises(UserError, match="process_id"):
        distributed.join(*given)
    assert initialised == []


def test_a_divided_state_lies_in_parts_and_is_put_together_again():
    state = {"kernel": np.arange(3 * 16.0).reshape(3, 16), "bias": np.arange(3.0), "step": np.array(7)}
    divided = place_state(state, make_mesh(), shard=True)
    assert [divided[name].addressable_data(0).shape for name in state] == [(3, 2), (3,), ()]
    whole = place_locally(divided, make_local_mesh())
    for name, array in state.items():
        assert whole[name].addressable_data(0).shape == array.shape
        np.testing.assert_array_equal(whole[name], array)
