"""Several views of an image are merged: by values computed by hand, and by what must not matter."""

from dataclasses import replace

import numpy as np
import pytest

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.data.dataset import load_coco
from maskrcnn_jax.data.plan import buckets_for
from maskrcnn_jax.data.shapes import write_dataset
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.evaluation.augmented import detect_augmented
from maskrcnn_jax.inference.detect import make_stages
from maskrcnn_jax.inference.inputs import to_batch
from maskrcnn_jax.inference.predictor import Predictor
from maskrcnn_jax.inference.results import Instances
from maskrcnn_jax.inference.views import Augmentation, AugmentedDetection
from maskrcnn_jax.options import DataOptions, Options
from tests.models.tiny import tiny_model, tiny_options

CATEGORIES = Categories.create([1, 2, 3, 4], ["cup", "dog", "person", "tree"])
SIDE = 64


@pytest.fixture(scope="module")
def predictor():
    data = DataOptions(short_side=SIDE, long_side=SIDE)
    options = Options(model=tiny_options(box_detections_per_img=4), data=data)
    return Predictor(tiny_model(box_detections_per_img=4), CATEGORIES, options)


@pytest.fixture
def image():
    return np.random.default_rng(1).integers(0, 256, (48, SIDE, 3)).astype(np.uint8)


def find(predictor, image, text):
    augmented = AugmentedDetection(predictor.network, predictor.options, Augmentation.parse(text))
    return next(augmented.find([image]))


def plain(predictor, image):
    return next(predictor._find([image]))


def assert_same(ours, theirs, atol=1e-4):
    assert len(ours.scores) == len(theirs.scores) > 0
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flip", (True, ())),
        ("flip,400,600", (True, (400, 600))),
        ("400", (False, (400,))),
        (400, (False, (400,))),
        (("flip", 400), (True, (400,))),
        (Augmentation(False, (3,)), (False, (3,))),
    ],
)
def test_views_are_read_as_written(text, expected):
    assert Augmentation.parse(text) == expected


@pytest.mark.parametrize("text", ["", "flop", "flip,0", "-4", "400,400", "4.5", "flip,100000", (), True])
def test_views_that_make_no_sense_are_refused(text):
    with pytest.raises(UserError, match="test-time augmentation"):
        Augmentation.parse(text)


@pytest.mark.parametrize("method", ["hard", "gaussian"])
def test_one_view_gives_what_detection_gives(predictor, image, method):
    """Soft suppression, too, lowers the scores only once."""
    chosen = predictor.with_options(box_nms_method=method, box_detections_per_img=6)
    assert_same(find(chosen, image, str(SIDE)), plain(chosen, image))


def test_what_is_found_in_a_mirrored_image_is_mirrored(predictor, image):
    ours, mirrored = find(predictor, image, "flip"), find(predictor, image[:, ::-1], "flip")
    boxes = mirrored.boxes[:, [2, 1, 0, 3]] * np.float32([-1, 1, -1, 1]) + np.float32([SIDE, 0, SIDE, 0])
    back = Instances(boxes, mirrored.scores, mirrored.labels, mirrored.masks[..., ::-1])
    assert_same(ours, back, atol=2e-3)
    with pytest.raises(AssertionError):
        assert_same(ours, plain(predictor, image))


def greedy(boxes, scores, labels, threshold, most):
    """Suppress per class, one by one: rows, best first."""
    kept = []
    for row in np.argsort(-scores, kind="stable"):
        for other in kept:
            low, high = np.maximum(boxes[row, :2], boxes[other, :2]), np.minimum(boxes[row, 2:], boxes[other, 2:])
            common = np.maximum(high - low, 0).prod()
            areas = sum((boxes[i, 2:] - boxes[i, :2]).prod() for i in (row, other))
            if labels[row] == labels[other] and common / (areas - common) > threshold:
                break
        else:
            kept.append(row)
    return kept[:most]


