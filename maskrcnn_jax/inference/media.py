"""Detection on image and video files: find them, read them, draw the result and write it down.

Beside the pictures four files come out. ``detections.json`` holds COCO results. ``images.json`` says which file or
frame each image_id is and what the categories are called; as it has the form of a COCO annotation file without
annotations, ``COCO("images.json").loadRes("detections.json")`` opens the two together. ``detections.csv`` and
``counts.csv`` are tables of the same.
"""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.data.images import IMAGE_SUFFIXES, BrokenImageError
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.annotation_files import Annotations
from maskrcnn_jax.inference.draw import write_picture
from maskrcnn_jax.inference.inputs import read_image
from maskrcnn_jax.inference.predictor import Predictor
from maskrcnn_jax.inference.tables import write_tables
from maskrcnn_jax.paths import as_path, in_bucket, local_path
from maskrcnn_jax.writing import write_json

_log = logging.getLogger(__name__)

_DRAWN_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})  # of pictures
VIDEO_SUFFIXES = frozenset(
    {".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts"}
    | {".vob", ".webm", ".wmv"}
)
DEFAULT_FPS = 25.0  # of videos that do not tell theirs
_NONE = Annotations()
_MAX_TICKS = 65535  # of the clock in a second of MPEG-4 video


def list_images(path: str | os.PathLike) -> list[Path]:
    """List the images of a folder (not of folders inside it) by name, or the one file that is named.

    A line tells of other files in the folder.

    Raises:
        UserError: if the path does not exist or is a folder without images.
    """
    path = as_path(path)
    if not path.exists():
        raise UserError(f"the input {path} does not exist; give an image, a folder of images or a video")
    if path.is_file():
        return [path]
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    others = [file.name for file in files if file.suffix.lower() not in IMAGE_SUFFIXES]
    if images and others:
        _log.info("not read in %s, by their endings: %d, such as %s", path, len(others), others[0])
    if not images:
        raise UserError(f"the folder {path} holds no images; files with {', '.join(sorted(IMAGE_SUFFIXES))} are read")
    return images


def is_video(path: str | os.PathLike) -> bool:
    """Tell by its ending whether a file is a video."""
    return as_path(path).suffix.lower() in VIDEO_SUFFIXES and not as_path(path).is_dir()


def predict_images(
    predictor: Predictor,
    paths: Sequence[Path],
    output: str | os.PathLike,
    *,
    annotations: Annotations = _NONE,
    **choices: Any,
) -> list[Path]:
    """Detect on image files; write a picture of each, under its own name, the JSON files and the tables.

    Args:
        predictor: of any model.
        paths: the image files; the image_id of the n-th is n, counted from 1.
        output: folder, made if it does not exist.
        annotations: files to write besides.
        choices: what else ``Predictor.stream`` takes, such as ``min_score``.

    Returns:
        The files that could not be read; they are skipped.

    Raises:
        UserError: if no file can be read, one has too few channels, or the pictures would overwrite the input.
    """
    output = _make_folder(output)
    written = {folder.resolve() for folder in (output, *annotations.folders(output))}
    if any(path.resolve().parent in written for path in paths):
        raise UserError(f"pictures in {output} would overwrite the input; choose another output folder")
    annotations.check(output, predictor.categories)
    readable, unreadable, images, results = [], [], [], []
    names: set[str] = set()

    def read() -> Iterator[np.ndarray]:
        for image_id, path in enumerate(tqdm(paths, unit="image", desc="predict"), start=1):
            try:
                image = read_image(path, predictor.options.model.in_channels)
            except BrokenImageError as error:
                unreadable.append(path)
                tqdm.write(f"skipped: {error}")
                continue
            readable.append((image_id, path))
            yield image

    for number, found in enumerate(predictor.stream(read(), **choices)):
        image_id, path = readable[number]
        # Not every ending that is read can be written, and a single input file may have any.
        name = path.name if path.suffix.lower() in _DRAWN_SUFFIXES else f"{path.name}.png"
        write_picture(output / name, found.draw())
        height, width = found.image.shape[:2]
        images.append({"id": image_id, "file_name": path.name, "height": height, "width": width})
        of_image = found.to_coco(image_id)
        results += of_image
        name = path.name if path.stem in names else path.stem  # there may be a.jpg and a.png
        names.add(name)
        annotations.write(output, name, of_image, predictor.categories, (height, width), path)
    if not images:
        raise UserError(
            f"none of {len(paths)} files could be read as an image, {paths[0]} for one; give JPEG or PNG files"
        )
    _write_files(output, images, results, predictor.categories)
    return unreadable


