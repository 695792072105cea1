"""ConvNeXt beside torchvision's: outputs, gradients, names of weights, and inside the whole network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maskrcnn_jax.models.convnext import ARCHITECTURES, Block, ConvNeXt
from maskrcnn_jax.models.layers import Conv
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.ops.convolution import patch_conv2d
from maskrcnn_jax.options import ModelOptions
from maskrcnn_jax.training.optimizer import is_frozen
from maskrcnn_jax.weights import torchvision
from maskrcnn_jax.weights.convert import load_weights, to_torchvision
from tests.models.tiny import all_finite, compiled, tiny_batch, tiny_model

OUTPUTS = (1, 3, 5, 7)  # of torchvision's layers
WIDE = {"fpn_channels": 32, "mask_channels": 32, "box_conv_channels": (32,)}
NARROW = ((1, 1, 2, 1), (8, 16, 24, 32))


@pytest.fixture
def narrow(monkeypatch):
    """Make ConvNeXt-Tiny narrow and shallow, whatever builds it."""
    monkeypatch.setitem(ARCHITECTURES, "convnext_tiny", NARROW)


def reference_features():
    """Return torchvision's layers of this form in float64, with weights that are not the initial ones."""
    torch = pytest.importorskip("torch")
    from tools.torchvision_reference import import_torchvision

    import_torchvision()
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    depths, widths = NARROW
    following = (*widths[1:], None)
    network = ConvNeXt([CNBlockConfig(*stage) for stage in zip(widths, following, depths, strict=True)])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.normal_(0, fan_in**-0.5, generator=generator)
    return network.features.double()


def test_outputs_and_gradients_are_torchvisions(narrow):
    torch = pytest.importorskip("torch")
    features = reference_features()
    weights = {f"features.{name}": value.numpy().copy() for name, value in features.state_dict().items()}
    x = np.random.default_rng(1).normal(size=(2, 65, 98, 3))  # sides that no stride divides
    inputs, wanted = torch.tensor(x, requires_grad=True), []
    y = inputs.permute(0, 3, 1, 2)
    for i, layer in enumerate(features):
        y = layer(y)
        if i in OUTPUTS:
            wanted.append(y.permute(0, 2, 3, 1))
    directions = [np.random.default_rng(2).normal(size=tuple(output.shape)) for output in wanted]
    sum((output * torch.tensor(d)).sum() for output, d in zip(wanted, directions, strict=True)).backward()
    by_name = {f"features.{name}": parameter.grad.numpy() for name, parameter in features.named_parameters()}

    with jax.enable_x64(True):
        model = tiny_model(backbone="convnext_tiny", dtype="float64")
        report = load_weights(model, weights, partial=True)
        assert len(report.loaded) == len(weights) and report.family == "a ConvNeXt, for the backbone"
        graph, params = nnx.split(model.backbone)

        @jax.jit
        def run(params, x):
            outputs, pull = jax.vjp(lambda params, x: nnx.merge(graph, params)(x), params, x)
            return outputs, *pull([jnp.asarray(d) for d in directions])

        outputs, by_params, by_x = run(params, jnp.asarray(x))
        for ours, theirs in zip(outputs, wanted, strict=True):
            theirs = theirs.detach().numpy()
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-11 * np.abs(theirs).max())
        np.testing.assert_allclose(by_x, inputs.grad, rtol=0, atol=1e-11 * float(inputs.grad.abs().max()))
        gradients = dict(nnx.to_flat_state(by_params))
        for entry in torchvision.backbone_entries(model):
            ours, theirs = entry.layout.write(np.asarray(gradients[entry.path[1:]][...])), by_name[entry.key]
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-11 * np.abs(theirs).max(), err_msg=entry.key)
        after = to_torchvision(model, backbone_only=True)
    assert after.keys() == weights.keys()
    for key, array in weights.items():
        np.testing.assert_array_equal(after[key], array)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_names_and_shapes_are_those_of_torchvisions_files(name):
    torch = pytest.importorskip("torch")
    from tools.torchvision_reference import import_torchvision

    with torch.device("meta"):
        network = import_torchvision().models.get_model(name)
    wanted = {key: tuple(value.shape) for key, value in network.state_dict().items() if key.startswith("features")}
    model = nnx.eval_shape(lambda: MaskRCNN(5, ModelOptions(backbone=name), rngs=nnx.Rngs(0)))
    shapes = {path: variable.shape for path, variable in nnx.to_flat_state(nnx.state(model))}
    ours = {
        entry.key: entry.layout.write(np.broadcast_to(np.float32(0), shapes[entry.path])).shape
        for entry in torchvision.backbone_entries(model)
    }
    assert ours == wanted


