"""Images with a fourth channel, from the files to the evaluation."""

import json

import cv2
import numpy as np
import pytest

from maskrcnn_jax.config import to_options
from maskrcnn_jax.data.dataset import load_coco
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.evaluation.evaluator import Evaluator
from maskrcnn_jax.training.loop import train
from tests.data.loading import load
from tests.models.tiny import tiny_model


@pytest.fixture
def rgbd_dir(shapes_dir, tmp_path):
    """The shapes as PNG files whose alpha channel is a depth: the row of the pixel and twice its column."""
    folder = tmp_path / "rgbd"
    (folder / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (folder / split).mkdir()
        content = json.loads((shapes_dir / "annotations" / f"instances_{split}.json").read_text())
        for image in content["images"]:
            pixels = cv2.imread(str(shapes_dir / split / image["file_name"]))
            rows, columns = np.indices(pixels.shape[:2])
            depth = np.uint8(rows + 2 * columns)
            image["file_name"] = f"{image['id']}.png"
            cv2.imwrite(str(folder / split / image["file_name"]), np.dstack([pixels, depth]))
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.slow
def test_two_steps_train_on_rgbd_and_are_evaluated(config, rgbd_dir, tmp_path):
    config.data.coco_dir = str(rgbd_dir)
    config.model.in_channels = 4
    config.max_steps = config.log_every = 2
    config.data.color_jitter = 0.2
    evaluations = []

    def make_evaluate(categories):
        evaluator = Evaluator(to_options(config), categories)

        def evaluate(model):
            assert model.backbone.stem.conv.kernel.shape[2] == 4
            evaluations.append(evaluator(model))
            return evaluations[-1]

        return evaluate

    train(to_options(config), tmp_path / "run", make_evaluate=make_evaluate)
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert np.isfinite(line["loss"])
    assert evaluations[0].picture.shape[2] == 3


@pytest.mark.parametrize("resize", ["uint8", "float32", "pillow"])
def test_depth_is_resized_and_mirrored_and_keeps_its_values_when_colours_change(rgbd_dir, resize):
    index = load_coco(rgbd_dir, "train2017")
    options = {"batch_size": 4, "short_side": 96, "long_side": 96, "train": True, "annotations": False}
    options |= {"resize": resize, "hflip": 1.0, "color_jitter": 0.5}
    rgbd, rgb = (next(iter(load(index, **options, channels=channels))).images for channels in (4, 3))
    assert rgbd.shape == (4, 96, 96, 4)
    np.testing.assert_array_equal(rgbd[..., :3], rgb)
    place = np.clip((np.arange(96) + 0.5) * 64 / 96 - 0.5, 0, 63)
    depth = place[:, None] + 2 * (63 - place)
    np.testing.assert_allclose(rgbd[..., 3], np.broadcast_to(depth, (4, 96, 96)), atol=1.01)  # rounded once an axis


def test_a_file_without_depth_is_named(rgbd_dir):
    index = load_coco(rgbd_dir, "train2017")
    path = index.image_path(0)
    cv2.imwrite(str(path), cv2.imread(str(path)))
    with pytest.raises(UserError, match=rf"{path.name} has 3 channels where model.in_channels is 4; replace it"):
        index.read_image(0, 4)
    assert index.read_image(0).shape == (64, 64, 3)
    assert index.read_image(1, 4).shape == (64, 64, 4)


def test_a_depth_of_16_bits_keeps_its_upper_8(rgbd_dir):
    index = load_coco(rgbd_dir, "train2017")
    pixels = np.random.default_rng(0).integers(0, 2**16, (64, 64, 4), dtype=np.uint16)
    cv2.imwrite(str(index.image_path(0)), pixels)
    np.testing.assert_array_equal(index.read_image(0, 4), pixels[..., [2, 1, 0, 3]] >> 8)


def test_further_channels_are_normalised_around_a_half():
    images = np.full((1, 32, 32, 5), 51, np.uint8)
    sizes = np.array([[32, 20]], np.int32)
    normalised = np.asarray(tiny_model(in_channels=5).normalize(images, sizes))
    np.testing.assert_array_equal(normalised[..., :3], tiny_model().normalize(images[..., :3], sizes))
    np.testing.assert_allclose(normalised[0, :, :20, 3:], (0.2 - 0.5) / 0.25, rtol=1e-5)
    assert not normalised[0, :, 20:].any()


def test_channels_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="in_channels is 1; use at least 3"):
        tiny_model(in_channels=1)
    images = np.zeros((1, 32, 32, 3), np.uint8)
    with pytest.raises(UserError, match="images have 3 channels where model.in_channels is 4"):
        tiny_model(in_channels=4).normalize(images, np.array([[32, 32]], np.int32))
