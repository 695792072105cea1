"""Pictures, videos and JSON files come out for what can be read, and what cannot is named."""

import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference import media
from maskrcnn_jax.inference.annotation_files import Annotations
from maskrcnn_jax.inference.media import DEFAULT_FPS, is_video, list_images, predict_images, predict_video
from maskrcnn_jax.inference.predictor import Predictor
from maskrcnn_jax.options import ModelOptions, Options
from maskrcnn_jax.structures import Batch, Detections


def prepare(image):
    """Pads to 64 x 64 without resizing."""
    height, width = image.shape[:2]
    images = np.zeros((1, 64, 64, 3), np.uint8)
    images[0, :height, :width] = image
    size = np.array([[height, width]], np.int32)
    return Batch(images, size, size, np.zeros(1, np.int32), np.ones(1, bool), None)


def detect(images, sizes):
    """A cup at 0.9 whose right edge is the mean red of the image, a dog at 0.3 and a padding row."""
    height, width = sizes[0]
    red = round(float(images[0, :height, :width, 0].mean()))
    boxes = np.float32([[[2, 2, red, 30], [4, 4, 20, 20], [0, 0, 9, 9]]])
    masks = np.ones((1, 3, 28, 28), np.float32)
    valid = np.array([[True, True, False]])
    return Detections(boxes, np.float32([[0.9, 0.3, 0.95]]), np.int32([[1, 2, 1]]), masks, valid)


class FakePredictor(Predictor):
    """A predictor that sees images as they are and finds in them what ``detect`` says."""

    def __init__(self, channels=3):
        self.options = Options(model=ModelOptions(in_channels=channels))
        self.categories = Categories.create([7, 9], ["cup", "dog"])
        self._detect = detect
        self.seen = []

    def _prepare(self, image):
        self.seen.append(image)
        return prepare(image[..., :3])


def write_image(path, red, size=(40, 50)):
    image = np.zeros((*size, 3), np.uint8)
    image[..., 2] = red  # OpenCV writes BGR
    cv2.imwrite(str(path), image)


def test_a_folder_gives_pictures_and_results_and_names_what_it_cannot_read(tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out" / "deep"
    folder.mkdir()
    write_image(folder / "b.png", 30)
    write_image(folder / "a.jpg", 20, (48, 36))
    (folder / "c.png").write_bytes(b"no image")
    (folder / "d.png").write_bytes(b"")
    (folder / "notes.txt").write_text("ignored")
    paths = list_images(folder)
    assert [path.name for path in paths] == ["a.jpg", "b.png", "c.png", "d.png"]
    unreadable = predict_images(FakePredictor(), paths, output, min_score=0.5)
    assert [path.name for path in unreadable] == ["c.png", "d.png"]
    files = ["a.jpg", "b.png", "counts.csv", "detections.csv", "detections.json", "images.json"]
    assert sorted(file.name for file in output.iterdir()) == files
    results = json.loads((output / "detections.json").read_text())
    assert [(r["image_id"], r["category_id"], r["bbox"]) for r in results] == [
        (1, 7, [2.0, 2.0, 18.0, 28.0]),
        (2, 7, [2.0, 2.0, 28.0, 28.0]),
    ]
    assert cv2.imread(str(output / "b.png")).shape == (40 * 11, 50 * 11, 3)
    coco = COCO(str(output / "images.json"))
    assert [coco.imgs[i]["file_name"] for i in (1, 2)] == ["a.jpg", "b.png"]
    assert len(coco.loadRes(str(output / "detections.json")).anns) == 2


def test_depth_reaches_the_model_and_a_file_without_it_is_named(tmp_path):
    image = np.dstack([np.full((40, 50), value, np.uint8) for value in (1, 2, 30, 77)])  # OpenCV writes BGRA
    cv2.imwrite(str(tmp_path / "a.png"), image)
    predictor = FakePredictor(channels=4)
    predict_images(predictor, [tmp_path / "a.png"], tmp_path / "out", min_score=0.5)
    assert predictor.seen[0].shape == (40, 50, 4)
    assert predictor.seen[0][0, 0].tolist() == [30, 2, 1, 77]
    assert cv2.imread(str(tmp_path / "out" / "a.png"), cv2.IMREAD_UNCHANGED).shape[2] == 3
    write_image(tmp_path / "b.png", 30)
    with pytest.raises(UserError, match=r"b\.png has 3 channels where model.in_channels is 4"):
        predict_images(predictor, [tmp_path / "b.png"], tmp_path / "out", min_score=0.5)


def test_the_minimum_score_lets_weaker_detections_through(tmp_path):
    write_image(tmp_path / "a.png", 30)
    predict_images(FakePredictor(), [tmp_path / "a.png"], tmp_path / "out", min_score=0.2)
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [result["category_id"] for result in results] == [7, 9]


def test_an_input_without_a_readable_image_is_the_users_to_mend(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="does not exist"):
        list_images(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no images"):
        list_images(tmp_path / "empty")
    with pytest.raises(UserError, match="none of 1 files"):
        predict_images(FakePredictor(), list_images(tmp_path / "bad.png"), tmp_path / "out", min_score=0.5)
    assert not (tmp_path / "out" / "detections.json").exists()


def test_the_input_is_never_overwritten(tmp_path):
    write_image(tmp_path / "a.png", 30)
    with pytest.raises(UserError, match="overwrite"):
        predict_images(FakePredictor(), [tmp_path / "a.png"], tmp_path, min_score=0.5)
    for annotations, folder in ((Annotations(masks=True), "classes"), (Annotations(polygons="labelme"), "labelme")):
        with pytest.raises(UserError, match="overwrite"):
            predict_images(FakePredictor(), [tmp_path / folder / "a.png"], tmp_path, annotations=annotations)
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="overwrite"):
        predict_video(FakePredictor(), tmp_path / "a.mp4", tmp_path, min_score=0.5)


def test_an_output_that_is_a_file_is_the_users_to_mend(tmp_path):
    write_image(tmp_path / "a.png", 30)
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        predict_images(FakePredictor(), [tmp_path / "a.png"], tmp_path / "out", min_score=0.5)


def test_a_video_keeps_its_frame_rate_size_and_length(tmp_path):
    source = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(source), cv2.VideoWriter_fourcc(*"MJPG"), 12.5, (64, 48))
    for index in range(6):
        frame = np.zeros((48, 64, 3), np.uint8)
        frame[..., 2] = 20 + 5 * index  # OpenCV writes BGR
        writer.write(frame)
    writer.release()
    assert is_video(source) and not is_video(tmp_path)
    assert predict_video(FakePredictor(), source, tmp_path / "out", min_score=0.5) == 6
    capture = cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(12.5)
    assert (capture.get(cv2.CAP_PROP_FRAME_WIDTH), capture.get(cv2.CAP_PROP_FRAME_HEIGHT)) == (64, 48)
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 6
    _, frame = capture.read()
    assert np.abs(frame[40, 60].astype(int) - [0, 0, 20]).max() < 16  # still red, in OpenCV's order
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [result["image_id"] for result in results] == [1, 2, 3, 4, 5, 6]
    widths = [result["bbox"][2] for result in results]
    assert widths == sorted(widths) and widths[-1] - widths[0] == pytest.approx(25, abs=3)
    assert len(json.loads((tmp_path / "out" / "images.json").read_text())["images"]) == 6


