"""What a decoder can read is read, in training as in prediction; what is cut off or far too large is refused."""

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from maskrcnn_jax.data import images
from maskrcnn_jax.data.image_headers import image_size, is_complete, orientation
from maskrcnn_jax.data.images import BrokenImageError, UndecodableError, check_and_decode, decode_image
from maskrcnn_jax.inference.inputs import read_image

HEIGHT, WIDTH = 48, 64
RNG = np.random.default_rng(0)
PIXELS = cv2.resize(RNG.integers(0, 255, (6, 8, 3), np.uint8), (WIDTH, HEIGHT))
PICTURE = Image.fromarray(PIXELS)


def encoded(form, picture=PICTURE, **options):
    content = io.BytesIO()
    picture.save(content, form, **options)
    return content.getvalue()


def with_restarts(**options):
    return cv2.imencode(".jpg", PIXELS, [cv2.IMWRITE_JPEG_RST_INTERVAL, 2])[1].tobytes()


def with_thumbnail():
    thumbnail = encoded("JPEG", PICTURE.resize((16, 12)))
    return JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail + JPEG[2:]


def with_fill_bytes():
    """Put fill bytes before the markers of a JPEG that lie before its compressed data, and before its end."""
    start = JPEG.index(b"\xff\xda")
    return JPEG[:2] + b"\xff\xff\xff" + JPEG[2:start] + b"\xff\xff" + JPEG[start:-2] + b"\xff\xff\xff" + JPEG[-2:]


JPEG = encoded("JPEG")
JPEGS = {
    "baseline": JPEG,
    "progressive": encoded("JPEG", progressive=True),
    "restarts": with_restarts(),
    "thumbnail": with_thumbnail(),
    "fill": with_fill_bytes(),
    "cmyk": encoded("JPEG", PICTURE.convert("CMYK")),
    "grey": encoded("JPEG", PICTURE.convert("L")),
}


def png_chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def read_both(data, tmp_path, size=(HEIGHT, WIDTH)):
    """Return what training reads, after making sure that prediction reads the same."""
    path = tmp_path / "image"
    path.write_bytes(data)
    image = check_and_decode(path, data, size)
    np.testing.assert_array_equal(read_image(path), image)
    return image


TAILS = {
    "nothing": b"",
    "video": b"\0\0\0\x18ftypmp42" + RNG.integers(0, 256, 100_000, np.uint8).tobytes(),
    "start of a scan": b"\0\0\0\x08free\xff\xda",
    "another start": b"\xff\xd8",
    "another image": encoded("JPEG", Image.fromarray(RNG.integers(0, 256, (300, 300), np.uint8)), quality=99),
    "zeros": bytes(5000),
    "half of a marker": b"\xff",
}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_is_read_whatever_follows_its_end(name, tail, tmp_path):
    image = read_both(JPEGS[name] + TAILS[tail], tmp_path)
    np.testing.assert_array_equal(image, cv2.imdecode(np.frombuffer(JPEGS[name], np.uint8), 1)[..., ::-1])


@pytest.mark.parametrize("tail", ["nothing", "another image", "zeros", "half of a marker"])
@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_that_is_cut_off_in_its_own_data_is_truncated(name, tail, tmp_path):
    data = JPEGS[name]
    first = data.rindex(b"\xff\xda") + 2
    for end in range(first, len(data) - 1, 7):
        cut = data[:end] + TAILS[tail]
        assert not is_complete(cut), end
        with pytest.raises(BrokenImageError, match="image is truncated"):
            check_and_decode(Path("image"), cut, (HEIGHT, WIDTH))
        (tmp_path / "image").write_bytes(cut)
        with pytest.raises(BrokenImageError, match="it is truncated"):
            read_image(tmp_path / "image")


def test_a_jpeg_with_several_pictures_is_read_as_the_first(tmp_path):
    mpo = encoded("MPO", save_all=True, append_images=[PICTURE.resize((16, 12))])
    assert np.abs(read_both(mpo, tmp_path).astype(int) - PIXELS).mean() < 5


_TEXT = b"x" * 1_500_000
PNG = encoded("PNG")


