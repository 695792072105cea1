"""Drawings stay inside the picture, keep the picture they were given, and tell instances apart."""

import time

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference import draw as visualize
from maskrcnn_jax.inference.draw import (
    draw_instances,
    grid,
    instance_colour,
    place_caption,
    side_by_side,
    write_picture,
)

BORDER_BOXES = [
    [0, 0, 700, 500],
    [0, 0, 5, 5],
    [690, 0, 700, 10],
    [0, 490, 10, 500],
    [695, 495, 700, 500],
    [300, 200, 300, 200],
]


def grey(height, width):
    return np.full((height, width, 3), 90, np.uint8)


def test_a_caption_goes_above_its_box():
    assert place_caption((10, 40), np.array([100, 50, 200, 90]), (300, 400)) == (100, 40, 140, 50)


def test_a_caption_goes_inside_a_box_at_the_upper_border():
    assert place_caption((10, 40), np.array([100, 4, 200, 90]), (300, 400)) == (100, 4, 140, 14)


def test_a_caption_avoids_earlier_ones_where_there_is_room():
    taken = [(100, 40, 140, 50)]
    place = place_caption((10, 40), np.array([100, 50, 200, 90]), (300, 400), taken)
    assert place == (160, 40, 200, 50)


@pytest.mark.parametrize("box", BORDER_BOXES)
@pytest.mark.parametrize("size", [(12, 60), (12, 700), (500, 60)])
def test_captions_stay_inside_the_picture(box, size):
    x1, y1, x2, y2 = place_caption(size, np.array(box), (500, 700))
    assert 0 <= x1 < x2 <= 700 and 0 <= y1 < y2 <= 500
    assert (x2 - x1, y2 - y1) == (size[1], size[0])


def test_the_text_is_written_inside_its_caption_and_the_caption_inside_the_picture(monkeypatch):
    written = []
    put_text = cv2.putText

    def spy(picture, text, origin, font, scale, colour, thickness, line):
        (width, height), baseline = cv2.getTextSize(text, font, scale, thickness)
        written.append((text, origin[0], origin[1] - height, origin[0] + width, origin[1] + baseline))
        return put_text(picture, text, origin, font, scale, colour, thickness, line)

    monkeypatch.setattr(visualize.cv2, "putText", spy)
    names = ["person"] * 5 + ["a name far too long for a picture of this size, " * 4]
    draw_instances(grey(500, 700), np.array(BORDER_BOXES), names, [0.934, 1.0, 0.5, 0.05, 0.7, 0.8])
    assert len(written) == 6
    assert "person 0.93" in [text for text, *_ in written]
    for text, x1, y1, x2, y2 in written:
        assert x1 >= 0 and x2 <= 700 and y1 >= 0 and y2 <= 500, text


def test_a_mask_tints_its_pixels_and_no_others():
    mask = np.zeros((600, 600), bool)
    mask[300:400, 200:500] = True
    image = grey(600, 600)
    picture = draw_instances(image, np.zeros((1, 4)), [""], None, [mask])
    colour = np.array(instance_colour(0))
    np.testing.assert_allclose(picture[350, 350], 90 * 0.55 + colour * 0.45, atol=1)
    assert (picture[450, 100] == 90).all()
    assert (image == 90).all()


def test_instances_have_the_colours_that_are_chosen():
    boxes = np.array([[10, 10, 30, 30], [60, 60, 90, 90]])
    picture = draw_instances(grey(100, 100), boxes, ["", ""], min_side=0, colours=[5, 2])
    for (y, x), colour in (((30, 20), 5), ((90, 75), 2)):
        assert picture[y, x].tolist() == pytest.approx(instance_colour(colour), abs=20), "edges are smoothed"


def test_a_mask_is_enlarged_with_its_picture():
    mask = np.zeros((100, 128), bool)
    mask[50:90, 40:120] = True
    picture = draw_instances(grey(100, 128), np.zeros((1, 4)), [""], None, [mask])
    tinted = (picture[205:355, 165:475] != 90).any(-1)
    assert picture.shape == (400, 512, 3) and tinted.all()
    assert (picture[100:190, 100:500] == 90).all()


