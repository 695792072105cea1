"""What the service answers, over HTTP."""

import asyncio
import concurrent.futures
import http.client
import io
import itertools
import json
import re

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.serving.app import Service, create_app
from maskrcnn_jax.serving.limits import Limits
from tests.children import wait_until
from tests.serving.service import NAMES, ColourPredictor, draw_regions, encoded, running

IMAGE = draw_regions()


@pytest.fixture(scope="module")
def model():
    return ColourPredictor()


@pytest.fixture(scope="module")
def service(model):
    with running(model, max_bytes=100_000, max_pixels=1_000_000) as service:
        yield service


def test_the_objects_are_those_of_the_model(service, model):
    expected = model.predict(IMAGE, min_score=0)
    code, answer = service.predict(encoded(IMAGE), "?min_score=0")
    assert code == 200
    assert (answer["width"], answer["height"]) == (64, 64)
    assert [found["name"] for found in answer["detections"]] == ["red", "green", "blue & <bold>"]
    assert [found["category_id"] for found in answer["detections"]] == [10, 20, 30]
    np.testing.assert_array_equal(np.float32([found["box"] for found in answer["detections"]]), expected.boxes)
    np.testing.assert_array_equal(np.float32([found["score"] for found in answer["detections"]]), expected.scores)
    masks = [coco_mask.decode(found["rle"]) for found in answer["detections"]]
    np.testing.assert_array_equal(np.array(masks, bool), expected.masks)


def test_names_come_as_they_are_whatever_they_hold():
    model = ColourPredictor()
    names = ["\U0001f600 \u05e9\u05dc\u05d5\u05dd", "</script>\"'&", "half \udcff"]
    model.categories = Categories.create([10, 20, 30], names)
    with running(model) as service:
        answer = service.predict(encoded(IMAGE), "?min_score=0")[1]
        assert [found["name"] for found in answer["detections"]] == names
        assert service.ask("POST", "/predict?min_score=0&format=png", encoded(IMAGE))[0].status == 200
        response, page = service.ask("GET", "/")
        assert response.status == 200 and page.count(b"</script>") == 1


def test_low_scores_are_left_out(service):
    scores = [found["score"] for found in service.predict(encoded(IMAGE), "?min_score=0")[1]["detections"]]
    assert len(scores) == 3 and scores[2] < 0.5 < scores[1]
    assert len(service.predict(encoded(IMAGE))[1]["detections"]) == 2, "0.5 if nothing is said"
    assert service.predict(encoded(IMAGE), "?min_score=1")[1]["detections"] == []


def test_polygons_fill_to_the_masks(service, model):
    expected = model.predict(IMAGE, min_score=0).masks
    answer = service.predict(encoded(IMAGE), "?min_score=0&masks=polygons")[1]
    for found, mask in zip(answer["detections"], expected, strict=True):
        # OpenCV fills polygons through the centres of pixels, so the corners are drawn four times as large.
        filled = np.zeros((256, 256), np.uint8)
        rings = [np.array(ring) * 4 for region in found["polygons"] for ring in region]
        cv2.fillPoly(filled, rings, 1)
        np.testing.assert_array_equal(filled[2::4, 2::4].astype(bool), mask)
    assert [len(found["polygons"][0]) for found in answer["detections"]] == [1, 2, 1], "the circle has a hole"


def test_masks_can_be_left_out(service):
    answer = service.predict(encoded(IMAGE), "?masks=none")[1]
    assert set(answer["detections"][0]) == {"name", "category_id", "score", "box"}


@pytest.mark.parametrize(("form", "kind"), [("jpg", "image/jpeg"), ("png", "image/png")])
def test_a_picture_is_drawn_as_the_model_draws_it(service, model, form, kind):
    response, content = service.ask("POST", f"/predict?format={form}", encoded(IMAGE))
    assert response.status == 200 and response.headers["content-type"] == kind
    drawn = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    np.testing.assert_allclose(drawn, model.predict(IMAGE).draw(), atol=0 if form == "png" else 80)


