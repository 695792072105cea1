"""Training images per second and core: our loader beside torchvision's reference pipelines on the same files.

Both decode, flip half of the images, make the masks of the polygons, resize to 800/1333 and pad. torchvision's also
normalises and resizes the masks on the host; ours leaves both to the device and packs the masks into bits. Large-scale
jitter resizes and crops to a square instead. With copy-paste, ours reads two images for each; torchvision pastes from
the image before, which it has read anyway.
"""

import contextlib
import os
from collections.abc import Iterator

import cv2
import numpy as np

from maskrcnn_jax.data.dataset import load_coco
from maskrcnn_jax.data.loader import make_loader
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.options import DataOptions
from tools.benchmarks.data_reference import reference
from tools.benchmarks.inputs import Settings
from tools.benchmarks.timing import Row, compare

SPLIT = "val2017"
FLIP = 0.5
SQUARE, JITTER = 1024, (0.1, 2.0)  # of torchvision's lsj preset


def run(settings: Settings) -> list[Row]:
    """Measure a pass over the images for each way of resizing and augmenting them."""
    if not settings.coco_dir:
        raise UserError("data needs --coco_dir, a folder with val2017 and annotations/instances_val2017.json")
    settings = settings.having(height=800, width=1333, rounds=5, num_images=50)
    index, rows = load_coco(settings.coco_dir, SPLIT), []
    chosen = np.arange(min(settings.num_images, len(index)))
    square = {"crop_size": SQUARE, "scale_jitter": JITTER}
    subjects = {
        "resized as uint8": {"resize": "uint8"},
        "resized as float32": {"resize": "float32"},
        "large-scale jitter": square,
        "large-scale jitter and copy-paste": square | {"copy_paste": 1.0},
    }
    with one_core():
        for subject, changes in subjects.items():
            options = DataOptions(
                short_side=settings.height, long_side=settings.width, hflip=FLIP, threads=1, prefetch=1, **changes
            )
            loader = make_loader(
                index,
                options,
                batch_size=1,
                train=True,
                annotations=True,
                seed=settings.seed,
                image_indices=chosen,
            )
            references = {}
            if settings.against:
                references = {"torchvision's references/detection": reference(index, options, chosen)}
            name = f"{len(chosen)} training images, {subject}"
            row = compare(name, lambda loader=loader: _count(loader), references, settings.rounds)
            sides = [SQUARE, SQUARE] if options.crop_size else [settings.height, settings.width]
            said = {"images_per_s": len(chosen) / row.ours.median, "sides": sides}
            rows.append(row._replace(settings=row.settings | said))
    return rows


def _count(batches) -> int:
    return sum(1 for _ in batches)


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Keep this thread, those that it starts and both libraries' pools on one core."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    if cores:
        os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        cv2.setNumThreads(threads)
        if cores:
            os.sched_setaffinity(0, cores)
