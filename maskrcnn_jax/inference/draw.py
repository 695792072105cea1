"""Draw detections or ground truth over a picture, and put pictures side by side.

Pictures are RGB uint8 [H, W, 3] throughout. OpenCV draws in whatever channel order it is given.
"""

import colorsys
import os
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from maskrcnn_jax.data.run_lengths import Crop, cut_out, decode_crop
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.paths import as_path, write_bytes

MASK_OPACITY = 0.45
# Smaller pictures are enlarged before drawing: letters of ten pixels would cover an image of 128.
MIN_SIDE = 512
FONT = cv2.FONT_HERSHEY_SIMPLEX
WHITE, BLACK = (255, 255, 255), (0, 0, 0)

# x1, y1, x2, y2 in pixels of the picture
Rectangle = tuple[int, int, int, int]


def draw_instances(
    image: np.ndarray,
    boxes: np.ndarray,
    names: Sequence[str],
    scores: Sequence[float] | np.ndarray | None = None,
    masks: Sequence[dict | np.ndarray | Crop | None] | np.ndarray | None = None,
    *,
    min_side: int = MIN_SIDE,
    colours: Sequence[int] | None = None,
) -> np.ndarray:
    """Draw translucent masks, box outlines and captions such as "person 0.93".

    Args:
        image: [H, W, I] uint8, of which the first three channels are drawn, RGB; left as it is.
        boxes: [K, 4] ``x1, y1, x2, y2`` in pixels of the image, the most important first: they are drawn last and
            their captions get the best places.
        names: K captions.
        scores: K scores, or None for captions without one (ground truth).
        masks: K masks of the size of the image (COCO RLEs, bool arrays, or crops; None for an object without one), or
            None.
        min_side: images whose longer side is below are enlarged by the smallest whole factor that reaches it;
            0 keeps the size.
        colours: K arguments of ``instance_colour``, such as classes; by default, a colour for each instance.

    Returns:
        [H * factor, W * factor, 3] uint8 RGB.
    """
    height, width = image.shape[:2]
    factor = max(1, -(-min_side // max(height, width)))
    picture = np.ascontiguousarray(np.repeat(np.repeat(image[..., :3], factor, axis=0), factor, axis=1))
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4) * factor
    chosen = [instance_colour(index) for index in (range(len(boxes)) if colours is None else colours)]
    thickness = max(1, round(_extent(picture.shape[:2]) / 400))
    order = range(len(boxes) - 1, -1, -1)
    if masks is not None:
        for index in order:
            _blend_mask(picture, _crop(masks[index]), chosen[index], factor, thickness)
    for index in order:
        x1, y1, x2, y2 = _round(boxes[index])
        cv2.rectangle(picture, (x1, y1), (x2, y2), chosen[index], thickness, cv2.LINE_AA)
    texts = list(names) if scores is None else [f"{name} {scores[i]:.2f}" for i, name in enumerate(names)]
    captions: list[_Caption] = []
    for index, text in enumerate(texts):
        captions.append(_lay_out(text, boxes[index], picture.shape[:2], [caption.place for caption in captions]))
    for index in order:
        _draw_caption(picture, captions[index], chosen[index])
    return picture


def instance_colour(index: int) -> tuple[int, int, int]:
    """Give the colour of the index-th instance: neighbours in the list are far apart in hue, and it never changes."""
    # Steps of the golden ratio around the circle of hues never come close to an earlier one for long; the
    # brightness alternates over three values, since from about ten hues on neighbours look alike.
    hue = (0.58 + index * 0.618033988749895) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.85, 0.65, 0.95)[index % 3], (1.0, 0.95, 0.75)[index // 3 % 3])
    return round(red * 255), round(green * 255), round(blue * 255)


def side_by_side(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Put a picture with ground truth to the left of one with predictions, with titles above them."""
    return grid([_with_title(truth, "ground truth"), _with_title(prediction, "prediction")], columns=2)


def grid(pictures: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Lay pictures of any sizes out in rows on white, each in the middle of a cell as large as the largest.

    Args:
        pictures: RGB uint8, row by row; at least one.
        columns: pictures a row.

    Returns:
        [H, W, 3] uint8 RGB.

    Raises:
        ValueError: if there is no picture or no column.
    """
    if not len(pictures) or columns < 1:
        raise ValueError(f"a grid of {len(pictures)} pictures in {columns} columns is empty")
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    cell_height = max(picture.shape[0] for picture in pictures)
    cell_width = max(picture.shape[1] for picture in pictures)
    gap = max(4, cell_width // 80)
    sheet = np.full((rows * (cell_height + gap) + gap, columns * (cell_width + gap) + gap, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        top = gap + row * (cell_height + gap) + (cell_height - picture.shape[0]) // 2
        left = gap + column * (cell_width + gap) + (cell_width - picture.shape[1]) // 2
        sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return sheet


def shrink(picture: np.ndarray, side: int) -> np.ndarray:
    """Reduce a picture [H, W, 3] whose longer side exceeds ``side`` pixels; a side never falls below one pixel."""
    scale = side / max(picture.shape[:2])
    if scale >= 1:
        return picture
    height, width = (max(1, round(scale * length)) for length in picture.shape[:2])
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)


def write_picture(path: str | os.PathLike, picture: np.ndarray) -> None:
    """Write an RGB picture in the format that the ending of its name tells.

    Raises:
        UserError: if the ending is unknown to OpenCV or the file cannot be written.
    """
    path = as_path(path)
    try:
        written, data = cv2.imencode(path.suffix, np.ascontiguousarray(picture[..., ::-1]))
        if written:
            write_bytes(path, data.tobytes())
            return
        reason = "it cannot be encoded"
    except cv2.error:
        reason = f"{path.suffix or 'no ending'} is not a picture format; use .jpg or .png"
    except OSError as error:
        reason = f"{error.strerror}; choose another folder"
    raise UserError(f"the picture {path} cannot be written: {reason}")


def _crop(mask: dict | np.ndarray | Crop | None) -> Crop:
    if isinstance(mask, dict):
        return decode_crop(mask)
    if isinstance(mask, Crop):
        return mask
    return cut_out(np.zeros((0, 0), bool) if mask is None else np.asarray(mask))


def _blend_mask(picture: np.ndarray, crop: Crop, colour, factor: int, thickness: int) -> None:
    """Tint the pixels of a mask and draw its outline, in place."""
    if not crop.mask.any():
        return
    # Decoded masks lie column by column. OpenCV turns those of large images in a tenth of NumPy's time.
    large = cv2.transpose(crop.mask.T.astype(np.uint8, copy=False))
    if factor > 1:
        large = np.repeat(np.repeat(large, factor, axis=0), factor, axis=1)
    y, x = crop.y * factor, crop.x * factor
    part = picture[y : y + large.shape[0], x : x + large.shape[1]]
    tints = np.arange(256)[:, None] * (1 - MASK_OPACITY) + np.array(colour) * MASK_OPACITY  # [values, channels]
    tinted = cv2.LUT(part, tints.astype(np.uint8)[:, None])
    np.copyto(part, tinted, where=large.astype(bool)[..., None])
    contours, _ = cv2.findContours(large, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, contours, -1, colour, thickness, cv2.LINE_AA, offset=(x, y))


def place_caption(
    size: tuple[int, int], box: np.ndarray, picture_size: tuple[int, int], taken: Sequence[Rectangle] = ()
) -> Rectangle:
    """Choose where a caption goes: above its box, inside its upper or lower edge, or below, always in the picture.

    Args:
        size: (height, width) of the caption's rectangle.
        box: [4] ``x1, y1, x2, y2`` in pixels of the picture.
        picture_size: (height, width).
        taken: rectangles of earlier captions, which are avoided where possible.

    Returns:
        ``x1, y1, x2, y2``; x2 and y2 are the first pixels outside.
    """
    height, width = size
    left, top, right, bottom = _round(box)
    wanted = [(x, y) for y in (top - height, top, bottom - height, bottom) for x in (left, right - width)]
    places, inside = [], []
    for x, y in wanted:
        x1 = max(0, min(x, picture_size[1] - width))
        y1 = max(0, min(y, picture_size[0] - height))
        places.append((x1, y1, min(x1 + width, picture_size[1]), min(y1 + height, picture_size[0])))
        if y1 == y:
            inside.append(places[-1])
    free = [place for place in inside + places if not any(_overlap(place, other) for other in taken)]
    return (free or inside or places)[0]


class _Caption(NamedTuple):
    text: str
    place: Rectangle
    origin: tuple[int, int]  # x, y of the lower left corner of the text
    scale: float
    thickness: int


def _lay_out(text: str, box: np.ndarray, picture_size: tuple[int, int], taken: Sequence[Rectangle]) -> _Caption:
    text = text.encode(errors="backslashreplace").decode()  # half of a surrogate pair ends OpenCV, and the process
    scale, thickness = _font(picture_size)
    (width, height), baseline = cv2.getTextSize(text, FONT, scale, thickness)
    margin = max(2, height // 4)
    if width + 2 * margin > picture_size[1]:
        # Rather small letters than a caption that is cut off.
        scale *= max(1, picture_size[1] - 2 * margin) / (width + 1)
        (width, height), baseline = cv2.getTextSize(text, FONT, scale, thickness)
    size = (height + baseline + 2 * margin, width + 2 * margin)
    place = place_caption(size, box, picture_size, taken)
    return _Caption(text, place, (place[0] + margin, place[3] - baseline - margin), scale, thickness)


def _draw_caption(picture: np.ndarray, caption: _Caption, colour: tuple[int, int, int]) -> None:
    x1, y1, x2, y2 = caption.place
    cv2.rectangle(picture, (x1, y1), (x2 - 1, y2 - 1), colour, cv2.FILLED)
    # The luma weights of BT.601: black letters on a light ground, white ones on a dark ground.
    ink = BLACK if np.dot(colour, (0.299, 0.587, 0.114)) > 140 else WHITE
    cv2.putText(picture, caption.text, caption.origin, FONT, caption.scale, ink, caption.thickness, cv2.LINE_AA)


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _round(box: np.ndarray) -> tuple[int, int, int, int]:
    x1, y1, x2, y2 = (round(float(value)) for value in box)
    return x1, y1, x2, y2


def _font(picture_size: tuple[int, int]) -> tuple[float, int]:
    """Let letters grow with the longer side, and keep them large enough to read."""
    scale = max(0.4, _extent(picture_size) / 1300)
    return scale, max(1, round(scale * 1.6))


def _extent(picture_size: tuple[int, int]) -> int:
    """Return the longer side, but of a strip no more than its width allows: giant letters would take minutes."""
    return min(max(picture_size), 10 * min(picture_size))


def _with_title(picture: np.ndarray, title: str) -> np.ndarray:
    scale, thickness = _font(picture.shape[:2])
    (_, text_height), baseline = cv2.getTextSize(title, FONT, scale, thickness)
    bar = np.full((text_height + baseline + 8, picture.shape[1], 3), 255, np.uint8)
    cv2.putText(bar, title, (4, text_height + 4), FONT, scale, BLACK, thickness, cv2.LINE_AA)
    return np.concatenate([bar, picture])
