"""Uploaded images: read within limits of size and time, and decoded; what is refused gets a 4xx with a sentence."""

import asyncio

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from maskrcnn_jax.data.image_headers import image_size
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.inputs import to_array
from maskrcnn_jax.serving.limits import Limits

GONE = 499  # nginx's status for a client that left; only the metrics see it


async def read_body(request: Request, limits: Limits) -> bytes:
    """Read the file that a request holds.

    Raises:
        HTTPException: it is too large, too slow, empty, or a form; or the client has left.
    """
    if request.headers.get("content-type", "").lower().startswith("multipart/"):
        raise HTTPException(
            415, "a form was sent; send the image file itself as the body, as curl --data-binary @photo.jpg does"
        )
    # h11 has checked that it is a number, and that no more bytes come.
    if int(request.headers.get("content-length", 0)) > limits.max_bytes:
        raise _too_large(limits)
    content = bytearray()
    try:
        async with asyncio.timeout(limits.timeout):
            async for part in request.stream():
                content += part
                if len(content) > limits.max_bytes:
                    raise _too_large(limits)
    except TimeoutError:
        raise HTTPException(
            408,
            f"the upload took longer than {limits.timeout:g} s; send a smaller file or use a faster connection",
            {"Connection": "close"},
        ) from None
    except ClientDisconnect:
        raise HTTPException(GONE, "the client has left") from None
    if not content:
        raise HTTPException(400, "the body is empty; send an image file, as curl --data-binary @photo.jpg does")
    return bytes(content)


def _too_large(limits: Limits) -> HTTPException:
    return HTTPException(413, f"the file has more than {limits.max_bytes:,} bytes; send a smaller one")


def decode(data: bytes, channels: int, limits: Limits) -> np.ndarray:
    """Decode an image file, turned upright.

    Args:
        data: Content of the file.
        channels: That the model takes.
        limits: Of the service.

    Returns:
        [h, w, channels] uint8.

    Raises:
        HTTPException: it is no image, damaged, or has too many pixels or too few channels.
    """
    size = image_size(data)  # of the header: a small file may hold gigabytes of pixels
    if size and size[0] * size[1] > limits.max_pixels:
        raise HTTPException(
            413,
            f"the image has {size[0]}x{size[1]} pixels (height x width), of which {limits.max_pixels:,} are "
            "accepted; send a smaller one",
        )
    try:
        return to_array(data, channels)
    except UserError as error:
        raise HTTPException(422, str(error)) from None
