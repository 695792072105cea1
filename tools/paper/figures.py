"""Curves and pictures of results.md."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402 the backend must be chosen first

PICTURE_WIDTH = 1200  # pixels

# Epochs, and for each training its values at them.
Line = tuple[Sequence[float], Sequence[Sequence[float]]]


def draw_curves(panels: Mapping[str, Mapping[str, Line]], path: Path) -> None:
    """Draw panels of lines by epoch: the mean of the trainings, in a band from the lowest to the highest value.

    Args:
        panels: title -> label -> line.
        path: the PNG file.
    """
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.5), layout="constrained", squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for label, (epochs, values) in lines.items():
            (line,) = axis.plot(epochs, np.mean(values, axis=0), marker="o", markersize=3, label=label)
            axis.fill_between(
                epochs, np.min(values, axis=0), np.max(values, axis=0), color=line.get_color(), alpha=0.2, linewidth=0
            )
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def keep_picture(source: Path, path: Path) -> None:
    """Write a picture as a JPEG of PICTURE_WIDTH."""
    picture = cv2.imread(str(source))
    height = round(picture.shape[0] * PICTURE_WIDTH / picture.shape[1])
    picture = cv2.resize(picture, (PICTURE_WIDTH, height), interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(path), picture, [cv2.IMWRITE_JPEG_QUALITY, 85])