@pytest.mark.parametrize(
    "extra",
    [
        png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(_TEXT)),
        png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(_TEXT)),
        png_chunk(b"iCCP", b"p\0\0" + zlib.compress(_TEXT)),
        png_chunk(b"tEXt", b"Comment\0" + _TEXT) * 44,
        png_chunk(b"tEXt", b"Comment\0x")[:-1] + b"\0",  # a wrong checksum
        png_chunk(b"tEXt", b"IEND\0x"),
        png_chunk(b"iTXt", b"workflow\0\0\0\0\0" + _TEXT * 6),
        png_chunk(b"eXIf", b"MM\0*" + bytes(9_000_000)),
        png_chunk(b"caBX", bytes(9_000_000)),
    ],
    ids=["compressed", "international", "profile", "many", "checksum", "name of the end", "long", "exif", "content"],
)
def test_a_png_is_read_whatever_is_written_beside_the_pixels(extra, tmp_path):
    np.testing.assert_array_equal(read_both(PNG[:33] + extra + PNG[33:] + b"behind the end", tmp_path), PIXELS)
    for end in (40, len(PNG) // 2, len(PNG) - 9):
        with pytest.raises(UndecodableError, match="is truncated"):
            decode_image(PNG[:33] + extra + PNG[33:end])


FORMS = {
    "gif": encoded("GIF"),
    "animated gif": encoded("GIF", save_all=True, append_images=[PICTURE.rotate(180)]),
    "webp": encoded("WEBP", quality=90),
    "lossless webp": encoded("WEBP", lossless=True),
    "webp with alpha": encoded("WEBP", PICTURE.convert("RGBA"), exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"),
    "animated webp": encoded("WEBP", save_all=True, append_images=[PICTURE.rotate(180)], lossless=True),
    "bmp": encoded("BMP"),
    "bmp from above": cv2.imencode(".bmp", PIXELS[..., ::-1])[1].tobytes(),
    "tiff of several pages": encoded("TIFF", save_all=True, append_images=[PICTURE.resize((9, 9))]),
    "big tiff": encoded("TIFF", big_tiff=True),
    "tiff in cmyk": encoded("TIFF", PICTURE.convert("CMYK")),
    "animated png": encoded("PNG", save_all=True, append_images=[PICTURE.rotate(180)]),
    "png of 16 bits": cv2.imencode(".png", np.uint16(PIXELS[..., ::-1]) * 257)[1].tobytes(),
    "ppm": encoded("PPM"),
    "jpeg 2000": encoded("JPEG2000"),
    "avif": encoded("AVIF", quality=95),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_format_is_read_and_of_several_frames_the_first(name, tmp_path):
    assert image_size(FORMS[name]) == (HEIGHT, WIDTH)
    image = read_both(FORMS[name], tmp_path)
    assert np.abs(image.astype(int) - PIXELS).mean() < 8


def test_a_scan_with_few_bytes_is_read_if_annotations_state_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_PIXELS_OF_ANY_FILE", 200 * 300)
    paper = Image.new("1", (400, 300), 1)
    for data in (encoded("PNG", paper), encoded("TIFF", paper, compression="group4")):
        assert len(data) * 100 < 300 * 400
        assert check_and_decode(Path("a"), data, (300, 400)).shape == (300, 400, 3)
        with pytest.raises(UndecodableError, match=r"has 300x400 pixels .*may have 60,000 pixels, so reduce it"):
            decode_image(data)
        with pytest.raises(BrokenImageError, match="has 300x400 pixels .*unless annotations state this size"):
            check_and_decode(Path("a"), data, (300, 399))
    monkeypatch.setattr(images, "_PIXELS_OF_ANY_FILE", 300 * 400)
    assert read_both(data, tmp_path, (300, 400)).all()


def test_a_scan_of_which_pillow_tells_only_the_number_of_pixels_is_read_if_annotations_state_its_size(monkeypatch):
    data = encoded("JPEG2000", Image.new("L", (400, 300), 255))
    monkeypatch.setattr(images, "_PIXELS_OF_ANY_FILE", 200 * 300)
    monkeypatch.setattr(images, "_PIXELS_OF_A_BYTE", 10)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200 * 100)  # an error from twice as many on
    assert image_size(data) == (300 * 400, 1)
    assert check_and_decode(Path("a"), data, (300, 400)).shape == (300, 400, 3)
    with pytest.raises(BrokenImageError, match="unless annotations state this size"):
        check_and_decode(Path("a"), data, (300, 399))


def test_a_plan_in_a2_is_read_without_annotations():
    data = encoded("TIFF", Image.new("1", (7016, 4960), 1), compression="group4")
    assert decode_image(data).shape == (4960, 7016, 3)


def test_exif_is_blamed_only_where_it_turns_the_image():
    exif = Image.Exif()
    exif[0x0112] = 6
    with pytest.raises(BrokenImageError, match="follow its EXIF orientation"):
        check_and_decode(Path("a"), encoded("JPEG", exif=exif), (WIDTH, HEIGHT))
    with pytest.raises(BrokenImageError, match="have height and width exchanged"):
        check_and_decode(Path("a"), JPEG, (WIDTH, HEIGHT))


def test_pixels_that_are_no_bytes_are_named():
    data = cv2.imencode(".tiff", np.float32(PIXELS))[1].tobytes()
    for channels in (3, 4):
        with pytest.raises(UndecodableError, match="has pixels of type float32; 8 or 16 bits"):
            decode_image(data, channels)
    with pytest.raises(UndecodableError, match="has pixels of type float32"):
        decode_image(encoded("TIFF", Image.fromarray(np.float32(PIXELS[..., 0]))))


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_training_reads_the_pixels_as_stored_and_prediction_upright(form, turn, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encoded(form, exif=exif)
    stored = check_and_decode(Path("a"), data, (HEIGHT, WIDTH))
    assert np.abs(stored.astype(int) - PIXELS).mean() < 8
    (tmp_path / "a").write_bytes(data)
    with Image.open(tmp_path / "a") as opened:
        upright = ImageOps.exif_transpose(opened).convert("RGB")
    assert np.abs(read_image(tmp_path / "a").astype(int) - np.asarray(upright)).mean() < 8


@pytest.mark.parametrize(
    "entry",
    [
        b"\2\0\2\0\0\0" + b"6\0\0\0",  # text
        b"\3\0\1\0\0\0" + b"\x09\0\0\0",
        b"\5\0\1\0\0\0" + b"\x1a\0\0\0",  # a fraction
    ],
    ids=["text", "nine", "fraction"],
)
def test_an_orientation_that_is_none_turns_nothing(entry, tmp_path):
    exif = b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1" + entry.ljust(10, b"\0") + bytes(4) + b"\6\0\0\0\1\0\0\0"
    data = encoded("WEBP", exif=exif)
    assert orientation(data) == 1
    (tmp_path / "a").write_bytes(data)
    assert read_image(tmp_path / "a", 3).shape == (HEIGHT, WIDTH, 3)
    deep = encoded("WEBP", Image.fromarray(np.dstack([PIXELS, PIXELS[..., :1]])), exif=exif, lossless=True)
    assert decode_image(deep, 4, upright=True).shape == (HEIGHT, WIDTH, 4)


def test_the_orientation_is_that_of_the_first_block_however_large_the_image():
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg = bytearray(encoded("JPEG", exif=exif))
    place = jpeg.index(b"\xff\xc0")
    jpeg[place + 5 : place + 9] = struct.pack(">HH", 12240, 16320)
    assert image_size(bytes(jpeg)) == (12240, 16320) and orientation(bytes(jpeg)) == 6
    png, damaged = encoded("PNG", exif=exif), b"\0\0\0\3eXIfbad" + struct.pack(">I", zlib.crc32(b"eXIfbad"))
    place = png.index(b"IEND") - 4
    assert orientation(png[:place] + damaged + png[place:]) == 6
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    assert orientation(encoded("JPEG", xmp=xmp)) == 1


@pytest.mark.parametrize(
    "data",
    [b"GIF89a", b"BM", b"RIFF\0\0\0\0WEBP", b"II*\0", b"MM\0+" + b"\xff" * 40, b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"],
)
def test_a_header_that_ends_too_early_has_no_size(data):
    assert image_size(data) is None
