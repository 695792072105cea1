"""Training images per second and core: our loader beside torchvision's reference pipeline on the same files.

Both decode, flip half of the images, make the masks of the polygons, resize to 800/1333 and pad. torchvision's also
normalises and resizes the masks on the host; ours leaves both to the device and packs the masks into bits.
"""

import contextlib
import io
import os
from collections.abc import Callable, Iterator

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from maskrcnn_jax.data.dataset import load_coco
from maskrcnn_jax.data.loader import make_loader
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.options import DataOptions
from tools.benchmarks.inputs import Settings
from tools.benchmarks.timing import Row, compare

SPLIT = "val2017"
FLIP = 0.5


def run(settings: Settings) -> list[Row]:
    """Measure a pass over the images, for each of our ways of resizing that torchvision's is compared to."""
    if not settings.coco_dir:
        raise UserError("data needs --coco_dir, a folder with val2017 and annotations/instances_val2017.json")
    settings = settings.having(height=800, width=1333, rounds=5, num_images=50)
    index, rows = load_coco(settings.coco_dir, SPLIT), []
    chosen = np.arange(min(settings.num_images, len(index)))
    with one_core():
        references = {}
        if settings.against:
            references = {"torchvision's references/detection": reference_pipeline(settings, index, chosen)}
        for resize in ("uint8", "float32"):
            loader = make_loader(
                index,
                DataOptions(
                    short_side=settings.height,
                    long_side=settings.width,
                    resize=resize,
                    hflip=FLIP,
                    threads=1,
                    prefetch=1,
                ),
                batch_size=1,
                train=True,
                annotations=True,
                seed=settings.seed,
                image_indices=chosen,
            )
            name = f"{len(chosen)} training images, resized as {resize}"
            row = compare(name, lambda loader=loader: _count(loader), references, settings.rounds)
            said = {"images_per_s": len(chosen) / row.ours.median, "sides": [settings.height, settings.width]}
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


def reference_pipeline(settings: Settings, index, chosen: np.ndarray) -> Callable[[], int]:
    """Return a pass over the images as torchvision's training scripts load them, on one thread.

    That is PIL, pycocotools, torch's flip and GeneralizedRCNNTransform, with a loader that works in this process.
    """
    import torch

    from tools.torchvision_reference import import_torchvision

    import_torchvision()
    from torchvision.models.detection.transform import GeneralizedRCNNTransform
    from torchvision.transforms import functional

    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(index.image_dir.parent / "annotations" / f"instances_{SPLIT}.json")
    resize = GeneralizedRCNNTransform(
        settings.height, settings.width, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    ).train()

    def load(i: int) -> None:
        image = Image.open(index.image_path(int(i))).convert("RGB")
        annotations = coco.imgToAnns[int(index.image_ids[i])]
        target = _target(torch, [a for a in annotations if not a["iscrowd"]], *image.size)
        pixels = functional.convert_image_dtype(functional.pil_to_tensor(image))
        if torch.rand(1) < FLIP:
            pixels = functional.hflip(pixels)
            target["boxes"][:, [0, 2]] = image.size[0] - target["boxes"][:, [2, 0]]
            target["masks"] = target["masks"].flip(-1)
        resize([pixels], [target])

    def call() -> int:
        for i in chosen:
            load(i)
        return len(chosen)

    return call


def _target(torch, annotations: list[dict], width: int, height: int) -> dict:
    """Return boxes, labels and masks of an image, boxes of no size dropped."""
    boxes = torch.as_tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes[:, 0::2].clamp_(min=0, max=width)
    boxes[:, 1::2].clamp_(min=0, max=height)
    masks = []
    for annotation in annotations:
        rles = coco_mask.frPyObjects(annotation["segmentation"], height, width)
        mask = torch.as_tensor(coco_mask.decode(rles), dtype=torch.uint8)
        masks.append(mask.any(dim=2))
    masks = torch.stack(masks) if masks else torch.zeros((0, height, width), dtype=torch.uint8)
    keep = (boxes[:, 3] > boxes[:, 1]) & (boxes[:, 2] > boxes[:, 0])
    labels = torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64)
    return {"boxes": boxes[keep], "labels": labels[keep], "masks": masks[keep]}
