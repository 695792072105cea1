"""Options of commands that choose how a trained model detects."""

import argparse
import csv
from typing import TYPE_CHECKING

from maskrcnn_jax.commands.app import at_least

if TYPE_CHECKING:
    from maskrcnn_jax.inference.predictor import Predictor


def add_detection_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the number of detections, of suppression and of test-time augmentation."""
    parser.add_argument(
        "--max_detections",
        type=at_least(1),
        metavar="N",
        help="at most so many per image, instead of model.box_detections_per_img; above 100, metrics count as many",
    )
    parser.add_argument(
        "--nms",
        choices=("hard", "linear", "gaussian"),
        help="instead of model.box_nms_method of the run: drop detections that overlap a better one, or lower their "
        "scores (soft-NMS)",
    )
    parser.add_argument(
        "--nms_thresh", type=share, metavar="IOU", help="overlap above which NMS acts, instead of model.box_nms_thresh"
    )
    parser.add_argument(
        "--class_agnostic_nms",
        action="store_true",
        default=None,
        help="suppress among the detections of all classes: model.box_nms_class_agnostic",
    )
    parser.add_argument(
        "--tta",
        metavar="VIEWS",
        help="test-time augmentation: flip, short sides in pixels, or both, such as flip,400,600; takes as "
        "many times longer as there are views",
    )


def with_detection_options(model: "Predictor", options: argparse.Namespace) -> "Predictor":
    """Return the model with the number of detections and the suppression that the user asked for."""
    given = {
        "box_detections_per_img": options.max_detections,
        "box_nms_method": options.nms,
        "box_nms_thresh": options.nms_thresh,
        "box_nms_class_agnostic": options.class_agnostic_nms,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    return model.with_options(**changes) if changes else model


def share(text: str) -> float:
    """Read a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value


def class_names(text: str) -> list[str]:
    """Read names of classes, such as ``person,dog``; one with a comma is quoted, such as ``"cup, blue",dog``."""
    return next(csv.reader([text], skipinitialspace=True)) or [""]


def minimum_scores(text: str) -> float | dict[str | None, float]:
    """Read a score for all classes, or for some by name, such as ``0.4,person=0.7``."""
    scores: dict[str | None, float] = {}
    for part in class_names(text):
        name, is_named, value = part.rpartition("=")
        key = name if is_named else None
        if key in scores:
            raise argparse.ArgumentTypeError(f"{text!r} has two scores for {key or 'all classes'}")
        scores[key] = share(value)
    return scores[None] if scores.keys() == {None} else scores
