"""Takes two training steps with a cache of programs; test_program_cache.py runs it in processes of its own.

python tests/training/cached_step.py FOLDER      # prints how many programs were compiled, and a digest of the result
"""

import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import numpy as np

from maskrcnn_jax.sharding import make_mesh, shard_batch
from maskrcnn_jax.training.optimizer import make_optimizer, make_schedule
from maskrcnn_jax.training.program_cache import ProgramCache
from maskrcnn_jax.training.step import TrainStep, create_train_state
from tests.models.tiny import tiny_batch, tiny_model


def optimizer(num_steps: int = 10, **options):
    """Return the optimizer of most runs, for a run of a few steps."""
    schedule = make_schedule(lr=1e-3, warmup_steps=0, final_lr_fraction=0.0, num_steps=num_steps)
    defaults = {"kind": "adamw", "weight_decay": 1e-4, "decay_norm_and_bias": False, "b1": 0.9, "b2": 0.999}
    defaults |= {"momentum": 0.9, "clip_norm": 1.0, "frozen_stages": 0}
    return make_optimizer(schedule, **(defaults | options))


def main(folder: str) -> None:
    mesh, compiled = make_mesh(), []
    graphdef, state = create_train_state(tiny_model(norm="batch"), optimizer(), mesh)
    step = TrainStep(graphdef, optimizer(), mesh, ProgramCache(folder))
    lower = step.lower

    def counted(*arguments):
        compiled.append(arguments)
        return lower(*arguments)

    step.lower = counted
    for _ in range(2):
        state, metrics = step(state, shard_batch(tiny_batch(batch_size=2), mesh), jax.random.key(0))
    digest = hashlib.sha256()
    for array in jax.tree.leaves((state, metrics)):
        digest.update(np.asarray(array).tobytes())
    print(len(compiled), digest.hexdigest())


if __name__ == "__main__":
    main(sys.argv[1])