@pytest.mark.slow
def test_boxes_of_all_views_are_suppressed_together_and_their_masks_averaged(predictor, image):
    """As detectron2 does it, with the stages of the network called one by one."""
    stages = make_stages(predictor.network)
    views, pooled = [], []
    for scale in (1, 2):
        height, width = 48 * scale, SIDE * scale
        data = DataOptions(short_side=width, long_side=width)
        batch = to_batch(image, data, buckets_for(data))
        assert batch.sizes.tolist() == [[height, width]]
        for mirrored in (False, True):
            images = np.array(batch.images)
            if mirrored:
                images[0, :height, :width] = images[0, :height, :width][:, ::-1]
            features, boxes, scores, labels, valid = stages.boxes(images, batch.sizes)
            boxes, kept = np.array(boxes[0]), np.asarray(valid[0])
            if mirrored:
                boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
            pooled.append([boxes[kept] / scale, np.asarray(scores[0])[kept], np.asarray(labels[0])[kept]])
            views.append((features, scale, width, mirrored, images.shape[1:3]))
    boxes, scores, labels = (np.concatenate(values) for values in zip(*pooled, strict=True))
    rows = greedy(boxes, scores, labels, 0.5, 4)
    masks = []
    for features, scale, width, mirrored, shape in views:
        in_view = boxes[rows] * scale
        if mirrored:
            in_view[:, [0, 2]] = width - in_view[:, [2, 0]]
        mask = stages.masks(features, in_view[None], labels[rows][None], np.ones((1, 4), bool), shape)
        masks.append(np.asarray(mask)[0][..., :: -1 if mirrored else 1])
    expected = Instances(boxes[rows], scores[rows], labels[rows], np.mean(masks, axis=0))
    ours = find(predictor, image, "flip,64,128")
    assert_same(ours, expected, atol=1e-3)


@pytest.mark.slow
def test_masks_of_all_views_are_encoded_alike_by_other_processes(predictor, tmp_path):
    write_dataset(tmp_path, num_train=1, num_val=3, image_size=SIDE, seed=0)
    dataset = load_coco(tmp_path, "val2017")

    def detect(workers):
        options = replace(predictor.options, eval_workers=workers)
        rows = np.arange(len(dataset))
        shared = {"options": options, "categories": CATEGORIES, "dataset": dataset, "rows": rows}
        return detect_augmented(predictor.network, Augmentation.parse("flip"), **shared)

    results = detect(0)
    assert {result["image_id"] for result in results} == set(dataset.image_ids.tolist())
    assert detect(2) == results


def test_choices_of_prediction_go_together(predictor, image):
    large = np.tile(image, (2, 2, 1))
    found = predictor.predict(
        large, min_score={None: 0.0}, classes=["cup", "dog", "person", "tree"], tile=64, overlap=0.25, tta="flip"
    )
    assert len(found) > 4 and (np.diff(found.scores) <= 0).all()
    assert (found.boxes <= [128, 96, 128, 96]).all()
    some = predictor.predict(large, min_score=0.0, classes=[found.names[0]], tile=64, overlap=0.25, tta="flip")
    assert set(some.names) == {found.names[0]}


def test_a_predictor_with_other_options_shares_its_parameters_and_follows_them(predictor, image):
    soft = predictor.with_options(box_nms_method="gaussian", box_detections_per_img=6)
    assert soft.options.model.box_nms_method == "gaussian" and predictor.options.model.box_nms_method == "hard"
    ours, theirs = soft.predict(image, min_score=0.0), predictor.predict(image, min_score=0.0)
    assert len(ours) == 6 and len(theirs) == 4
    assert ours.scores.tolist() != theirs.scores.tolist()
    with pytest.raises(UserError, match="backbone is not an option of detection"):
        predictor.with_options(backbone="resnet50")
    with pytest.raises(UserError, match="box_nms_method"):
        predictor.with_options(box_nms_method="fuzzy")


def test_options_of_tiles_are_refused_without_tiles(predictor, image):
    with pytest.raises(UserError, match="overlap 0.5 is that of tiles; give their size too"):
        predictor.predict(image, overlap=0.5)
    with pytest.raises(UserError, match="whole_image goes with tile"):
        predictor.predict(image, whole_image=True)
    with pytest.raises(UserError, match="tiles cannot have 64.5 pixels; use a whole number from 32"):
        predictor.predict(image, tile=64.5)
