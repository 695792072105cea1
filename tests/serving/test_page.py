"""The page of the service, used in a browser."""

import base64
import contextlib
import json
import re
import time

import pytest

from tests.browser import CHROMIUM, Browser
from tests.serving.service import NAMES, ColourPredictor, draw_regions, encoded, running

DROP = """(() => {
  const bytes = Uint8Array.from(atob("%s"), letter => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], %s));
  document.getElementById("hint").dispatchEvent(
    new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true}));
})()"""


@pytest.fixture(scope="module")
def model():
    return ColourPredictor(side=256)


@pytest.fixture(scope="module")
def page(model, tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("Chromium is not installed")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    with running(model, max_bytes=1_000_000) as service, contextlib.closing(browser) as page:
        page.address = f"http://127.0.0.1:{service.port}/"
        yield page


def drop(page, content, name="shapes.png"):
    page.look(DROP % (base64.b64encode(content).decode(), json.dumps(name)))
    while not page.look("document.getElementById('busy').hidden"):
        time.sleep(0.02)


def status(page):
    return page.look("document.getElementById('status').textContent")


def objects(page):
    return page.look("[...document.querySelectorAll('#objects .name')].map(row => row.textContent)")


def pixel(page, x, y):
    """Return the colour of the canvas at a place in pixels of the image."""
    return page.look(f"[...context.getImageData({x} * scale, {y} * scale, 1, 1).data].slice(0, 3)")


def slide(page, value):
    page.look(f"threshold.value = {value}; threshold.dispatchEvent(new Event('input'))")


def test_dropped_images_are_drawn_with_their_objects(page, tmp_path):
    page.open(page.address)
    image = draw_regions(256)
    drop(page, encoded(image))
    assert "shapes.png: 256 × 256 pixels" in status(page)
    assert objects(page) == NAMES[:2], "the blue one has a lower score"
    inside, background, hole = (60, 60), (140, 20), (176, 80)
    assert pixel(page, *background) == image[background[::-1]].tolist()
    assert pixel(page, *hole) == image[hole[::-1]].tolist(), "a hole is not filled"
    assert pixel(page, *inside) != image[inside[::-1]].tolist()

    slide(page, 0.3)
    assert objects(page) == NAMES
    struck = "[...document.querySelectorAll('#classes .name')].map(n => getComputedStyle(n).textDecorationLine)"
    assert page.look(struck) == ["none"] * 3
    page.click("#classes input")  # red
    assert page.look(struck) == ["line-through", "none", "none"]
    assert objects(page) == NAMES[1:]
    assert pixel(page, *inside) == image[inside[::-1]].tolist()
    slide(page, 0.99)
    assert objects(page) == []
    slide(page, 0.3)
    page.click("#none")
    assert objects(page) == []
    page.click("#all")
    assert objects(page) == NAMES
    assert page.look("document.querySelector('#classes li:last-child .name').textContent") == NAMES[2], "escaped"
    page.screenshot(tmp_path / "page.png")


def test_the_object_under_the_mouse_is_shown_alone(page):
    page.open(page.address)
    drop(page, encoded(draw_regions(256)))
    x, y, scale = page.look("(r => [r.x, r.y, r.width / 256])(canvas.getBoundingClientRect())")
    chosen = "document.querySelector('#objects .chosen .name')?.textContent"
    page.move(x + 60 * scale, y + 60 * scale)
    assert page.look(chosen) == "red"
    page.move(x + 176 * scale, y + 80 * scale)
    assert page.look(chosen) is None, "the hole of the green circle"


def test_the_keys_lead_through_the_objects(page):
    page.open(page.address)
    drop(page, encoded(draw_regions(256)))
    chosen = "document.querySelector('#objects .chosen .name')?.textContent"
    page.look("document.querySelector('#objects li').focus()")
    assert page.look(chosen) == "red"
    page.look("document.querySelector('#objects li').blur()")
    assert page.look(chosen) is None


def test_long_names_leave_room_for_the_score_in_the_picture(page):
    page.open(page.address)
    drop(page, encoded(draw_regions(256)))
    page.look("answer.detections[0].name = 'long name '.repeat(40)")
    # One expression: a change of size, which draws too, cannot come between.
    written = page.look("window.written = []; context.fillText = text => written.push(text); update(); written")
    assert [bool(re.fullmatch(r".{,25} 0\.\d\d", text)) for text in written] == [True, True], written


def test_what_is_no_image_is_said_and_the_last_answer_stays(page):
    page.open(page.address)
    drop(page, encoded(draw_regions(256)))
    drop(page, b"no image at all")
    assert "cannot be read as an image" in status(page)
    assert objects(page) == NAMES[:2]
    drop(page, bytes(1_000_001))
    assert "at most 1 MB" in status(page)


def test_a_service_that_does_not_answer_is_told_of(page):
    page.open(page.address)
    page.look("window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    drop(page, encoded(draw_regions(256)))
    assert status(page) == "The service cannot be reached."
    page.look("window.fetch = async () => new Response('<html>', {status: 502})")
    drop(page, encoded(draw_regions(256)))
    assert status(page) == "The service gave no answer (status 502)."


def test_images_that_browsers_cannot_show_are_drawn_on_grey(page):
    page.open(page.address)
    drop(page, encoded(draw_regions(256), ".tif"), "scan.tif")
    assert "cannot show the file" in status(page)
    assert objects(page) == NAMES[:2] and pixel(page, 140, 20) == [136, 136, 136]


def test_the_page_fits_phones_and_the_dark(page):
    page.open(page.address, width=390, height=800, dark=True)
    drop(page, encoded(draw_regions(256)))
    assert page.look("document.documentElement.scrollWidth") <= 390
    luminance = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number).reduce((a, b) => a + b)"
    assert page.look(luminance) < 200
    page.click("#theme")
    assert page.look(luminance) > 600
