import io
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.inputs import is_image, to_array

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def png(pixels=PIXELS, **options) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", **options)
    return content.getvalue()


def torch_uint8():
    return pytest.importorskip("torch").tensor(PIXELS).permute(2, 0, 1)


def torch_float():
    return torch_uint8().float() / 255


@pytest.mark.parametrize(
    "make",
    [lambda: PIXELS, lambda: jnp.asarray(PIXELS), png, lambda: Image.fromarray(PIXELS), torch_uint8, torch_float],
    ids=["numpy", "jax", "bytes", "pillow", "torch", "torch_float"],
)
def test_every_kind_of_image_becomes_the_same_array(make):
    image = make()
    assert is_image(image)
    np.testing.assert_array_equal(to_array(image), PIXELS)


def test_a_path_is_read_and_lists_are_not_an_image(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png())
    for image in (path, str(path)):
        np.testing.assert_array_equal(to_array(image), PIXELS)
        assert is_image(image)
    assert not is_image([PIXELS])
    assert not is_image(iter([path]))


def test_grey_and_palette_images_of_pillow_become_rgb():
    grey = Image.fromarray(PIXELS[..., 0])
    np.testing.assert_array_equal(to_array(grey), np.repeat(PIXELS[..., :1], 3, axis=2))
    assert to_array(Image.fromarray(PIXELS).quantize(4)).shape == (5, 7, 3)


def test_pillow_images_of_16_bits_are_read_like_files_and_those_without_a_known_white_are_refused():
    deep = (np.arange(35, dtype=np.uint16) * 1800).reshape(5, 7)
    content = io.BytesIO()
    Image.fromarray(deep).save(content, "PNG")
    expected = np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, axis=2)
    np.testing.assert_array_equal(to_array(Image.fromarray(deep)), expected)
    np.testing.assert_allclose(to_array(content.getvalue()), expected, atol=1)  # libpng rounds
    for pixels in (np.float32(deep), np.int32(deep)):
        with pytest.raises(UserError, match="has no defined white value; convert it to L or RGB"):
            to_array(Image.fromarray(pixels))


def test_files_and_pillow_images_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned clockwise
    turned = np.rot90(PIXELS, -1)
    np.testing.assert_array_equal(to_array(png(exif=exif)), turned)
    np.testing.assert_array_equal(to_array(Image.open(io.BytesIO(png(exif=exif)))), turned)
    content, deep = io.BytesIO(), np.dstack([PIXELS, PIXELS[..., :1]])
    Image.fromarray(deep).save(content, "PNG", exif=exif)
    np.testing.assert_array_equal(to_array(content.getvalue(), 4), np.rot90(deep, -1))
    np.testing.assert_array_equal(to_array(Image.open(content), 4), np.rot90(deep, -1))


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/a.png" else 404)
        self.end_headers()
        self.wfile.write(png() if self.path == "/a.png" else b"")

    def log_message(self, *_):
        pass


def test_a_url_is_downloaded_or_named():
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        np.testing.assert_array_equal(to_array(f"{address}/a.png"), PIXELS)
        with pytest.raises(UserError, match=r"/b.png cannot be downloaded \(Not Found\)"):
            to_array(f"{address}/b.png")
        server.shutdown()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("absent.jpg", "absent.jpg cannot be read as an image"),
        (b"text", "4 bytes cannot be read as an image"),
        (PIXELS.astype(np.float32), r"an array of float32 \(5, 7, 3\) is not an image"),
        (PIXELS[..., 0], r"give uint8 \(height, width, 3\)"),
        (PIXELS[:0], "is not an image"),
    ],
)
def test_what_is_not_an_image_is_refused_with_what_came(image, message):
    with pytest.raises(UserError, match=message):
        to_array(image)


def test_a_torch_image_outside_its_range_is_refused():
    with pytest.raises(UserError, match=r"must lie in 0\.\.1"):
        to_array(torch_float() * 255)
