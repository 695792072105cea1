import numpy as np
import pytest

from maskrcnn_jax.data.dataset import load_coco, locate, read_dataset
from maskrcnn_jax.data.findings import Collector, Kind
from maskrcnn_jax.data.formats import overlaps, polygon_bounds
from maskrcnn_jax.errors import UserError


def box_annotations(boxes, masks=True):
    """One annotation an image of 100 x 100, of a rectangle given by x, y, width, height."""
    return [
        {
            "id": i,
            "image_id": 1,
            "category_id": 1,
            "bbox": list(box),
            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]] if masks else [],
        }
        for i, (box, (x, y, w, h)) in enumerate(zip(*boxes, strict=True), start=1)
    ]


def read(dataset, written, real, masks=True):
    root = dataset.write([(100, 100)], box_annotations((written, real), masks))
    collector = Collector()
    boxes = read_dataset(*locate(root, "train2017"), report=collector).boxes
    return [finding.kind for finding in collector.findings()], boxes


REAL = np.array([[40, 50, 30, 20], [10, 20, 60, 70], [60, 60, 39, 39], [5, 70, 20, 30], [30, 30, 40, 40]], float)
CORNERS = np.concatenate([REAL[:, :2], REAL[:, :2] + REAL[:, 2:]], axis=1)


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize(
    ("written", "kinds"),
    [
        (REAL, []),
        (CORNERS, [Kind.CORNERS]),
        (REAL / 100, [Kind.NORMALISED_BOXES]),
        (CORNERS / 100, [Kind.NORMALISED_BOXES, Kind.CORNERS]),
    ],
)
def test_boxes_in_another_form_are_told_and_read_as_what_they_are(dataset, written, kinds, masks):
    found, boxes = read(dataset, written.tolist(), REAL.tolist(), masks)
    assert found == kinds
    np.testing.assert_allclose(boxes, CORNERS, atol=1e-4)


@pytest.mark.parametrize("masks", [True, False])
def test_the_reader_stops_at_boxes_in_another_form(dataset, masks):
    root = dataset.write([(100, 100)], box_annotations((CORNERS.tolist(), REAL.tolist()), masks))
    with pytest.raises(UserError) as raised:
        load_coco(root, "train2017")
    assert str(raised.value) == Kind.CORNERS.tell(path=locate(root, "train2017")[0])


@pytest.mark.parametrize(
    "boxes",
    [
        [[0, 0, 100, 100]] * 4,  # all of the image
        [[2, 3, 95, 94], [10, 10, 90, 90], [1, 1, 99, 99]],  # large, so that they might be corners
        [[5, 8, 97, 96], [4, 6, 98, 97], [3, 3, 99, 99]],  # and over the border by a few pixels
        [[10, 10, 95, 95]],  # one wild box proves nothing
        [[2, 3, 95, 94]] * 20 + [[20, 20, 90, 90]] * 3,  # nor do few among many
        [[0, 0, 1, 1], [0, 0, 1, 1]],  # pixels, not shares
    ],
)
@pytest.mark.parametrize("masks", [True, False])
def test_boxes_that_may_be_meant_are_left(dataset, boxes, masks):
    found, _ = read(dataset, boxes, boxes, masks)
    assert found == []


def test_bounds_of_polygons_wherever_they_lie_in_the_file():
    coordinates = np.array([1.0, 2, 5, 3, 4, 9, 0, 0, 7, 1, 3, 3, -1, 8, 2, 2, 6, 12])
    offsets = np.array([0, 6, 12, 18])
    first, num = np.array([2, 0, 0, 1]), np.array([1, 0, 2, -1])
    bounds = polygon_bounds(coordinates, offsets, first, num)
    np.testing.assert_array_equal(bounds[[0, 2]], [[-1, 2, 6, 12], [0, 0, 7, 9]])
    assert np.isnan(bounds[[1, 3]]).all()
    assert polygon_bounds(coordinates, offsets, first[1:2], num[1:2]).shape == (1, 4)


def test_overlaps_row_by_row():
    boxes = np.array([[0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 2, 2], [1, 1, 1, 1]], float)
    others = np.array([[1, 0, 3, 2], [5, 5, 6, 6], [0, 0, 2, 2], [1, 1, 1, 1]], float)
    np.testing.assert_allclose(overlaps(boxes, others), [1 / 3, 0, 1, 0])


def test_overlaps_of_wild_numbers_do_not_overflow():
    wild = np.float32([[0, 0, 3e38, 3e38]])
    np.testing.assert_allclose(overlaps(wild, wild), [1])
