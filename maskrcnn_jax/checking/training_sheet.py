"""A picture of what training sees: images, masks and boxes exactly as the loader hands them to the network."""

import os
from collections.abc import Iterator

import cv2
import numpy as np

from maskrcnn_jax.data.augment import FILL
from maskrcnn_jax.data.coco import drop_labels
from maskrcnn_jax.data.dataset import load_dataset
from maskrcnn_jax.data.loader import make_loader
from maskrcnn_jax.data.plan import training_subset
from maskrcnn_jax.data.run_lengths import Crop, cut_out
from maskrcnn_jax.inference.draw import draw_instances, grid, write_picture
from maskrcnn_jax.options import Options
from maskrcnn_jax.structures import Batch

_COLUMNS, _ROWS = 4, 3
_SIDE = 480  # pixels of a picture's longer side


def write_sheet(path: str | os.PathLike, options: Options) -> None:
    """Write a picture of the first images of the first epoch of a training.

    The padding, right and below, has the mean colour, which normalisation makes zero.

    Args:
        path: of the picture, in the format that the ending of its name tells.
        options: of the training.

    Raises:
        UserError: if the data cannot be read or the file cannot be written.
    """
    index = load_dataset(options.data, options.data.train_split)
    index = drop_labels(index, options.data.drop_labels, options.seed)
    batches = make_loader(
        index,
        options.data,
        batch_size=options.batch_size,
        train=True,
        annotations=True,
        seed=options.seed,
        num_steps=-(-_COLUMNS * _ROWS // options.batch_size),
        image_indices=training_subset(index, options.data.train_limit, options.seed),
    )
    names = {label: index.categories.name(label) for label in index.categories.labels}
    pictures = [picture for batch in batches for picture in _pictures(batch, names)]
    write_picture(path, grid(pictures[: _COLUMNS * _ROWS], _COLUMNS))


def _pictures(batch: Batch, names: dict[int, str]) -> Iterator[np.ndarray]:
    gt = batch.gt
    assert gt is not None  # as make_loader was asked for
    ignored = np.zeros_like(gt.valid) if gt.ignored is None else gt.ignored
    for row in np.flatnonzero(batch.valid):
        image = np.round(batch.images[row]).astype(np.uint8)
        height, width = batch.sizes[row]
        image[height:] = image[:, width:] = FILL[: image.shape[2]]
        zoom = _SIDE / max(image.shape[:2])
        shown = np.flatnonzero(gt.valid[row] | ignored[row])
        yield draw_instances(
            cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_AREA if zoom < 1 else cv2.INTER_LINEAR),
            gt.boxes[row, shown] * zoom,
            ["ignored" if ignored[row, k] else names[int(gt.labels[row, k])] for k in shown],
            masks=[_mask(batch, int(row), k, zoom) for k in shown.tolist()],
            min_side=0,
        )


def _mask(batch: Batch, row: int, k: int, zoom: float) -> Crop:
    """Return a mask in pixels of the network input times ``zoom``."""
    gt = batch.gt
    assert gt is not None
    window, side = gt.mask_windows[row, k], gt.masks.shape[2]
    cells = np.unpackbits(gt.masks[row, k], axis=1, bitorder="little")
    cells = cells[: min(window[2], side), : min(window[3], side)]
    if not cells.size:
        return cut_out(cells)
    scale = np.tile(zoom * batch.sizes[row] / gt.mask_sizes[row], 2)
    y, x, height, width = np.round(window * scale).astype(int).tolist()
    return Crop(cv2.resize(cells, (max(width, 1), max(height, 1)), interpolation=cv2.INTER_NEAREST), y, x)
