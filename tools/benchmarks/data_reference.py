"""How torchvision's training scripts load images, on one thread: PIL, pycocotools and torchvision's transforms.

The scripts are no part of the torchvision package; what they do is written here in the transforms of the package.
"""

import contextlib
import io
from collections.abc import Callable

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from maskrcnn_jax.data.coco import CocoDataset
from maskrcnn_jax.options import DataOptions


def reference(index: CocoDataset, options: DataOptions, chosen: np.ndarray) -> Callable[[], int]:
    """Return a pass over images as torchvision's training scripts load them.

    Args:
        index: the dataset.
        options: sizes, probability of a flip, and whether there is large-scale jitter and copy-paste.
        chosen: rows of the images.
    """
    import torch

    from tools.torchvision_reference import import_torchvision

    import_torchvision()
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(index.annotation_path)
    transform = _jitter(torch, options) if options.scale_jitter else _resize(torch, options)

    def load(i: int) -> tuple:
        image = Image.open(index.image_path(int(i))).convert("RGB")
        annotations = coco.imgToAnns[int(index.image_ids[i])]
        return transform(image, _target(torch, [a for a in annotations if not a["iscrowd"]], *image.size))

    def call() -> int:
        before = None
        for i in chosen:
            image, target = load(i)
            if options.copy_paste and before is not None:
                _copy_paste(torch, image, target, *before)
            before = image, target
        return len(chosen)

    return call


def _resize(torch, options: DataOptions) -> Callable:
    """Return the flip of the scripts and GeneralizedRCNNTransform."""
    from torchvision.models.detection.transform import GeneralizedRCNNTransform
    from torchvision.transforms import functional

    resize = GeneralizedRCNNTransform(
        options.short_side, options.long_side, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    ).train()

    def transform(image: Image.Image, target: dict) -> tuple:
        pixels = functional.convert_image_dtype(functional.pil_to_tensor(image))
        if torch.rand(1) < options.hflip:
            pixels = functional.hflip(pixels)
            target["boxes"][:, [0, 2]] = image.size[0] - target["boxes"][:, [2, 0]]
            target["masks"] = target["masks"].flip(-1)
        return resize([pixels], [target])

    return transform


def _jitter(torch, options: DataOptions) -> Callable:
    """Return the preset lsj: ScaleJitter, a crop or padding to a square, and the flip.

    Normalising, which the model does afterwards, is left out; ours leaves it to the device.
    """
    from torchvision import tv_tensors
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional

    side = options.crop_size
    scale = v2.ScaleJitter((side, side), options.scale_jitter, antialias=True)
    after = v2.Compose([v2.RandomHorizontalFlip(options.hflip), v2.ToDtype(torch.float32, scale=True)])

    def transform(image: Image.Image, target: dict) -> tuple:
        size = image.size[::-1]
        target = target | {
            "boxes": tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size),
            "masks": tv_tensors.Mask(target["masks"]),
        }
        image, target = scale(tv_tensors.Image(functional.pil_to_tensor(image)), target)
        height, width = image.shape[-2:]
        place = float(torch.rand(1))  # along both axes
        top, left = int(max(height - side, 0) * place), int(max(width - side, 0) * place)
        window = top, left, min(height, side), min(width, side)
        padding = [0, 0, side - window[3], side - window[2]]
        image = functional.pad(functional.crop(image, *window), padding, fill=[123.0, 117.0, 104.0])
        boxes = functional.crop(target["boxes"], *window)
        keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        masks = functional.pad(functional.crop(target["masks"][keep], *window), padding)
        boxes = tv_tensors.wrap(boxes[keep], like=boxes, canvas_size=(side, side))
        return after(image, {"boxes": boxes, "labels": target["labels"][keep], "masks": masks})

    return transform


def _copy_paste(torch, image, target: dict, source, donor: dict) -> tuple:
    """Paste a random choice of the objects of another image of the same size, as the scripts' SimpleCopyPaste does.

    Without blending, which the scripts add.
    """
    from torchvision.ops import masks_to_boxes

    masks, labels = target["masks"], target["labels"]
    if len(donor["masks"]):
        chosen = torch.unique(torch.randint(len(donor["masks"]), (len(donor["masks"]),)))
        above = donor["masks"][chosen]
        covered = above.sum(dim=0) > 0
        image = image * ~covered + source * covered
        masks = masks * ~covered
        seen = masks.sum(dim=(-1, -2)) > 0
        masks = torch.cat([masks[seen], above])
        labels = torch.cat([labels[seen], donor["labels"][chosen]])
    boxes = masks_to_boxes(masks)
    keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return image, {"boxes": boxes[keep], "labels": labels[keep], "masks": masks[keep]}


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
