"""Networks with fewer channels, beside the same networks whose channels give nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.exporting.stablehlo import export_model
from maskrcnn_jax.inference.predictor import Predictor
from maskrcnn_jax.inference.pruning import prune_channels
from maskrcnn_jax.models.resnet import ResNet
from maskrcnn_jax.options import DataOptions, Options
from tests.models.tiny import SIDE, tiny_model


def arrays(network):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(network)}


def convolutions(network):
    """Return the convolutions of each block of the backbone."""
    return [block.convs for stage in network.backbone.stages for block in stage]


def detect(network):
    network.eval()
    graphdef, state = nnx.split(network)
    images = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    sizes = np.full((2, 2), SIDE, np.int32)
    return jax.jit(lambda state: nnx.merge(graphdef, state).detect(images, sizes))(state)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"norm": "batch"}, {"backbone": "resnet50", "bottleneck_channels": 8}])
def test_channels_that_give_nothing_are_the_ones_to_go(options):
    network = tiny_model(**options)
    rng = np.random.default_rng(1)
    dead = []
    for layers in convolutions(network):
        for layer in layers[:-1]:
            channels = layer.norm.scale.shape[0]
            chosen = rng.permutation(channels)[: channels // 2]
            dead.append((layer, chosen))
            # Zero is what the ReLU makes of these.
            layer.norm.scale[...] = layer.norm.scale[...].at[chosen].set(0)
            layer.norm.bias[...] = -jnp.abs(layer.norm.bias[...])
    first = network.box_head.fcs[0]
    first.kernel[...] = first.kernel[...].at[:, ::2].set(0)
    first.bias[...] = first.bias[...].at[::2].set(-1.0)

    pruned = prune_channels(network, 0.5)
    live = [np.setdiff1d(np.arange(layer.norm.mean.shape[0]), chosen) for layer, chosen in dead]
    left = [layer for layers in convolutions(pruned) for layer in layers[:-1]]
    for (layer, _), channels, kept in zip(dead, live, left, strict=True):
        np.testing.assert_array_equal(kept.norm.mean[...], layer.norm.mean[...][channels])
    expected, found = detect(network), detect(pruned)
    assert expected.valid.sum() > 2
    np.testing.assert_array_equal(found.valid, expected.valid)
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-3)  # sums are taken in another order
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    np.testing.assert_allclose(found.masks, expected.masks, atol=1e-4)


def test_the_weights_that_read_a_channel_count_as_much_as_its_filter():
    network = tiny_model()
    layer, reader = convolutions(network)[0]
    reader.conv.kernel[...] = reader.conv.kernel[...].at[:, :, 2].set(0)
    layer.conv.kernel[...] = layer.conv.kernel[...].at[..., 5].multiply(1e-6)
    # A filter may be small only because its norm makes up for it.
    layer.conv.kernel[...] = layer.conv.kernel[...].at[..., 7].multiply(1e-6)
    layer.norm.scale[...] = layer.norm.scale[...].at[7].multiply(1e7)
    (kept, _), *_ = convolutions(prune_channels(network, 0.25))
    np.testing.assert_array_equal(kept.norm.mean[...], layer.norm.mean[...][np.array([0, 1, 3, 4, 6, 7])])


def test_without_a_share_nothing_changes():
    network = tiny_model()
    before, after = arrays(network), arrays(prune_channels(network, 0))
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


def test_only_channels_between_layers_go_and_the_original_keeps_its_own():
    network = tiny_model(backbone="resnet50", bottleneck_channels=8, box_fc_channels=(32, 24))
    before = arrays(network)
    pruned = prune_channels(network, 0.3)
    kernels = [[layer.conv.kernel.shape[2:] for layer in layers] for layers in convolutions(pruned)]
    assert kernels[0] == [(8, 6), (6, 6), (6, 8)]
    assert kernels[-1] == [(64, 45), (45, 45), (45, 64)]  # 64 - int(19.2)
    first, second = pruned.box_head.fcs
    assert first.kernel.shape == (16 * 7 * 7, 23) and second.kernel.shape == (23, 24)
    assert (first.out_features, second.in_features) == (23, 23)
    after = arrays(network)
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan")])
def test_shares_that_leave_nothing_or_add_are_refused(fraction):
    with pytest.raises(UserError, match="use 0 or more and less than 1"):
        prune_channels(tiny_model(), fraction)


def test_other_backbones_are_refused():
    with pytest.raises(UserError, match="channels of a MobileNetV3 cannot be pruned"):
        prune_channels(tiny_model(backbone="mobilenet_v3_large"), 0.5)


def test_group_norms_are_refused_also_in_a_backbone_that_was_passed():
    network = tiny_model()
    network.backbone = ResNet(
        "resnet18", stem_channels=32, stage_channels=32, norm="group", dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    with pytest.raises(UserError, match="normalised in groups cannot be pruned"):
        prune_channels(network, 0.5)


def test_fewer_channels_in_eight_bits_make_a_smaller_file(tmp_path):
    network = tiny_model()
    options = Options(model=network.options, data=DataOptions(short_side=64, long_side=64))
    categories = Categories.create([1, 2, 3, 4], ["heart", "circle", "star", "ring"])
    export_model(Predictor(prune_channels(network, 0.5), categories, options), tmp_path / "model.mrcnn", int8=True)
    with np.load(tmp_path / "model.mrcnn") as file:
        written = sum(file[name].nbytes for name in file.files if name.startswith("weights/"))
    assert written < 0.7 / 4 * sum(array.nbytes for array in arrays(network).values())
