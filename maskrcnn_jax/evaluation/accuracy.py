"""Losses and accuracy of the RoI classifier on annotated images, those of training or others: the curves of Fig. 4.

The paper plots an accuracy that it does not define. Here it is the share of RoIs whose most probable class is that of
the object which they overlap by half at least, or background: over the annotated boxes and the RPN's proposals, as
many and in the proportions that training draws. Most of them are background, so that ``accuracy`` is high from the
start; ``accuracy_foreground`` is the share among those of objects.
"""

import functools
import itertools
from collections.abc import Iterable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from maskrcnn_jax.distributed import (
    gather,
    is_first,
    make_local_mesh,
    on_each_device,
    place_batch,
    place_locally,
)
from maskrcnn_jax.ops.devices import sum_over_devices
from maskrcnn_jax.structures import Batch


def measure_losses(model: nnx.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """Compute the losses and metrics of a model that stays as it is, averaged over a dataset.

    Several processes do this together, each with batches of its own.

    Args:
        model: a ``MaskRCNN``; it is switched to evaluation mode.
        batches: numpy batches with ground truth, of this process; rows with ``valid`` False count for nothing.

    Returns:
        ``loss``, its terms, ``accuracy`` and the other metrics of ``MaskRCNN.losses``. Each is a mean over images, but
        ``accuracy_foreground`` over RoIs; the RoIs are drawn alike each time.
    """
    model.eval()
    mesh = make_local_mesh()
    graphdef, state = nnx.split(model)
    state = place_locally(state, mesh)
    measured = []
    for batch in tqdm(batches, unit="batch", desc="losses", disable=not is_first()):
        metrics = jax.device_get(_losses(graphdef, mesh, state, place_batch(batch, mesh)))
        measured.append((int(np.sum(batch.valid)), {name: float(value) for name, value in metrics.items()}))
    totals: dict[str, float] = {}
    num_images, num_foreground = 0, 0.0
    # Batch after batch as one process would have them, so that the sums are the same.
    for images, metrics in (row for turn in itertools.zip_longest(*gather(measured)) for row in turn if row):
        foreground = metrics["num_foreground"] * images
        for name, value in metrics.items():
            weight = foreground if name == "accuracy_foreground" else images
            totals[name] = totals.get(name, 0.0) + value * weight
        num_images, num_foreground = num_images + images, num_foreground + foreground
    counts = dict.fromkeys(totals, num_images) | {"accuracy_foreground": num_foreground}
    return {name: total / max(counts[name], 1) for name, total in totals.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _losses(graphdef: nnx.GraphDef, mesh: Mesh, state: nnx.State, batch: Batch) -> dict[str, jax.Array]:
    def losses(state, batch):
        terms, metrics = nnx.merge(graphdef, state).losses(batch, jax.random.key(0), proposals_from_rpn=True)
        return sum_over_devices(terms | metrics | {"loss": sum(terms.values())})

    return on_each_device(losses, mesh, returns_rows=False)(state, batch)
