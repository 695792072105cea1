"""Predictions of several trainings beside the ground truth."""

import json
from collections.abc import Sequence
from pathlib import Path

from pycocotools.coco import COCO

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.evaluation.evaluator import Evaluator
from maskrcnn_jax.inference.draw import grid, shrink, write_picture
from maskrcnn_jax.run_folder import load_options

DETECTIONS = "detections.json"  # of the last evaluation, in the folder of a run
_SIDE = 320  # pixels of the longer side of each
_NUM_IMAGES, _MOST_OBJECTS, _LEAST_SHARE = 4, 3, 0.1


def draw_predictions(workdirs: Sequence[Path], path: Path) -> None:
    """Draw a few validation images in rows: the ground truth, then the predictions of each training.

    Args:
        workdirs: folders of finished trainings on the same dataset.
        path: the picture.
    """
    evaluator = Evaluator(load_options(workdirs[0]), Categories.load(workdirs[0] / "categories.json"))
    found = [json.loads((workdir / DETECTIONS).read_text()) for workdir in workdirs]
    panels = []
    for image_id in _chosen_images(evaluator.truth):
        pairs = [evaluator.draw_image(image_id, results) for results in found]
        if pairs[0] is not None:
            middle = pairs[0].shape[1] // 2  # between ground truth and predictions
            panels += [pairs[0][:, :middle], *[pair[:, middle:] for pair in pairs]]
    if panels:
        write_picture(path, grid([shrink(panel, _SIDE) for panel in panels], 1 + len(workdirs)))


def _chosen_images(truth: COCO) -> list[int]:
    """Return the first images with few objects, one of which covers a tenth of the image."""
    chosen = []
    for image_id, image in sorted(truth.imgs.items()):
        areas = [annotation["area"] for annotation in truth.imgToAnns[image_id]]
        if 0 < len(areas) <= _MOST_OBJECTS and max(areas) >= _LEAST_SHARE * image["height"] * image["width"]:
            chosen.append(image_id)
    return chosen[:_NUM_IMAGES]
