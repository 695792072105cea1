"""Detection on image and video files: find them, read them, draw the result and write it down.

Beside the pictures two files come out. ``detections.json`` holds COCO results. ``images.json`` says which file or
frame each image_id is and what the categories are called; as it has the form of a COCO annotation file without
annotations, ``COCO("images.json").loadRes("detections.json")`` opens the two together.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.draw import write_picture
from maskrcnn_jax.inference.inputs import read_image
from maskrcnn_jax.inference.predictor import Predictor
from maskrcnn_jax.paths import as_path, in_bucket, local_path
from maskrcnn_jax.writing import write_json

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})
DEFAULT_FPS = 25.0  # of videos that do not tell theirs


def list_images(path: str | os.PathLike) -> list[Path]:
    """List the images of a folder (not of folders inside it) by name, or the one file that is named.

    Raises:
        UserError: if the path does not exist or is a folder without images.
    """
    path = as_path(path)
    if not path.exists():
        raise UserError(f"the input {path} does not exist; give an image, a folder of images or a video")
    if path.is_file():
        return [path]
    images = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if not images:
        raise UserError(f"the folder {path} holds no images; files with {', '.join(sorted(IMAGE_SUFFIXES))} are read")
    return images


def is_video(path: str | os.PathLike) -> bool:
    """Tell by its ending whether a file is a video."""
    return as_path(path).suffix.lower() in VIDEO_SUFFIXES and not as_path(path).is_dir()


def predict_images(
    predictor: Predictor, paths: Sequence[Path], output: str | os.PathLike, *, min_score: float
) -> list[Path]:
    """Detect on image files; write a picture of each, under its own name, and the two JSON files.

    Args:
        predictor: of any model.
        paths: the image files; the image_id of the n-th is n, counted from 1.
        output: folder, made if it does not exist.
        min_score: detections below are left out.

    Returns:
        The files that could not be read; they are skipped.

    Raises:
        UserError: if no file can be read, one has too few channels, or the pictures would overwrite the input.
    """
    output = _make_folder(output)
    if any(path.resolve().parent == output.resolve() for path in paths):
        raise UserError(f"pictures in {output} would overwrite the input; choose another output folder")
    readable, unreadable, images, results = [], [], [], []

    def read() -> Iterator[np.ndarray]:
        for image_id, path in enumerate(tqdm(paths, unit="image", desc="predict"), start=1):
            image = read_image(path, predictor.options.model.in_channels)
            if image is None:
                unreadable.append(path)
                tqdm.write(f"skipped {path}: it cannot be read as an image")
                continue
            readable.append((image_id, path))
            yield image

    for number, found in enumerate(predictor.stream(read(), min_score=min_score)):
        image_id, path = readable[number]
        # A single input file may have any ending, also one that OpenCV cannot write.
        name = path.name if path.suffix.lower() in IMAGE_SUFFIXES else f"{path.name}.png"
        write_picture(output / name, found.draw())
        height, width = found.image.shape[:2]
        images.append({"id": image_id, "file_name": path.name, "height": height, "width": width})
        results += found.to_coco(image_id)
    if not images:
        raise UserError(f"none of {len(paths)} files could be read as an image, {paths[0]} for one")
    _write_json_files(output, images, results, predictor.categories)
    return unreadable


def predict_video(
    predictor: Predictor, path: str | os.PathLike, output: str | os.PathLike, *, min_score: float
) -> int:
    """Detect on every frame of a video; write it with the detections drawn in, and the two JSON files.

    Args:
        predictor: of a model that takes three channels.
        path: the video; the image_id of a frame is its number, counted from 1.
        output: folder, made if it does not exist; the video in it has the frame rate and size of the input.
        min_score: detections below are left out.

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
    capture = cv2.VideoCapture(str(path))
    fps = capture.get(cv2.CAP_PROP_FPS) or DEFAULT_FPS
    images: list[dict] = []
    results: list[dict] = []
    writer = None
    try:
        for found in predictor.stream(_read_frames(capture), min_score=min_score):
            height, width = found.image.shape[:2]
            if writer is None:
                writer = _open_writer(target, fps, (width, height))
            number = len(images) + 1
            picture = found.draw(min_side=0)  # frames keep their size, whatever it is
            writer.write(np.ascontiguousarray(picture[..., ::-1]))
            images.append({"id": number, "file_name": path.name, "frame": number, "height": height, "width": width})
            results += found.to_coco(number)
    finally:
        capture.release()
        if writer is not None:
            writer.release()
    if not images:
        raise UserError(f"no frame of {path} can be read; convert the video, for example to H.264 in an mp4 file")
    _write_json_files(output, images, results, predictor.categories)
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


def _open_writer(target: Path, fps: float, size: tuple[int, int]) -> cv2.VideoWriter:
    writer = cv2.VideoWriter(str(target), cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
    if not writer.isOpened():
        raise UserError(f"the video {target} cannot be written; check that the folder is writable")
    return writer


def _write_json_files(output: Path, images: list[dict], results: list[dict], categories: Categories) -> None:
    listed = [{"id": i, "name": name} for i, name in zip(categories.ids, categories.names, strict=True)]
    write_json(output / "images.json", {"images": images, "categories": listed}, indent=1)
    write_json(output / "detections.json", results)