def test_photographs_are_turned_upright_as_their_exif_entry_says(service):
    content, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(IMAGE[:, :40]).save(content, "JPEG", exif=exif)
    answer = service.predict(content.getvalue())[1]
    assert (answer["width"], answer["height"]) == (64, 40)


@pytest.mark.parametrize("form", [".jpg", ".webp", ".bmp", ".tif", ".ppm"])
def test_other_formats_are_read(service, form):
    code, answer = service.predict(encoded(IMAGE, form))
    assert code == 200 and [found["name"] for found in answer["detections"]] == ["red", "green"]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("?min_score=high", "min_score.*0 to 1"),
        ("?min_score=nan", "min_score"),
        ("?min_score=-1", "min_score"),
        ("?min_score=", "min_score"),
        ("?format=gif", "gif.*json, jpg, png"),
        ("?masks=rel", "rel.*rle, polygons, none"),
        ("?score=0.5", "score.*min_score, format and masks"),
        ("?%00=%ff", "no parameter"),
        ("?min_score=0.1&min_score=0.9", "min_score is given 2 times"),
    ],
)
def test_a_wrong_parameter_is_named(service, query, words):
    code, answer = service.predict(encoded(IMAGE), query)
    assert code == 400 and re.search(words, answer["error"])


def test_wrong_methods_and_paths_are_told_what_is_right(service):
    response, content = service.ask("GET", "/predict")
    assert response.status == 405 and response.headers["allow"] == "POST"
    assert "use POST" in json.loads(content)["error"]
    response, content = service.ask("GET", "/../../etc/passwd")
    assert response.status == 404 and "/predict" in json.loads(content)["error"]


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "Multipart/Form-Data; boundary=x"])
def test_a_form_is_refused_with_the_command_that_works(service, kind):
    code, answer = service.predict(b"--x", headers={"Content-Type": kind})
    assert code == 415 and "--data-binary" in answer["error"]


def test_an_image_too_long_for_a_jpeg_is_refused_as_jpeg_only(service):
    image = encoded(np.zeros((1, 65_501, 3), np.uint8))
    code, answer = service.predict(image, "?format=jpg")
    assert code == 422 and "65,500 pixels" in answer["error"] and "png" in answer["error"]
    assert service.predict(image)[0] == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_pages_of_other_sites_cannot_send_images(service, site):
    code, answer = service.predict(encoded(IMAGE), headers={"Sec-Fetch-Site": site, "Origin": "http://other.example"})
    assert code == 403 and "another site" in answer["error"]
    assert service.predict(encoded(IMAGE), headers={"Sec-Fetch-Site": "same-origin"})[0] == 200
    assert service.ask("GET", "/", headers={"Sec-Fetch-Site": site})[0].status == 200, "a link"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://192.0.2.1:8000", "Host": "192.0.2.1:8000"}, 200),
        ({"Origin": "https://192.0.2.1", "Host": "192.0.2.1"}, 200),
        ({"Origin": "https://other.example", "Host": "192.0.2.1:8000"}, 403),
        ({"Origin": "null", "Host": "192.0.2.1:8000"}, 403),
        ({"Origin": "https://public.example", "Host": "localhost", "Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
def test_where_browsers_send_only_an_origin_it_must_be_the_service(service, headers, status):
    assert service.predict(encoded(IMAGE), headers=headers)[0] == status


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("proxy.example", 200),
        ("other.example:8000", 403),
        ("127.0.0.1.other.example", 403),
        ("[", 403),
        ("", 403),
    ],
)
def test_a_local_service_answers_to_its_own_names_only(model, host, status):
    service = Service(model, Limits(), title="")
    try:
        app = create_app(service, names=["proxy.example"])
        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": "/health", "headers": [(b"host", host.encode())]}
        asyncio.run(app(scope | {"query_string": b""}, None, send))
        assert sent[0]["status"] == status
    finally:
        service.close()


