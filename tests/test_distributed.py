import dataclasses
import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrcnn_jax import distributed
from maskrcnn_jax.distributed import (
    make_local_mesh,
    make_mesh,
    on_each_device,
    place_batch,
    place_locally,
    place_state,
    process_rank,
    replicated,
    split,
)
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.ops.devices import any_on_devices, split_key, sum_over_devices


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


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """A chip of a cluster; GPUs and CPUs may have no slice."""

    slice_index: int | None
    process_index: int
    id: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    client: None = None


def cluster(slices, processes, chips, *, across=False):
    """Return the chips of slices that have several processes each; ``across``: numbered across the slices."""
    devices = []
    for slice_index, process, _ in itertools.product(range(slices), range(processes), range(chips)):
        process_index = process * slices + slice_index if across else slice_index * processes + process
        devices.append(FakeDevice(slice_index, process_index, len(devices)))
    return devices


@pytest.mark.parametrize("slices, processes, chips", [(1, 1, 8), (1, 4, 4), (2, 1, 4), (2, 2, 4), (4, 8, 4)])
@pytest.mark.parametrize("across", [False, True])
def test_devices_of_a_process_and_of_a_slice_are_neighbours(slices, processes, chips, across, monkeypatch):
    devices = cluster(slices, processes, chips, across=across)
    random.Random(0).shuffle(devices)
    mesh = make_mesh(devices)
    assert mesh.axis_names == ("data",) and mesh.size == slices * processes * chips
    order = list(mesh.devices.flat)
    for indices in ([device.slice_index for device in order], [device.process_index for device in order]):
        assert len(list(itertools.groupby(indices))) == len(set(indices))
    # The rows that a process loads are those of its devices.
    for first, device in enumerate(order[::chips]):
        monkeypatch.setattr(jax, "process_index", lambda device=device: device.process_index)
        assert process_rank(mesh) == first
        if not across:
            assert process_rank(mesh) == device.process_index


def test_devices_without_a_slice_are_those_of_their_processes():
    devices = [FakeDevice(None, process, 8 * process + i, platform="gpu") for process in (1, 0) for i in range(8)]
    assert [device.id for device in make_mesh(devices).devices.flat] == list(range(16))


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_each_device_has_its_rows_and_their_keys(num_devices):
    mesh = make_mesh(jax.devices()[:num_devices])
    rows = np.arange(8.0)

    def visit(key, rows):
        drawn = jax.vmap(jax.random.uniform)(split_key(key, len(rows)))
        return drawn, jnp.full(len(rows), sum_over_devices(jnp.sum(rows))), jnp.full(len(rows), jnp.sum(rows))

    key = jax.random.key(3)
    run = jax.jit(on_each_device(visit, mesh, returns_rows=True))
    drawn, total, of_device = run(jax.device_put(key, replicated(mesh)), jax.device_put(rows, split(mesh)))
    np.testing.assert_array_equal(drawn, jax.vmap(jax.random.uniform)(jax.random.split(key, 8)))
    np.testing.assert_array_equal(total, np.full(8, 28))
    np.testing.assert_array_equal(of_device, np.repeat(rows.reshape(num_devices, -1).sum(axis=1), 8 // num_devices))


def test_all_devices_learn_what_one_has():
    mesh = make_mesh()
    run = jax.jit(on_each_device(lambda _, rows: any_on_devices(jnp.any(rows > 6)), mesh, returns_rows=False))
    assert run(None, jax.device_put(np.arange(8), split(mesh)))
    assert not run(None, jax.device_put(np.arange(8) - 1, split(mesh)))


def test_a_batch_that_devices_cannot_share_is_whole_on_each():
    mesh = make_mesh()
    run = jax.jit(on_each_device(lambda _, rows: rows + sum_over_devices(jnp.sum(rows)), mesh, returns_rows=True))
    np.testing.assert_array_equal(run(None, place_batch(np.arange(3), mesh)), [3, 4, 5])
