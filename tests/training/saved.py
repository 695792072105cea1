"""What a run has saved."""

import jax
import numpy as np
import orbax.checkpoint as ocp


def saved_arrays(workdir, step):
    """Return every array of a checkpoint by name: parameters, average, statistics, optimizer, loss scale."""
    found = {}
    for item in ("model", "training"):
        folder, checkpointer = workdir / "checkpoints" / str(step) / item, ocp.PyTreeCheckpointer()
        kinds = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), checkpointer.metadata(folder).item_metadata.tree
        )
        tree = checkpointer.restore(folder, restore_args=kinds)
        found |= {item + jax.tree_util.keystr(path): np.asarray(a) for path, a in jax.tree.leaves_with_path(tree)}
    return found