def test_files_and_images_that_are_too_large_are_refused(service):
    code, answer = service.predict(bytes(100_001))
    assert code == 413 and "100,000 bytes" in answer["error"]
    code, answer = service.predict(bytes(1000) for _ in range(200))  # in chunks, without a length
    assert code == 413 and "100,000 bytes" in answer["error"]
    bomb = encoded(np.zeros((1200, 1200, 3), np.uint8))
    assert len(bomb) < 100_000
    code, answer = service.predict(bomb)
    assert code == 413 and "1200x1200" in answer["error"]


def test_the_page_needs_nothing_from_elsewhere_and_escapes_names(service):
    response, content = service.ask("GET", "/")
    page = content.decode()
    assert response.status == 200 and response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "a &lt;test&gt;" in page and NAMES[2] not in page
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert links == ["data:,", "health", "metrics"]


def metric(service, name):
    text = service.ask("GET", "/metrics")[1].decode()
    (value,) = re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(value)


def test_metrics_count_requests_errors_and_batches(model):
    with running(ColourPredictor()) as service:
        for body in (encoded(IMAGE), encoded(IMAGE), b"no image"):
            service.predict(body)
        assert service.ask("GET", "/nowhere")[0].status == 404
        assert metric(service, 'maskrcnn_requests_total{path="/predict",code="200"}') == 2
        assert metric(service, 'maskrcnn_requests_total{path="/predict",code="422"}') == 1
        assert metric(service, 'maskrcnn_requests_total{path="other",code="404"}') == 1
        assert metric(service, 'maskrcnn_request_seconds_bucket{le="+Inf"}') == 3
        assert metric(service, 'maskrcnn_batch_size_bucket{le="1"}') == 2
        assert metric(service, "maskrcnn_queue_length") == 0
        assert metric(service, "maskrcnn_requests_in_work") == 0
        text = service.ask("GET", "/metrics")[1].decode()
    names = set(re.findall(r"^(\w+?)(?:_bucket|_sum|_count)?(?:\{.*\})? [\d.]+$", text, re.MULTILINE))
    assert names == set(re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE)), "a line is not in Prometheus's format"


def test_a_full_queue_answers_503_and_when_to_come_again():
    model = ColourPredictor()
    with running(model, max_queue=2) as service, concurrent.futures.ThreadPoolExecutor(5) as pool:
        with model.held():
            asked = [pool.submit(service.ask, "POST", "/predict", encoded(IMAGE)) for _ in range(5)]
            refused = [future.result()[0] for future in itertools.islice(concurrent.futures.as_completed(asked), 3)]
        assert sorted(future.result()[0].status for future in asked) == [200, 200, 503, 503, 503]
        assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
        assert service.predict(encoded(IMAGE))[0] == 200


def test_an_answer_that_takes_too_long_is_504_and_the_next_one_comes():
    model = ColourPredictor()
    with running(model, timeout=0.5) as service:
        with model.held():
            code, answer = service.predict(encoded(IMAGE))
        assert code == 504 and "within 0.5 s" in answer["error"]
        wait_until(lambda: service.predict(encoded(IMAGE))[0] == 200)


def test_a_failing_model_is_500_and_the_service_goes_on(service, model):
    model.error = MemoryError("too many images")
    code, answer = service.predict(encoded(IMAGE))
    assert code == 500 and "log" in answer["error"] and "too many images" not in answer["error"]
    assert service.predict(encoded(IMAGE))[0] == 200


def test_a_client_that_leaves_takes_its_image_out_of_the_queue():
    model = ColourPredictor()
    with running(model, max_batch=1) as service, concurrent.futures.ThreadPoolExecutor(1) as pool:
        with model.held():
            busy = pool.submit(service.predict, encoded(IMAGE))
            wait_until(lambda: model.batches == [1])
            connection = http.client.HTTPConnection("127.0.0.1", service.port)
            connection.request("POST", "/predict", encoded(IMAGE))
            wait_until(lambda: metric(service, "maskrcnn_queue_length") == 1)
            connection.close()
            wait_until(lambda: metric(service, "maskrcnn_requests_in_work") == 1)
        assert busy.result()[0] == 200
        assert metric(service, 'maskrcnn_requests_total{path="/predict",code="499"}') == 1
    assert model.batches == [1]
