"""Losses over a dataset, of a network whose losses are known."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maskrcnn_jax.evaluation.accuracy import measure_losses
from maskrcnn_jax.structures import Batch


class Known(nnx.Module):
    """Its loss is the mean of the valid images' pixels; a batch has as many foreground RoIs as its images are wide."""

    def __init__(self):
        self.factor = nnx.Param(jnp.ones(()))
        self.training = True

    def losses(self, batch, key, *, proposals_from_rpn):
        assert proposals_from_rpn
        assert not self.training
        images = jnp.sum(batch.valid)
        mean = jnp.sum(batch.images[:, 0, 0, 0] * batch.valid) / images
        metrics = {
            "num_foreground": jnp.sum(batch.sizes[:, 1] * batch.valid) / images,
            "accuracy": mean / 10,
            "accuracy_foreground": mean / 100,
        }
        return {"loss_mask": mean * self.factor[...], "loss_box_reg": 2 * mean}, metrics

    def eval(self):
        self.training = False


def batch(pixels, widths, valid):
    images = np.tile(np.array(pixels, np.float32)[:, None, None, None], (1, 4, 4, 3))
    sizes = np.stack([np.full(len(pixels), 4), np.array(widths)], axis=1).astype(np.int32)
    return Batch(images, sizes, sizes, np.arange(len(pixels), dtype=np.int32), np.array(valid), None)


def test_images_count_alike_and_foreground_rois_count_alike():
    batches = [batch([1, 3], [1, 3], [True, True]), batch([8, 99], [4, 50], [True, False])]
    measured = measure_losses(Known(), batches)
    assert measured["loss_mask"] == pytest.approx((1 + 3 + 8) / 3)
    assert measured["loss"] == pytest.approx(3 * (1 + 3 + 8) / 3)
    assert measured["accuracy"] == pytest.approx((1 + 3 + 8) / 30)
    # 4 RoIs in the first batch, whose share is 0.02, and 4 in the second, whose share is 0.08.
    assert measured["accuracy_foreground"] == pytest.approx(0.05)


def test_a_dataset_without_objects_has_no_foreground_to_be_right_about():
    measured = measure_losses(Known(), [batch([1], [0], [True])])
    assert measured["accuracy_foreground"] == 0
    assert measured["loss"] == pytest.approx(3)