@pytest.mark.parametrize("suffix", [".3gp", ".3GP", ".m2ts", ".wmv", ".asf", ".vob"])
def test_the_videos_of_phones_and_camcorders_are_told_by_their_endings(tmp_path, suffix):
    source = tmp_path / f"clip{suffix}"
    writer = cv2.VideoWriter(str(source), cv2.VideoWriter_fourcc(*"mp4v"), 25, (64, 48))
    for _ in range(3):
        writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.release()
    assert is_video(source)
    assert predict_video(FakePredictor(), source, tmp_path / "out", min_score=0.5) == 3


@pytest.mark.parametrize("rate", [119.9134, 59.94006, 23.976024, 7.4925, 480.25, 1e6, float("nan"), 0.0, -1.0])
def test_a_video_of_any_rate_and_size_is_written(tmp_path, monkeypatch, rate):
    frames = [np.full((47, 63, 3), 10 * i, np.uint8) for i in range(3)]
    monkeypatch.setattr(media, "_read_frames", lambda capture: iter(frames))
    monkeypatch.setattr(cv2, "VideoCapture", lambda path: SimpleNamespace(get=lambda _: rate, release=lambda: None))
    (tmp_path / "clip.mov").write_bytes(b"")
    assert predict_video(FakePredictor(), tmp_path / "clip.mov", tmp_path / "out", min_score=0.99) == 3
    monkeypatch.undo()
    capture = cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(rate if 0 < rate < 1e5 else DEFAULT_FPS, rel=1e-4)
    assert (capture.get(cv2.CAP_PROP_FRAME_WIDTH), capture.get(cv2.CAP_PROP_FRAME_HEIGHT)) == (64, 48)
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 3


def test_images_of_all_endings_are_listed_and_other_files_are_told(tmp_path, caplog):
    caplog.set_level("INFO", "maskrcnn_jax")
    for suffix in ("jfif", "gif", "avif", "jp2", "ppm", "JPG", "heic"):
        (tmp_path / f"a.{suffix}").write_bytes(b"")
    (tmp_path / ".hidden").write_bytes(b"")
    assert [path.name for path in list_images(tmp_path)] == ["a.JPG", "a.avif", "a.gif", "a.jfif", "a.jp2", "a.ppm"]
    assert f"not read in {tmp_path}, by their endings: 1, such as a.heic" in caplog.text


def test_pictures_of_formats_that_are_not_written_are_pngs(tmp_path, capsys):
    pixels = np.full((40, 50, 3), 30, np.uint8)
    for suffix in (".gif", ".ppm", ".jp2"):
        (tmp_path / f"a{suffix}").write_bytes(cv2.imencode(suffix, pixels)[1].tobytes())
    (tmp_path / "b.jfif").write_bytes(cv2.imencode(".jpg", pixels)[1].tobytes()[:-9])
    predict_images(FakePredictor(), list_images(tmp_path), tmp_path / "out", min_score=0.5)
    assert sorted(path.name for path in (tmp_path / "out").glob("a*")) == ["a.gif.png", "a.jp2.png", "a.ppm.png"]
    assert "b.jfif cannot be read as an image: it is truncated" in capsys.readouterr().out


def test_a_video_without_a_readable_frame_is_the_users_to_mend(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match="no frame of"):
        predict_video(FakePredictor(), tmp_path / "bad.mp4", tmp_path / "out", min_score=0.5)
    with pytest.raises(UserError, match="does not exist"):
        predict_video(FakePredictor(), tmp_path / "absent.mp4", tmp_path / "out", min_score=0.5)
