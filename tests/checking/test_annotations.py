import numpy as np
import pytest

from maskrcnn_jax.checking.anchors import Anchors, best_overlaps
from maskrcnn_jax.checking.annotations import check_index, stop_or_warn
from maskrcnn_jax.checking.examples import NUM_EXAMPLES
from maskrcnn_jax.data.dataset import load_coco
from maskrcnn_jax.data.findings import Kind
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.ops.anchors import cell_anchors, grid_anchors

SIZES, RATIOS = (32, 64, 128), (0.5, 1.0, 2.0)


def anchors(short_side=256, long_side=256):
    corners = cell_anchors(SIZES, RATIOS)
    return Anchors((corners[:, 2:] - corners[:, :2]).astype(float), 0.3, short_side, long_side, "uint8")


def index_of(dataset, boxes, size=(256, 256), **more):
    annotations = [
        {"id": i, "image_id": 1, "category_id": 1 + i % 2, "bbox": list(box), "segmentation": [_outline(*box)]} | more
        for i, box in enumerate(boxes, start=1)
    ]
    return load_coco(dataset.write([size], annotations), "train2017")


def _outline(x, y, width, height):
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def best_on_the_grid(boxes):
    """The largest overlap of each box with an anchor of an image of 256 x 256; every level has the finest stride."""
    grid = np.concatenate(grid_anchors((256, 256), [(64, 64)] * 3, SIZES, RATIOS)).astype(float)
    sides = np.minimum(boxes[:, None, 2:], grid[None, :, 2:]) - np.maximum(boxes[:, None, :2], grid[None, :, :2])
    shared = np.maximum(sides, 0).prod(axis=2)
    areas = [(b[:, 2:] - b[:, :2]).prod(axis=1) for b in (boxes, grid)]
    return (shared / (areas[0][:, None] + areas[1][None] - shared)).max(axis=1)


def test_no_anchor_overlaps_an_object_by_more_than_is_said_and_one_comes_near(dataset):
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(np.log(2), np.log(200), (60, 2))).round(1)
    boxes = np.concatenate([rng.uniform(0, 256 - sides).round(1), sides], axis=1)
    index = index_of(dataset, boxes.tolist())
    bound, found = best_overlaps(index, anchors()), best_on_the_grid(index.boxes.astype(float))
    assert (found <= bound + 1e-6).all()
    assert (found > bound - 0.15).all(), "no anchor is more than two pixels off"
    assert 10 < (bound < 0.3).sum() < 50


def test_an_object_is_too_small_by_the_rule_of_the_anchors(dataset):
    # In an anchor of 32 x 32 an object of side a has the overlap a^2 / 1024: 0.3 at 17.5.
    for side, kinds in ((17, [Kind.SMALL]), (18, [])):
        index = index_of(dataset, [[20, 20, side, side]] * 2)
        found = check_index(index, anchors())
        assert [f.kind for f in found if f.kind not in (Kind.SAME_ANNOTATION, Kind.RARE_CATEGORY)] == kinds
    # Twice as large where images are enlarged twice.
    index = index_of(dataset, [[20, 20, 9, 9], [20, 60, 8, 8]], size=(128, 128))
    (found,) = [f for f in check_index(index, anchors()) if f.kind == Kind.SMALL]
    assert found.rows.tolist() == [1]
    assert found.examples == ["1.jpg, annotation 2: 8x8 pixels"]
    assert "1 of 2 objects" in found.sentence


def test_an_object_is_too_large_or_too_thin_by_the_same_rule(dataset):
    index = index_of(dataset, [[0, 0, 250, 250], [3, 20, 250, 6], [10, 10, 60, 60]])
    kinds = {f.kind: f.rows.tolist() for f in check_index(index, anchors())}
    assert kinds[Kind.LARGE] == [0, 1]
    assert Kind.SMALL not in kinds


def test_of_copies_of_an_annotation_all_but_the_first_are_found(dataset):
    index = index_of(dataset, [[9, 9, 30, 30]] * 5 + [[9, 9, 30, 31]])
    (found,) = [f for f in check_index(index) if f.kind == Kind.SAME_ANNOTATION]
    assert found.rows.tolist() == [2, 3, 4], "the categories take turns"
    assert len(found.examples) == NUM_EXAMPLES


def test_objects_that_share_a_box_but_not_a_mask_are_no_copies(dataset):
    annotations = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": [0, 0, 20, 20], "segmentation": [outline]}
        for i, outline in enumerate(([0, 0, 20, 0, 20, 20], [0, 0, 0, 20, 20, 20]), start=1)
    ]
    index = load_coco(dataset.write([(40, 40)], annotations), "train2017")
    assert Kind.SAME_ANNOTATION not in [f.kind for f in check_index(index)]


def test_ids_matter_where_a_split_is_evaluated(dataset):
    index = index_of(dataset, [[9, 9, 30, 30], [40, 9, 30, 30]], id=0)
    training = {f.kind: f.is_error for f in check_index(index)}
    assert training[Kind.SAME_ID] is False
    assert Kind.ZERO_ID not in training
    evaluated = {f.kind: f.is_error for f in check_index(index, evaluated=True)}
    assert evaluated[Kind.SAME_ID] is True
    assert evaluated[Kind.ZERO_ID] is False
    unknown = {f.kind: f.is_error for f in check_index(index, evaluated=None)}
    assert (unknown[Kind.SAME_ID], unknown[Kind.ZERO_ID]) == (False, False)


def test_images_with_more_objects_than_the_model_detects_are_found(dataset):
    boxes = [[9 * i, 9, 8, 8] for i in range(6)]
    index = index_of(dataset, boxes)
    assert Kind.MANY_OBJECTS not in [f.kind for f in check_index(index, max_detections=6)]
    (found,) = [f for f in check_index(index, max_detections=5) if f.kind == Kind.MANY_OBJECTS]
    assert found.sentence == Kind.MANY_OBJECTS.tell(1, limit=5, most=6)
    assert found.examples == ["1.jpg"]


def test_names_given_to_several_categories_are_found(dataset):
    index = load_coco(dataset.write([(20, 30)], names=[(1, "cat"), (2, "cat"), (3, "dog")]), "train2017")
    (found,) = [f for f in check_index(index) if f.kind == Kind.SAME_NAME]
    assert "cat" in found.sentence


def test_errors_stop_a_training_and_warnings_are_a_line_each(caplog):
    warnings = [
        Kind.SAME_ANNOTATION.finding([0, 1], examples=["1.jpg", "2.jpg"]),
        Kind.SAME_NAME.finding(count=1, names="cat"),
    ]
    stop_or_warn(warnings, "train2017")
    first, second = [record.getMessage() for record in caplog.records]
    assert first == f"train2017: {warnings[0].sentence}, such as 1.jpg; 2.jpg"
    assert second == f"train2017: {warnings[1].sentence}"
    error = Kind.SAME_FILE.finding([3])
    with pytest.raises(UserError) as raised:
        stop_or_warn([*warnings, error], "train2017")
    assert str(raised.value) == error.sentence
