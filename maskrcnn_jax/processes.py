"""Several processes that train or evaluate together: how they find each other, and what they tell each other."""

import json
import os
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from maskrcnn_jax.errors import UserError

# Set by a launcher for each process that it starts: how many there are. JAX finds the rest there by itself.
_LAUNCHERS = {"SLURM_NTASKS": "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK"}


def join(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    search: bool = False,
) -> None:
    """Join the other processes of this job, before anything else is asked of JAX; alone, do nothing.

    Processes that ``srun``, ``mpirun`` or GKE's TPU slices started find each other by themselves.

    Args:
      coordinator_address: host:port of process 0.
      num_processes: of the job.
      process_id: of this one, from 0.
      search: let JAX look for the others, as on the workers of a Cloud TPU.

    Raises:
      UserError: when some of the first three are given and others not, or the others cannot be reached.
    """
    given = [coordinator_address, num_processes, process_id]
    if any(value is not None for value in given):
        if any(value is None for value in given):
            raise UserError("give all of --coordinator_address, --num_processes and --process_id, or none of them")
        if not 0 <= process_id < num_processes:
            raise UserError(f"--process_id={process_id} must lie in 0..{num_processes - 1}, with --num_processes")
    elif not search and not _launched():
        return
    try:
        jax.distributed.initialize(*given)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the other processes cannot be joined ({str(error).splitlines()[0]}); look at --coordinator_address, "
            "which all of them must reach"
        ) from None


def _launched() -> bool:
    """Return whether a launcher, or GKE on the hosts of a TPU slice, started this process beside others."""
    if "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        return True
    return any(int(os.environ.get(number) or 1) > 1 and own in os.environ for number, own in _LAUNCHERS.items())


def is_first() -> bool:
    """Return whether this process is the one that prints and writes what there should be once."""
    return jax.process_index() == 0


def leave(status: int) -> None:
    """End this process; one of several at once: JAX would first wait for the others, who wait for this one."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def gather(value) -> list:
    """Return the values of all processes, in their order, to each of them; all must call this together.

    Args:
      value: of this process; anything that JSON holds.
    """
    if jax.process_count() == 1:
        return [value]
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(content)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(content)] = content
    contents = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:length])) for row, length in zip(contents, lengths, strict=True)]