def test_run_lengths_draw_as_the_mask_does():
    mask = np.random.default_rng(0).random((40, 50)) < 0.3
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    box = np.array([[5, 5, 30, 30]])
    first = draw_instances(grey(40, 50), box, ["cup"], [0.5], [mask])
    second = draw_instances(grey(40, 50), box, ["cup"], [0.5], [{**rle, "counts": rle["counts"].decode()}])
    np.testing.assert_array_equal(first, second)


def test_small_pictures_are_enlarged_by_a_whole_factor_and_others_are_not():
    nothing = (np.zeros((0, 4)), [])
    assert draw_instances(grey(96, 128), *nothing).shape == (384, 512, 3)
    assert draw_instances(grey(200, 300), *nothing).shape == (400, 600, 3)
    assert draw_instances(grey(96, 128), *nothing, min_side=0).shape == (96, 128, 3)
    assert draw_instances(grey(700, 400), *nothing).shape == (700, 400, 3)


def test_an_image_without_instances_stays_as_it_is():
    image = np.random.default_rng(0).integers(0, 256, (520, 530, 3), np.uint8)
    np.testing.assert_array_equal(draw_instances(image, np.zeros((0, 4)), [], [], []), image)


def test_masks_without_pixels_draw_nothing():
    mask = np.zeros((520, 520), bool)
    box = np.array([[100, 100, 200, 200]])
    np.testing.assert_array_equal(
        draw_instances(grey(520, 520), box, ["cup"], None, [mask]), draw_instances(grey(520, 520), box, ["cup"])
    )


def test_colours_of_thirty_instances_differ():
    colours = np.array([instance_colour(index) for index in range(30)])
    distances = np.abs(colours[:, None] - colours[None]).sum(-1) + 1000 * np.eye(30, dtype=int)
    assert distances.min() > 20


def test_a_grid_holds_every_picture_whole():
    pictures = [np.full((10 + i, 20 - i, 3), 10 * i, np.uint8) for i in range(5)]
    sheet = grid(pictures, columns=2)
    assert sheet.dtype == np.uint8
    for i, picture in enumerate(pictures):
        assert (sheet == 10 * i).all(-1).sum() == picture.shape[0] * picture.shape[1]
    with pytest.raises(ValueError, match="0 pictures"):
        grid([], columns=2)


def test_truth_lies_left_of_the_prediction():
    both = side_by_side(np.full((600, 600, 3), 10, np.uint8), np.full((600, 600, 3), 200, np.uint8))
    columns = np.flatnonzero((both == 10).all(-1).sum(0) > 300), np.flatnonzero((both == 200).all(-1).sum(0) > 300)
    assert columns[0].max() < columns[1].min()


def test_a_picture_is_written_in_its_colours_and_a_wrong_name_is_the_users_to_mend(tmp_path):
    picture = np.full((8, 9, 3), (250, 120, 10), np.uint8)
    write_picture(tmp_path / "a.png", picture)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "a.png")), picture[..., ::-1])
    for name in ("a", "a.xyz", "absent/a.png"):
        with pytest.raises(UserError, match="cannot be written"):
            write_picture(tmp_path / name, picture)


@pytest.mark.parametrize("size", [(1, 400_000), (400_000, 1)])
def test_a_strip_is_drawn_with_small_letters_in_no_time(size):
    box = [[0, 0, size[1], size[0]]]
    start = time.process_time()
    draw_instances(np.zeros((*size, 3), np.uint8), np.float32(box * 10), ["person"] * 10, [0.5] * 10)
    assert time.process_time() - start < 5


def test_half_of_a_surrogate_pair_in_a_name_is_drawn_as_its_escape():
    image, box = np.full((64, 64, 3), 90, np.uint8), np.float32([[8, 30, 50, 60]])
    broken, escaped = (draw_instances(image, box, [name], [0.5]) for name in ("a\udcff", r"a\udcff"))
    np.testing.assert_array_equal(broken, escaped)
