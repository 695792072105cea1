"""From batches of images to detections in the pixels of the image files and to COCO results.

The device finds boxes and 28 x 28 masks on padded, resized images. The host brings them back to the original size,
pastes the masks and encodes them, while the device already works on the next batch: JAX returns from a jitted call
before its result exists, so one call ahead is enough and no thread is needed.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from maskrcnn_jax.evaluation.paste import encode_rle, paste_mask
from maskrcnn_jax.sharding import make_mesh, replicated, split
from maskrcnn_jax.structures import Batch, Detections

_log = logging.getLogger(__name__)

Detect = Callable[[np.ndarray, np.ndarray], Detections]  # (images [B, H, W, 3], sizes [B, 2]) -> [B, D, ...]


class Instances(NamedTuple):
    """Detections of one image in the pixels of its file, best first, without padding (K rows, all of them valid)."""

    boxes: np.ndarray  # [K, 4] float32, clipped to the image
    scores: np.ndarray  # [K] float32
    labels: np.ndarray  # [K] int32, 1..C
    masks: np.ndarray  # [K, 28, 28] float32, probability inside the box


def make_detect(model: nnx.Module) -> Detect:
    """Compile a model's ``detect``; its parameters are read now, later training does not change the result.

    Args:
        model: a ``MaskRCNN``; it is switched to evaluation mode.

    Returns:
        ``detect(images [B, H, W, 3], sizes [B, 2]) -> Detections``; compiles once per shape and dtype of the
        images, also when it is made again for a model of the same structure.
    """
    model.eval()
    mesh = make_mesh()
    graphdef, state = nnx.split(model)
    state = jax.device_put(state, replicated(mesh))

    def detect(images, sizes):
        # A batch that the devices cannot share, such as one image, is worked on by all of them.
        layout = split(mesh) if len(images) % mesh.size == 0 else replicated(mesh)
        return _detect(graphdef, state, *jax.device_put((images, sizes), layout))

    return detect


# One function for all models, so that evaluating after every epoch finds the programs compiled after the first one.
# The state is an argument and not a constant, or XLA would fold all weights into every program.
@functools.partial(jax.jit, static_argnums=0)
def _detect(graphdef: nnx.GraphDef, state: nnx.State, images: jax.Array, sizes: jax.Array) -> Detections:
    return nnx.merge(graphdef, state).detect(images, sizes)


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


def unpad(detections: Detections, sizes: np.ndarray, original_sizes: np.ndarray) -> list[Instances]:
    """Drop invalid rows and scale the boxes from the network input to the image files.

    Args:
        detections: numpy arrays [B, D, ...], boxes in pixels of the padded network input.
        sizes: [B, 2] (height, width) of the resized images inside the padding.
        original_sizes: [B, 2] (height, width) of the image files.

    Returns:
        B ``Instances``. The masks are relative to their boxes, so that they stay as they are.

    Source: ``resize_boxes``, torchvision 0.28: one ratio per axis, in float32.
    """
    ratios = np.asarray(original_sizes, np.float32) / np.maximum(np.asarray(sizes, np.float32), 1)  # [B, 2]
    instances = []
    for i, valid in enumerate(np.asarray(detections.valid)):
        height_width = np.asarray(original_sizes[i], np.float32)
        boxes = np.asarray(detections.boxes[i], np.float32)[valid] * np.tile(ratios[i, ::-1], 2)
        boxes = np.clip(boxes, 0, np.tile(height_width[::-1], 2))
        rows = (np.asarray(rows[i])[valid] for rows in (detections.scores, detections.labels, detections.masks))
        instances.append(Instances(boxes, *rows))
    return instances


def to_coco_results(
    instances: Instances,
    *,
    image_id: int,
    image_size: tuple[int, int],
    category_ids: Mapping[int, int],
    aligned_masks: bool = False,
) -> list[dict]:
    """Write one image's detections as COCO results.

    Nothing is rounded: Python writes the shortest decimal that reads back as the same number, so that metrics
    computed from the written file are the metrics computed from these results.

    Args:
        instances: detections in pixels of the image.
        image_id: COCO's id of the image.
        image_size: (height, width) of the image.
        category_ids: COCO's id of every label. Detections with another label are left out: torchvision's 91 classes
            contain numbers that stand for no category.
        aligned_masks: how masks are pasted, as in ``paste_mask``.

    Returns:
        A dict per detection: image_id, category_id, bbox [x, y, width, height], score, segmentation (RLE).
    """
    image_size = (int(image_size[0]), int(image_size[1]))
    results = []
    for box, score, label, mask in zip(*instances, strict=True):
        if int(label) not in category_ids:
            continue
        x1, y1, x2, y2 = box
        results.append(
            {
                "image_id": int(image_id),
                "category_id": int(category_ids[int(label)]),
                "bbox": [float(x1), float(y1), float(x2 - x1), float(y2 - y1)],
                "score": float(score),
                "segmentation": encode_rle(*paste_mask(mask, box, image_size, aligned=aligned_masks), image_size),
            }
        )
    return results


def run_detection(
    detect: Detect,
    batches: Iterable[Batch],
    *,
    image_ids: np.ndarray,
    category_ids: Mapping[int, int],
    num_images: int,
    aligned_masks: bool = False,
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

    Returns:
        COCO results in the order of the batches.

    Raises:
        ValueError: if the batches hold an image twice.
    """
    results, seen = [], set()
    with tqdm(total=num_images, unit="image", desc="detect") as progress:
        for batch, detections in detect_ahead(detect, zip(batches)):
            instances = unpad(detections, batch.sizes, batch.original_sizes)
            for row in np.flatnonzero(batch.valid):
                image_id = int(image_ids[batch.image_index[row]])
                if image_id in seen:
                    raise ValueError(f"image {image_id} came twice; the batches must hold every image once")
                seen.add(image_id)
                results += to_coco_results(
                    instances[row],
                    image_id=image_id,
                    image_size=batch.original_sizes[row],
                    category_ids=category_ids,
                    aligned_masks=aligned_masks,
                )
            progress.update(int(np.sum(batch.valid)))
    if len(seen) != num_images:
        # Not an error: a loader that was told to skip broken images delivers fewer.
        _log.warning("%d of %d images were evaluated; the others count as without detections", len(seen), num_images)
    return results
