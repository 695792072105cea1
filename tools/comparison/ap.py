"""COCO's AP of both sides, each with its own pipeline, on the same annotations with the same weights."""

import numpy as np
import torch
from pycocotools import mask as coco_mask
from tqdm import tqdm

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.evaluation.coco_metrics import evaluate
from maskrcnn_jax.evaluation.evaluator import Evaluator
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.options import Options
from tools.comparison.comparison_page import Comparison
from tools.comparison.pair import to_torch

AP_LIMIT = 1e-3


def compare_ap(
    result: Comparison, reference: torch.nn.Module, model: MaskRCNN, options: Options, categories: Categories
) -> None:
    """Compare box and mask AP on ``options.data.eval_split``; without any AP on either side this fails."""
    evaluator = Evaluator(options, categories)
    ours = evaluator(model).metrics
    found = reference_results(reference, evaluator, categories)
    theirs = evaluate(evaluator.truth, found, max_detections=options.model.box_detections_per_img)
    for name in ("bbox_AP", "bbox_AP50", "segm_AP", "segm_AP50"):
        result.add("AP by pycocotools", name, ours[name], theirs[name], AP_LIMIT, absolute=True)
    result.add("AP by pycocotools", "mask AP above 0.01", float(theirs["segm_AP"] > 0.01), 1.0, 0.0)


@torch.no_grad()
def reference_results(reference: torch.nn.Module, evaluator: Evaluator, categories: Categories) -> list[dict]:
    """Return COCO results of torchvision's model for the images that are evaluated; a broken one has none."""
    reference.eval()
    results = []
    for image_id in tqdm(evaluator.truth.imgs, desc="torchvision", unit="image"):
        image = evaluator.read_image(image_id)
        if image is None:
            continue
        (found,) = reference(to_torch([image], "float32"))
        masks = found["masks"][:, 0].numpy() >= 0.5
        columns = (found["boxes"].tolist(), found["labels"].tolist(), found["scores"].tolist(), masks)
        for (x1, y1, x2, y2), label, score, mask in zip(*columns, strict=True):
            if label not in categories.labels:
                continue
            rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
            results.append(
                {
                    "image_id": image_id,
                    "category_id": categories.category_id(label),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": score,
                    "segmentation": rle | {"counts": rle["counts"].decode("ascii")},
                }
            )
    return results
