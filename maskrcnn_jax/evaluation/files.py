"""Detection on image and video files: find them, read them, draw the result and write it down.

Beside the pictures two files come out. ``detections.json`` holds COCO results. ``images.json`` says which file or
frame each image_id is and what the categories are called; as it has the form of a COCO annotation file without
annotations, ``COCO("images.json").loadRes("detections.json")`` opens the two together.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from maskrcnn_jax.data.images import decode_image, too_few_channels
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.evaluation.coco_eval import write_json
from maskrcnn_jax.evaluation.inference import Detect, detect_ahead
from maskrcnn_jax.evaluation.results import Instances, to_coco_results, unpad
from maskrcnn_jax.evaluation.visualize import MIN_SIDE, draw_instances, write_picture
from maskrcnn_jax.structures import Batch

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})
DEFAULT_FPS = 25.0  # of videos that do not tell theirs

Prepare = Callable[[np.ndarray], Batch]  # uint8 [h, w, I], RGB first -> a batch of this one image


class Label(NamedTuple):
    """What a label of the model is in the dataset that it was trained on."""

    category_id: int
    name: str


def list_images(path: str | os.PathLike) -> list[Path]:
    """List the images of a folder (not of folders inside it) by name, or the one file that is named.

    Raises:
        UserError: if the path does not exist or is a folder without images.
    """
    path = Path(path)
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
    return Path(path).suffix.lower() in VIDEO_SUFFIXES and not Path(path).is_dir()


def predict_images(
    detect: Detect,
    prepare: Prepare,
    paths: Sequence[Path],
    output: str | os.PathLike,
    *,
    labels: Mapping[int, Label],
    min_score: float,
    channels: int = 3,
    aligned_masks: bool = False,
) -> list[Path]:
    """Detect on image files; write a picture of each, under its own name, and the two JSON files.

    Args:
        detect: as ``make_detect`` returns it.
        prepare: resizes and pads an image to a batch of one.
        paths: the image files; the image_id of the n-th is n, counted from 1.
        output: folder, made if it does not exist.
        labels: what the labels of the model stand for.
        min_score: detections below are left out.
        channels: of the images that the model takes, RGB first.
        aligned_masks: how masks are pasted, as in ``paste_mask``.

    Returns:
        The files that could not be read; they are skipped.

    Raises:
        UserError: if no file can be read, one has too few channels, or the pictures would overwrite the input.
    """
    output = _make_folder(output)
    if any(path.resolve().parent == output.resolve() for path in paths):
        raise UserError(f"pictures in {output} would overwrite the input; choose another output folder")
    unreadable, images, results = [], [], []

    def read() -> Iterator[tuple[Batch, int, Path, np.ndarray]]:
        for image_id, path in enumerate(tqdm(paths, unit="image", desc="predict"), start=1):
            image = read_image(path, channels)
            if image is None:
                unreadable.append(path)
                tqdm.write(f"skipped {path}: it cannot be read as an image")
                continue
            yield prepare(image), image_id, path, image

    for batch, image_id, path, image, detections in detect_ahead(detect, read()):
        found = select(unpad(detections, batch.sizes, batch.original_sizes)[0], labels, min_score)
        picture, entries = _draw_and_encode(image, found, image_id, labels, MIN_SIDE, aligned_masks)
        # A single input file may have any ending, also one that OpenCV cannot write.
        name = path.name if path.suffix.lower() in IMAGE_SUFFIXES else f"{path.name}.png"
        write_picture(output / name, picture)
        images.append({"id": image_id, "file_name": path.name, "height": image.shape[0], "width": image.shape[1]})
        results += entries
    if not images:
        raise UserError(f"none of {len(paths)} files could be read as an image, {paths[0]} for one")
    _write_json_files(output, images, results, labels)
    return unreadable


def predict_video(
    detect: Detect,
    prepare: Prepare,
    path: str | os.PathLike,
    output: str | os.PathLike,
    *,
    labels: Mapping[int, Label],
    min_score: float,
    aligned_masks: bool = False,
) -> int:
    """Detect on every frame of a video; write it with the detections drawn in, and the two JSON files.

    Args:
        detect: as ``make_detect`` returns it.
        prepare: resizes and pads a frame to a batch of one.
        path: the video; the image_id of a frame is its number, counted from 1.
        output: folder, made if it does not exist; the video in it has the frame rate and size of the input.
        labels: what the labels of the model stand for.
        min_score: detections below are left out.
        aligned_masks: how masks are pasted, as in ``paste_mask``.

    Returns:
        The number of frames.

    Raises:
        UserError: if the video cannot be read or written, or would be overwritten.
    """
    path, output = Path(path), _make_folder(output)
    target = output / f"{path.stem}.mp4"
    if not path.exists():
        raise UserError(f"the input {path} does not exist; give an image, a folder of images or a video")
    if target.resolve() == path.resolve():
        raise UserError(f"the video in {output} would overwrite the input; choose another output folder")
    capture = cv2.VideoCapture(str(path))
    fps = capture.get(cv2.CAP_PROP_FPS) or DEFAULT_FPS
    images, results, writer = [], [], None
    try:
        for batch, frame, detections in detect_ahead(detect, _read_frames(capture, prepare)):
            height, width = frame.shape[:2]
            if writer is None:
                writer = _open_writer(target, fps, (width, height))
            found = select(unpad(detections, batch.sizes, batch.original_sizes)[0], labels, min_score)
            number = len(images) + 1
            # The frames keep their size, whatever it is.
            picture, entries = _draw_and_encode(frame, found, number, labels, 0, aligned_masks)
            writer.write(np.ascontiguousarray(picture[..., ::-1]))
            images.append({"id": number, "file_name": path.name, "frame": number, "height": height, "width": width})
            results += entries
    finally:
        capture.release()
        if writer is not None:
            writer.release()
    if not images:
        raise UserError(f"no frame of {path} can be read; convert the video, for example to H.264 in an mp4 file")
    _write_json_files(output, images, results, labels)
    return len(images)


def read_image(path: Path, channels: int = 3) -> np.ndarray | None:
    """Read a file as uint8 [h, w, channels], RGB turned upright as its EXIF entry says; None if it is no image.

    Raises:
        UserError: if it has fewer channels.
    """
    try:
        image = decode_image(path.read_bytes(), channels, upright=True)
    except OSError:
        return None
    if image is not None and image.shape[2] < channels:
        raise UserError(f"image {path} {too_few_channels(image, channels)}; give files like those of the training")
    return image


def select(instances: Instances, labels: Mapping[int, Label], min_score: float) -> Instances:
    """Keep the detections whose score reaches a minimum and whose label stands for a category."""
    keep = (instances.scores >= min_score) & np.isin(instances.labels, list(labels))
    return Instances(*(rows[keep] for rows in instances))


def _make_folder(path: str | os.PathLike) -> Path:
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the output folder {path} cannot be made ({error.strerror}); choose another one") from None
    return path


def _read_frames(capture: cv2.VideoCapture, prepare: Prepare) -> Iterator[tuple[Batch, np.ndarray]]:
    # The count comes from the header of the file and may be wrong or missing, so that only the bar relies on it.
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    with tqdm(total=count if count > 0 else None, unit="frame", desc="predict") as progress:
        while True:
            read, frame = capture.read()
            if not read:
                return
            frame = np.ascontiguousarray(frame[..., ::-1])
            yield prepare(frame), frame
            progress.update()


def _draw_and_encode(
    image: np.ndarray,
    found: Instances,
    image_id: int,
    labels: Mapping[int, Label],
    min_side: int,
    aligned_masks: bool,
) -> tuple[np.ndarray, list[dict]]:
    category_ids = {label: category.category_id for label, category in labels.items()}
    results = to_coco_results(
        found,
        image_id=image_id,
        image_size=image.shape[:2],
        category_ids=category_ids,
        aligned_masks=aligned_masks,
    )
    names = [labels[int(label)].name for label in found.labels]
    masks = [result["segmentation"] for result in results]
    return draw_instances(image, found.boxes, names, found.scores, masks, min_side=min_side), results


def _open_writer(target: Path, fps: float, size: tuple[int, int]) -> cv2.VideoWriter:
    writer = cv2.VideoWriter(str(target), cv2.VideoWriter_fourcc(*"mp4v"), fps, size)
    if not writer.isOpened():
        raise UserError(f"the video {target} cannot be written; check that the folder is writable")
    return writer


def _write_json_files(output: Path, images: list[dict], results: list[dict], labels: Mapping[int, Label]) -> None:
    categories = [{"id": label.category_id, "name": label.name} for label in labels.values()]
    write_json(output / "images.json", {"images": images, "categories": categories}, indent=1)
    write_json(output / "detections.json", results)
