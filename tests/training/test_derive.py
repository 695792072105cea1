import pytest

from configs import base, own_dataset, torchvision_r50_fpn_v2
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.models.mask_rcnn import make_unfilled
from maskrcnn_jax.training.derive import fill_in
from maskrcnn_jax.weights.convert import load_weights, to_torchvision


@pytest.mark.parametrize(
    ("num_images", "epochs"), [(10, 100), (50, 100), (60, 84), (200, 25), (417, 12), (118_287, 12)]
)
def test_few_images_are_seen_more_often(num_images, epochs, capsys):
    config = base.get_config()
    config.epochs = 0
    assert fill_in(config, num_images).epochs == epochs
    assert f"{epochs} epochs" in capsys.readouterr().out
    assert config.epochs == 0, "the caller's config was changed"


def test_the_learning_rate_is_in_proportion_to_the_batch(capsys):
    config = base.get_config()
    config.batch_size, config.optim.lr, config.optim.lr_batch_size = 4, 0.02, 16
    filled = fill_in(config, 100)
    assert filled.optim.lr == pytest.approx(0.005)
    assert "learning rate 0.005" in capsys.readouterr().out
    assert fill_in(filled, 100).optim.lr == filled.optim.lr, "it was scaled twice"


def test_what_the_config_says_itself_stays(capsys):
    config = base.get_config()
    filled = fill_in(config, 60)
    assert (filled.epochs, filled.optim.lr) == (config.epochs, config.optim.lr)
    assert capsys.readouterr().out == ""


def test_published_weights_fit_the_config_for_own_datasets_but_for_the_classes():
    narrow = {
        "stem_channels": 8,
        "stage_channels": 16,
        "bottleneck_channels": 8,
        "fpn_channels": 8,
        "mask_channels": 8,
    }
    narrow |= {"box_conv_channels": (8,) * 4, "box_fc_channels": (8,)}
    arrays = to_torchvision(make_unfilled(91, **{**torchvision_r50_fpn_v2.get_config().model, **narrow}))
    model = make_unfilled(4, **{**own_dataset.get_config().model, **narrow})
    report = load_weights(model, arrays, partial=True)
    assert report.untouched == []
    assert {key.rsplit(".", 1)[0] for key in report.reinitialised} == {
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
        "roi_heads.mask_predictor.mask_fcn_logits",
    }


def test_another_variant_of_the_config_is_refused():
    with pytest.raises(UserError, match="own_dataset has no 'tiny'"):
        own_dataset.get_config("tiny")
