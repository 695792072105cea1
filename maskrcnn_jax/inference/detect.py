"""From batches of images to COCO results: the device detects, the host goes on with what was detected.

JAX returns from a jitted call before its result exists, so while the host is at work on one batch the device already
is on the next; one call ahead is enough and no thread is needed. A fast device leaves the host too little time for
pasting and encoding masks, which other processes then take over.
"""

import collections
import concurrent.futures.process
import functools
import logging
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from maskrcnn_jax.distributed import is_first, make_local_mesh, on_each_device, place_batch, place_locally
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.results import to_coco_results, unpad
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.options import ModelOptions
from maskrcnn_jax.structures import Batch, Detections

_log = logging.getLogger(__name__)

_AHEAD = 4  # images that wait for each process which encodes masks
Detect = Callable[[np.ndarray, np.ndarray], Detections]  # (images [B, H, W, I], sizes [B, 2]) -> [B, D, ...]


def make_detect(model: nnx.Module) -> Detect:
    """Compile a model's ``detect``; its parameters are read now, later training does not change the result.

    Args:
        model: a ``MaskRCNN``; it is switched to evaluation mode.

    Returns:
        ``detect(images [B, H, W, I], sizes [B, 2]) -> Detections``; compiles once per shape and dtype of the
        images, also when it is made again for a model of the same structure.
    """
    graphdef, mesh, state = _place(model)

    def detect(images, sizes):
        return detect_on_mesh(graphdef, mesh, state, place_batch((images, sizes), mesh))

    return detect


def _place(model: nnx.Module) -> tuple[nnx.GraphDef, Mesh, nnx.State]:
    """Copy the parameters of a model, in evaluation mode, to the devices of this process."""
    model.eval()
    mesh = make_local_mesh()
    graphdef, state = nnx.split(model)
    return graphdef, mesh, place_locally(state, mesh)


# One function for all models, so that evaluating after every epoch finds the programs compiled after the first one.
# The state is an argument and not a constant, or XLA would fold all weights into every program.
@functools.partial(jax.jit, static_argnums=(0, 1))
def detect_on_mesh(
    graphdef: nnx.GraphDef, mesh: Mesh, state: nnx.State, batch: tuple[jax.Array, jax.Array]
) -> Detections:
    def detect(state, batch):
        return nnx.merge(graphdef, state).detect(*batch)

    return on_each_device(detect, mesh, returns_rows=True)(state, batch)


class Stages(NamedTuple):
    """The two stages of ``detect``, for callers that change the boxes before masks are computed."""

    boxes: Callable[..., Any]  # (images [B, H, W, I], sizes [B, 2]) -> as MaskRCNN.detect_boxes
    masks: Callable[..., Any]  # (features, boxes, labels, valid, image_shape) -> probabilities [B, D, M, M]


def make_stages(model: nnx.Module) -> Stages:
    """Compile the stages of a model's ``detect``, as ``make_detect`` compiles it whole."""
    graphdef, mesh, state = _place(model)

    def boxes(images, sizes):
        return _boxes_on_mesh(graphdef, mesh, state, place_batch((images, sizes), mesh))

    def masks(features, boxes, labels, valid, image_shape):
        batch = (features, *place_batch((boxes, labels, valid), mesh))
        return _masks_on_mesh(graphdef, mesh, image_shape, state, batch)

    return Stages(boxes, masks)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _boxes_on_mesh(graphdef: nnx.GraphDef, mesh: Mesh, state: nnx.State, batch: tuple) -> tuple:
    def detect_boxes(state, batch):
        return nnx.merge(graphdef, state).detect_boxes(*batch)

    return on_each_device(detect_boxes, mesh, returns_rows=True)(state, batch)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _masks_on_mesh(
    graphdef: nnx.GraphDef, mesh: Mesh, image_shape: tuple[int, int], state: nnx.State, batch: tuple
) -> jax.Array:
    def masks(state, batch):
        return jax.nn.sigmoid(nnx.merge(graphdef, state).mask_logits(*batch, image_shape))

    return on_each_device(masks, mesh, returns_rows=True)(state, batch)


def with_options(network: MaskRCNN, options: ModelOptions) -> MaskRCNN:
    """Return a network with the same parameters whose detections follow other options."""
    if options == network.options:
        return network
    network = nnx.merge(*nnx.split(network))
    network.options = options
    return network


def detect_ahead(detect: Detect, items: Iterable[tuple]) -> Iterator[tuple]:
    """Detect on one batch after another, always starting the next one before waiting for the last.

    Args:
        detect: as ``make_detect`` returns it.
        items: tuples that begin with a numpy ``Batch``; one more is taken than has been yielded.

    Yields:
        The tuples in their order, each with the batch's ``Detections`` as numpy arrays appended.
    """
    waiting = None
    for item in items:
        started = (item, detect(item[0].images, item[0].sizes))
        if waiting is not None:
            yield *waiting[0], jax.device_get(waiting[1])
        waiting = started
    if waiting is not None:
        yield *waiting[0], jax.device_get(waiting[1])


def run_detection(
    detect: Detect,
    batches: Iterable[Batch],
    *,
    image_ids: np.ndarray,
    category_ids: Mapping[int, int],
    num_images: int,
    aligned_masks: bool = False,
    workers: int = 0,
) -> list[dict]:
    """Detect on every image of a dataset once.

    Args:
        detect: as ``make_detect`` returns it.
        batches: numpy batches; rows with ``valid`` False are left out.
        image_ids: [N] int64 COCO ids that ``Batch.image_index`` points into. They stay on the host, because the
            device would cut them to 32 bits.
        category_ids: COCO's id of every label.
        num_images: how many images the batches hold, for the progress bar and the closing check.
        aligned_masks: how masks are pasted, as in ``paste_mask``.
        workers: processes that paste and encode masks; 0 is this one.

    Returns:
        COCO results in the order of the batches.

    Raises:
        ValueError: if the batches hold an image twice.
        UserError: if one of the processes dies.
    """
    results, seen = [], set()

    def found() -> Iterator[dict]:
        for batch, detections in detect_ahead(detect, zip(batches)):
            instances = unpad(detections, batch.sizes, batch.original_sizes)
            for row in np.flatnonzero(batch.valid):
                image_id = int(image_ids[batch.image_index[row]])
                if image_id in seen:
                    raise ValueError(f"image {image_id} came twice; the batches must hold every image once")
                seen.add(image_id)
                yield {"instances": instances[row], "image_id": image_id, "image_size": batch.original_sizes[row]}

    encode = functools.partial(to_coco_results, category_ids=category_ids, aligned_masks=aligned_masks)
    with tqdm(total=num_images, unit="image", desc="detect", disable=not is_first()) as progress:
        for of_image in map_in_processes(encode, found(), workers):
            results += of_image
            progress.update()
    if len(seen) != num_images:
        # Not an error: a loader that was told to skip broken images delivers fewer.
        _log.warning(
            "only %d of %d images were evaluated; the others could not be read and count as images without detections",
            len(seen),
            num_images,
        )
    return results


def map_in_processes(function: Callable, items: Iterable[dict], workers: int) -> Iterator:
    """Yield ``function(**item)`` in the order of the items, computed by this process or by several others."""
    if not workers:
        yield from (function(**item) for item in items)
        return
    # Not forked: this process has threads, whose locks a fork would leave locked for ever.
    context = multiprocessing.get_context("spawn")
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, **item))
                if len(waiting) > _AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError("a process that encodes masks died, probably out of memory; lower eval_workers") from None