def predict_video(
    predictor: Predictor,
    path: str | os.PathLike,
    output: str | os.PathLike,
    *,
    annotations: Annotations = _NONE,
    **choices: Any,
) -> int:
    """Detect on every frame of a video; write it with the detections drawn in, the JSON files and the tables.

    Args:
        predictor: of a model that takes three channels.
        path: the video; the image_id of a frame is its number, counted from 1.
        output: folder, made if it does not exist; the video in it has the frame rate and size of the input, except
            that an odd size grows by a row or column and a rate is rounded to what MPEG-4 can express.
        annotations: files to write besides, for each frame, with its number in their names.
        choices: what else ``Predictor.stream`` takes, such as ``min_score``.

    Returns:
        The number of frames.

    Raises:
        UserError: if the video cannot be read or written, or would be overwritten.
    """
    path, output = local_path(path, "the video"), _make_folder(local_path(output, "the video in"))
    target = output / f"{path.stem}.mp4"
    if not path.exists():
        raise UserError(f"the input {path} does not exist; give an image, a folder of images or a video")
    if target.resolve() == path.resolve():
        raise UserError(f"the video in {output} would overwrite the input; choose another output folder")
    annotations.check(output, predictor.categories, of_video=True)
    capture = cv2.VideoCapture(str(path))
    fps = _writable_rate(capture.get(cv2.CAP_PROP_FPS))
    images: list[dict] = []
    results: list[dict] = []
    writer = None
    try:
        for found in predictor.stream(_read_frames(capture), **choices):
            height, width = found.image.shape[:2]
            picture = found.draw(min_side=0)  # frames keep their size, whatever it is
            # OpenCV cuts off the last row or column of an odd size, which MPEG-4 does not have.
            picture = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            if writer is None:
                writer = _open_writer(target, fps, (picture.shape[1], picture.shape[0]))
            number = len(images) + 1
            writer.write(np.ascontiguousarray(picture[..., ::-1]))
            images.append({"id": number, "file_name": path.name, "frame": number, "height": height, "width": width})
            of_frame = found.to_coco(number)
            results += of_frame
            annotations.write(output, f"{path.stem}_{number:06d}", of_frame, predictor.categories, (height, width))
    finally:
        capture.release()
        if writer is not None:
            writer.release()
    if not images:
        raise UserError(f"no frame of {path} can be read; convert the video, for example to H.264 in an mp4 file")
    _write_files(output, images, results, predictor.categories)
    return len(images)


def _make_folder(path: str | os.PathLike) -> Path:
    path = as_path(path)
    try:
        if not in_bucket(path):
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the output folder {path} cannot be made ({error.strerror}); choose another one") from None
    return path


def _read_frames(capture: cv2.VideoCapture) -> Iterator[np.ndarray]:
    # The count comes from the header of the file and may be wrong or missing, so that only the bar relies on it.
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    with tqdm(total=count if count > 0 else None, unit="frame", desc="predict") as progress:
        while True:
            read, frame = capture.read()
            if not read:
                return
            yield np.ascontiguousarray(frame[..., ::-1])
            progress.update()


def _writable_rate(fps: float) -> float:
    """Return the nearest frame rate that MPEG-4 can express, such as 119.91 for 119.9134.

    OpenCV writes a rate as a fraction over a power of ten, whose numerator MPEG-4 limits.
    """
    if not 0 < fps <= _MAX_TICKS:  # also NaN
        return DEFAULT_FPS
    return max(round(fps, min(3, int(math.log10(_MAX_TICKS / fps)))), 0.01)


def _open_writer(target: Path, fps: float, size: tuple[int, int]) -> cv2.VideoWriter:
    writer = cv2.VideoWriter(str(target), cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
    if not writer.isOpened():
        raise UserError(
            f"the video {target} of {size[0]}x{size[1]} pixels (width x height) and {fps} frames a second cannot be "
            "written; check that the folder is writable, or convert the video to a smaller size"
        )
    return writer


def _write_files(output: Path, images: list[dict], results: list[dict], categories: Categories) -> None:
    listed = [{"id": i, "name": name} for i, name in zip(categories.ids, categories.names, strict=True)]
    write_json(output / "images.json", {"images": images, "categories": listed}, indent=1)
    write_json(output / "detections.json", results)
    write_tables(output, images, results, categories)
