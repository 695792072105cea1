"""Anchors against hand-computed values."""

import numpy as np

from maskrcnn_jax.ops.anchors import cell_anchors, grid_anchors


def test_cell_anchors_of_size_32_are_torchvisions_rounded_integers():
    np.testing.assert_array_equal(
        cell_anchors((32,), (0.5, 1.0, 2.0)), [[-23, -11, 23, 11], [-16, -16, 16, 16], [-11, -23, 11, 23]]
    )


def test_the_aspect_ratio_is_height_over_width():
    tall = cell_anchors((100,), (4.0,))[0]
    np.testing.assert_array_equal(tall, [-25, -100, 25, 100])


def test_several_sizes_vary_within_a_ratio_as_in_torchvision_or_around_it_as_in_detectron2():
    sides = cell_anchors((8, 16), (1.0, 4.0))[:, 2:] * 2
    np.testing.assert_array_equal(sides, [[8, 8], [16, 16], [4, 16], [8, 32]])
    sides = cell_anchors((8, 16), (1.0, 4.0), exact=True)[:, 2:] * 2
    np.testing.assert_array_equal(sides, [[8, 8], [4, 16], [16, 16], [8, 32]])


def test_anchors_run_over_columns_then_rows_with_ratios_innermost():
    (anchors,) = grid_anchors((32, 48), [(2, 3)], (16,), (1.0, 4.0))
    assert anchors.shape == (12, 4) and anchors.dtype == np.float32
    np.testing.assert_array_equal(anchors[0], [-8, -8, 8, 8])
    np.testing.assert_array_equal(anchors[1], [-4, -16, 4, 16])  # the next ratio, same cell
    np.testing.assert_array_equal(anchors[2], [8, -8, 24, 8])  # the next column
    np.testing.assert_array_equal(anchors[6], [-8, 8, 8, 24])  # the next row


def test_strides_are_the_padded_size_divided_by_the_grid_with_the_remainder_dropped():
    shapes = [(200, 272), (100, 136), (50, 68), (25, 34), (13, 17)]
    levels = grid_anchors((800, 1088), shapes, (32, 64, 128, 256, 512), (1.0,))
    strides = [
        (level[width, 1] - level[0, 1], level[1, 0] - level[0, 0])
        for level, (_, width) in zip(levels, shapes, strict=True)
    ]
    assert strides == [(4, 4), (8, 8), (16, 16), (32, 32), (61, 64)]


def test_a_level_of_a_single_cell_has_its_anchor_at_the_origin():
    (anchors,) = grid_anchors((64, 64), [(1, 1)], (8,), (1.0,))
    np.testing.assert_array_equal(anchors, [[-4, -4, 4, 4]])
