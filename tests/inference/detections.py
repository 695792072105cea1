"""Detections as the device hands them out, made up."""

import numpy as np

from maskrcnn_jax.structures import Detections

MAX_DETECTIONS = 5


def make_detections(per_image):
    """Packs per-image lists of (box, score, label) into padded arrays; padding rows hold garbage."""
    number = len(per_image)
    boxes = np.full((number, MAX_DETECTIONS, 4), 1e9, np.float32)
    scores = np.full((number, MAX_DETECTIONS), 0.99, np.float32)
    labels = np.full((number, MAX_DETECTIONS), 1, np.int32)
    masks = np.ones((number, MAX_DETECTIONS, 28, 28), np.float32)
    valid = np.zeros((number, MAX_DETECTIONS), bool)
    for image, objects in enumerate(per_image):
        for row, (box, score, label) in enumerate(objects):
            boxes[image, row], scores[image, row], labels[image, row], valid[image, row] = box, score, label, True
    return Detections(boxes, scores, labels, masks, valid)
