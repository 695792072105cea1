import numpy as np
import pytest
from pycocotools import mask as coco_mask

from maskrcnn_jax.data import run_lengths
from maskrcnn_jax.data.run_lengths import cut_out, decode_crop, is_well_formed, num_pixels


def joined(texts):
    return np.frombuffer(b"".join(texts), np.uint8), np.cumsum([0, *map(len, texts)])


def test_the_runs_of_a_mask_add_up_to_its_pixels():
    rng = np.random.default_rng(0)
    sizes = [tuple(size) for size in rng.integers(1, 60, (400, 2)).tolist()] + [(3000, 5000)]
    masks = [np.asfortranarray(rng.random(size) < rng.random() ** 3, np.uint8) for size in sizes]
    texts = [coco_mask.encode(mask)["counts"] for mask in masks]
    assert all(map(is_well_formed, texts))
    np.testing.assert_array_equal(num_pixels(*joined(texts)), [height * width for height, width in sizes])


def test_masks_are_summed_alike_in_parts(monkeypatch):
    texts = [coco_mask.encode(np.eye(k, dtype=np.uint8, order="F"))["counts"] for k in range(1, 40)] + [b""]
    monkeypatch.setattr(run_lengths, "_CHUNK", 50)
    np.testing.assert_array_equal(num_pixels(*joined(texts)), [k * k for k in range(1, 40)] + [0])


@pytest.mark.parametrize(
    ("text", "pixels"),
    [
        (b"5", 5),
        (b"hb0", 600),  # 24 + 18 * 32, in three digits
        (b"12345", 1 + 2 + 3 + (4 + 2) + (5 + 3)),  # from the fourth on they add to the one two before
        (b"123O5", 1 + 2 + 3 + (-1 + 2) + (5 + 3)),
        (b"5M", -1),  # 5 and -3
    ],
)
def test_runs_written_by_hand(text, pixels):
    assert num_pixels(*joined([b"7", text])).tolist() == [7, pixels]


@pytest.mark.parametrize("text", [b"P", b"0P", b"0\x000", b"0p", b"0/", b"PPPPPP0", "5é".encode()])
def test_text_that_is_read_past_its_end_or_is_no_number_is_not_well_formed(text):
    assert not is_well_formed(text)


def drawn_masks():
    """Return masks of every density and shape: empty, full, of single pixels, and that end in the last column."""
    rng = np.random.default_rng(1)
    masks = [rng.random(size) < rng.random() ** 3 for size in rng.integers(1, 40, (300, 2)).tolist()]
    masks += [np.zeros((5, 7)), np.ones((5, 7)), np.eye(9), np.eye(9)[::-1], np.ones((1, 1))]
    return [np.asfortranarray(mask, np.uint8) for mask in masks]


def test_a_mask_is_decoded_in_the_smallest_box_that_holds_it():
    for mask in drawn_masks():
        for crop in (decode_crop(coco_mask.encode(mask)), cut_out(mask)):
            height, width = crop.mask.shape
            pasted = np.zeros_like(mask)
            pasted[crop.y : crop.y + height, crop.x : crop.x + width] = crop.mask
            np.testing.assert_array_equal(pasted, mask)
            if mask.any():
                assert crop.mask.any(axis=0)[[0, -1]].all()
                assert crop.mask.any(axis=1)[[0, -1]].all()
            else:
                assert not crop.mask.size


@pytest.mark.parametrize("counts", ["5", "5M", "", b"1234"])
def test_runs_that_do_not_fill_the_image_are_not_decoded(counts):
    with pytest.raises(ValueError, match="for an image of 4x5"):
        decode_crop({"size": [4, 5], "counts": counts})