@pytest.mark.slow
def test_recomputing_blocks_changes_no_gradient(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "convnext_tiny", ((1, 1, 0, 0), (4, 6, 8, 8)))  # compiles faster
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32))

    def gradients(remat):
        graph, params = nnx.split(ConvNeXt("convnext_tiny", remat=remat, rngs=nnx.Rngs(0)))
        loss = jax.jit(jax.grad(lambda params: sum(jnp.sum(y**2 + y) for y in nnx.merge(graph, params)(x))))
        assert ("prevent_cse" in str(loss.trace(params).jaxpr)) == remat  # a parameter of what recomputes
        return jax.tree.leaves(loss(params))

    for kept, recomputed in zip(*map(gradients, (False, True)), strict=True):
        largest = float(jnp.abs(kept).max())
        assert largest > 0
        np.testing.assert_allclose(recomputed, kept, rtol=0, atol=1e-5 * largest)


def test_stages_are_frozen_by_their_strides(narrow):
    """What reduces the map belongs to the stage that it leads to, as in a ResNet."""
    entries = torchvision.entries(tiny_model(backbone="convnext_tiny"))
    layers = {entry.path: int(entry.key.split(".")[2]) for entry in entries if entry.path[0] == "backbone"}
    for frozen_stages, last in enumerate((0, *OUTPUTS), start=1):
        frozen = {layer for path, layer in layers.items() if is_frozen(path, frozen_stages)}
        assert frozen == set(range(last + 1))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_block_in_half_precision_is_that_of_float32_up_to_rounding(dtype):
    x = np.random.default_rng(0).normal(size=(1, 6, 6, 8)).astype(np.float32)

    def run(dtype):
        block = Block(8, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
        block.layer_scale[...] = jnp.ones(8)
        block.expand.kernel[...], block.project.kernel[...] = block.expand.kernel[...] * 20, block.project.kernel * 20
        return block(jnp.asarray(x, dtype))

    y = run(dtype)
    assert y.dtype == jnp.dtype(dtype)
    wanted = np.asarray(run("float32"))
    np.testing.assert_allclose(np.asarray(y, np.float32), wanted, atol=4 * float(jnp.finfo(dtype).eps) * wanted.max())


@pytest.mark.slow
def test_the_whole_network_trains_and_detects_in_half_precision(narrow, key):
    losses, detect = compiled(tiny_model(backbone="convnext_tiny", dtype="float16", head_norm="group", **WIDE))[:2]
    batch = tiny_batch()
    terms, _, gradients = losses(batch, key)
    assert all_finite((terms, gradients))
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(gradients.backbone))
    assert all_finite(detect(batch.images, batch.sizes))


def test_more_channels_than_rgb_start_with_the_mean_of_these(narrow):
    weights = to_torchvision(tiny_model(backbone="convnext_tiny"), backbone_only=True)
    model = tiny_model(backbone="convnext_tiny", in_channels=4)
    report = load_weights(model, weights, partial=True)
    assert report.widened == ["features.0.0.weight"]
    kernel = np.asarray(model.backbone.stem.conv.kernel[...])
    np.testing.assert_allclose(kernel[:, :, 3], kernel[:, :, :3].mean(axis=2), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("side", "height", "width"), [(2, 6, 7), (4, 9, 8), (1, 3, 2)])
def test_patches_equal_a_strided_convolution(side, height, width):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, height, width, 3)), rng.normal(size=(side, side, 3, 5))
    with jax.enable_x64(True):
        ours = patch_conv2d(jnp.asarray(x), jnp.asarray(kernel))
        layout = ("NHWC", "HWIO", "NHWC")
        wanted = jax.lax.conv_general_dilated(x, kernel, (side, side), "VALID", dimension_numbers=layout)
    np.testing.assert_allclose(ours, wanted, atol=1e-12)


def test_a_depthwise_7x7_convolution_equals_that_of_groups():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        conv = Conv(6, 6, 7, depthwise=True, use_bias=False, dtype=jnp.float64, rngs=nnx.Rngs(0))
        x = rng.normal(size=(2, 5, 11, 6))
        options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 6}
        wanted = jax.lax.conv_general_dilated(x, conv.kernel[...], (1, 1), [(3, 3), (3, 3)], **options)
        np.testing.assert_allclose(conv(jnp.asarray(x)), wanted, atol=1e-12)
