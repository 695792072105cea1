"""The polygons of a mask hold exactly its pixels, and are valid where polygons are used."""

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from maskrcnn_jax.data.run_lengths import cut_out
from maskrcnn_jax.inference.polygons import mask_to_polygons


def is_inside(ring, size):
    """Return [h, w], whether the centre of a pixel is inside a ring: an odd number of edges is to its right."""
    x, y = np.arange(size[1]) + 0.5, np.arange(size[0]) + 0.5
    (x1, y1), (x2, y2) = ring.T, np.roll(ring, -1, axis=0).T
    crossed = (y1 > y[:, None]) != (y2 > y[:, None])  # [h, N]
    assert ((x1 == x2) | (y1 == y2)).all(), "an edge is not along pixels"
    return (crossed[:, None] & (x1 > x[:, None])).sum(axis=2) % 2 == 1


def fill(polygons, size):
    """Return how many polygons hold each pixel of an image."""
    count = np.zeros(size, int)
    for outline, *holes in polygons:
        inside = is_inside(outline, size)
        for hole in holes:
            cut = is_inside(hole, size)
            assert not (cut & ~inside).any(), "a hole is outside its outline"
            inside &= ~cut
        count += inside
    return count


def signed_area(ring):
    """Return the area of a ring, positive if it runs clockwise on the screen, where y points down."""
    (x1, y1), (x2, y2) = ring.T, np.roll(ring, -1, axis=0).T
    return (x1 * y2 - x2 * y1).sum() / 2


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["#"], [[[[0, 0], [0, 1], [1, 1], [1, 0]]]]),
        (["....", ".##."], [[[[1, 1], [1, 2], [3, 2], [3, 1]]]]),
        # A concave corner, and a hole of one pixel.
        ([".#", "##"], [[[[1, 0], [1, 1], [0, 1], [0, 2], [2, 2], [2, 0]]]]),
        (["###", "#.#", "###"], [[[[0, 0], [0, 3], [3, 3], [3, 0]], [[1, 1], [2, 1], [2, 2], [1, 2]]]]),
        # Pixels that touch at a corner only.
        (["#.", ".#"], [[[[0, 0], [0, 1], [1, 1], [1, 0]]], [[[1, 1], [1, 2], [2, 2], [2, 1]]]]),
        (["..", ".."], []),
    ],
)
def test_small_masks_have_the_polygons_drawn_by_hand(rows, expected):
    polygons = mask_to_polygons(np.array([[letter == "#" for letter in row] for row in rows]))
    found = [[np.roll(ring, -np.lexsort(ring.T)[0], axis=0).tolist() for ring in rings] for rings in polygons]
    wanted = [
        [np.roll(ring, -np.lexsort(np.transpose(ring))[0], axis=0).tolist() for ring in rings] for rings in expected
    ]
    assert found == wanted


@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=12)))
def test_filling_the_polygons_gives_the_mask_back(mask):
    polygons = mask_to_polygons(mask)
    np.testing.assert_array_equal(fill(polygons, mask.shape), mask.astype(int))
    areas = []
    for outline, *holes in polygons:
        assert signed_area(outline) < 0 and all(signed_area(hole) > 0 for hole in holes)
        areas.append(-sum(signed_area(ring) for ring in [outline, *holes]))
        for ring in [outline, *holes]:
            assert ring.dtype == np.float64 and len(ring) >= 4
            assert len(np.unique(ring, axis=0)) == len(ring), "a ring touches itself"
            edges = np.roll(ring, -1, axis=0) - ring
            assert (edges * np.roll(edges, 1, axis=0) == 0).all(), "a point is no corner"
    assert areas == sorted(areas, reverse=True)


@given(arrays(bool, (5, 6)), st.integers(0, 40), st.integers(0, 30))
def test_a_shifted_mask_and_a_crop_have_shifted_polygons(mask, x, y):
    image = np.zeros((40, 50), np.uint8)
    image[y : y + 5, x : x + 6] = mask[: 40 - y, : 50 - x]
    shifted = [[ring + (x, y) for ring in rings] for rings in mask_to_polygons(mask[: 40 - y, : 50 - x])]
    for found in (mask_to_polygons(image), mask_to_polygons(cut_out(image))):
        assert len(found) == len(shifted)
        for rings, wanted in zip(found, shifted, strict=True):
            np.testing.assert_array_equal(np.concatenate(rings), np.concatenate(wanted))


def test_a_small_object_of_a_large_image_costs_only_its_box():
    mask = np.zeros((12000, 12000), bool)
    mask[7000:7040, 9000:9050] = True
    tracemalloc.start()
    ((outline,),) = mask_to_polygons(mask)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6  # the mask has 144 MB
    assert outline.min(axis=0).tolist() == [9000, 7000] and outline.max(axis=0).tolist() == [9050, 7040]


def test_polygons_are_made_without_jax():
    code = "import sys, maskrcnn_jax.inference.polygons; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
