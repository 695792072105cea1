import dataclasses
import logging

import pytest

from maskrcnn_jax.config import load_config, to_options
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.models.unfilled import make_unfilled
from maskrcnn_jax.options import OptimOptions, Options
from maskrcnn_jax.training.derive import derive_options
from maskrcnn_jax.weights.convert import load_weights, to_torchvision


@pytest.fixture(autouse=True)
def _logged(caplog):
    caplog.set_level(logging.INFO, "maskrcnn_jax")


@pytest.mark.parametrize(
    ("num_images", "epochs"), [(10, 100), (50, 100), (60, 84), (200, 25), (417, 12), (118_287, 12)]
)
def test_small_datasets_get_more_epochs(num_images, epochs, caplog):
    assert derive_options(Options(epochs=0), num_images).epochs == epochs
    assert f"{epochs} epochs" in caplog.text


def test_the_learning_rate_is_in_proportion_to_the_batch(caplog):
    options = Options(batch_size=4, optim=OptimOptions(lr=0.02, lr_batch_size=16))
    derived = derive_options(options, 100)
    assert derived.optim.lr == pytest.approx(0.005)
    assert "learning rate 0.005" in caplog.text
    assert derive_options(derived, 100).optim.lr == derived.optim.lr, "it was scaled twice"


def test_options_that_are_set_stay(caplog):
    assert derive_options(Options(), 60) == Options()
    assert not caplog.records


@pytest.mark.slow
def test_published_weights_fit_the_config_for_own_datasets_but_for_the_classes():
    narrow = {
        "stem_channels": 8,
        "stage_channels": 16,
        "bottleneck_channels": 8,
        "fpn_channels": 8,
        "mask_channels": 8,
    }
    narrow |= {"box_conv_channels": (8,) * 4, "box_fc_channels": (8,)}
    published, own = (
        dataclasses.replace(to_options(load_config(name)).model, **narrow)
        for name in ("torchvision_r50_fpn_v2", "own_dataset")
    )
    arrays = to_torchvision(make_unfilled(91, published))
    report = load_weights(make_unfilled(4, own), arrays, partial=True)
    assert report.untouched == []
    assert {key.rsplit(".", 1)[0] for key in report.reinitialised} == {
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
        "roi_heads.mask_predictor.mask_fcn_logits",
    }


def test_another_variant_of_the_config_is_refused():
    with pytest.raises(UserError, match="own_dataset has no 'tiny'"):
        load_config("own_dataset:tiny")
