"""MobileNetV3-Large beside torchvision's, and inside the whole network."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maskrcnn_jax.training.optimizer import is_frozen
from maskrcnn_jax.weights import torchvision
from maskrcnn_jax.weights.convert import load_weights, to_torchvision
from tests.models.tiny import all_finite, compiled, tiny_batch, tiny_model

OUTPUTS = (3, 6, 12, 16)  # of torchvision's layers


@pytest.fixture(scope="module")
def reference_features():
    """Torchvision's layers in float64 with weights and statistics that are not the initial ones."""
    torch = pytest.importorskip("torch")
    from tools.torchvision_reference import import_torchvision

    features = import_torchvision().models.mobilenet_v3_large().features.double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in features.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=generator)
                if module.bias is not None:
                    module.bias.normal_(generator=generator)
            elif isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
                module.running_mean.normal_(0, 0.3, generator=generator)
    return features


def run_reference(features, x):
    import torch

    x, outputs = torch.tensor(x).permute(0, 3, 1, 2), []
    with torch.no_grad():
        for i, layer in enumerate(features):
            x = layer(x)
            if i in OUTPUTS:
                outputs.append(x.permute(0, 2, 3, 1).numpy())
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "training"), [("batch", True), ("batch", False), ("frozen", True)])
def test_outputs_and_statistics_are_torchvisions(reference_features, norm, training):
    # A frozen norm is one that is never in training.
    features = copy.deepcopy(reference_features).train(training and norm == "batch")
    weights = {f"features.{name}": value.numpy().copy() for name, value in features.state_dict().items()}
    x = np.random.default_rng(1).normal(size=(3, 65, 94, 3))  # sides that no stride divides
    wanted = run_reference(features, x)
    with jax.enable_x64(True):
        model = tiny_model(backbone="mobilenet_v3_large", norm=norm, dtype="float64")
        load_weights(model, weights, partial=True)
        model.train() if training else model.eval()
        outputs = nnx.jit(lambda backbone, x: backbone(x))(model.backbone, jnp.asarray(x))
    assert [output.shape[-1] for output in outputs] == list(model.backbone.out_channels)
    for ours, theirs in zip(outputs, wanted, strict=True):
        assert ours.dtype == jnp.float64
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9 * np.abs(theirs).max())
    after = to_torchvision(model)
    for name, value in features.state_dict().items():
        if norm == "batch" or not name.endswith("num_batches_tracked"):
            np.testing.assert_allclose(after[f"backbone.body.{name}"], value.numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_gradients_reach_every_parameter_and_recomputing_blocks_does_not_change_them():
    x = np.random.default_rng(0).normal(size=(2, 64, 64, 3))  # several cells of stride 32, for the norms

    def gradients(remat):
        model = tiny_model(backbone="mobilenet_v3_large", norm="batch", dtype="float64", remat=remat)
        graph, params, rest = nnx.split(model.backbone, nnx.Param, ...)

        def loss(params):
            return sum(
                jnp.sum(jnp.square(output)) for output in nnx.merge(graph, params, rest, copy=True)(jnp.asarray(x))
            )

        traced = jax.jit(jax.grad(loss)).trace(params)
        assert ("prevent_cse" in str(traced.jaxpr)) == remat  # a parameter of what recomputes
        # Fused as for users: biases before a norm have gradients of nothing but rounding.
        return traced.lower().compile({"xla_cpu_use_fusion_emitters": True})(params)

    with jax.enable_x64(True):
        kept, recomputed = (dict(nnx.to_flat_state(gradients(remat))) for remat in (False, True))
        for path, gradient in kept.items():
            largest = float(jnp.abs(gradient[...]).max())
            assert largest > 0, path
            np.testing.assert_allclose(recomputed[path][...], gradient[...], rtol=0, atol=1e-9 * largest)


@pytest.mark.slow
def test_the_whole_network_trains_and_detects(key):
    losses, detect = compiled(tiny_model(backbone="mobilenet_v3_large"))[:2]
    batch = tiny_batch()
    terms, _, gradients = losses(batch, key)
    assert all_finite((terms, gradients))
    assert all_finite(detect(batch.images, batch.sizes))


def test_stages_are_frozen_by_their_strides():
    """The stem is what comes before the first feature map; torchvision numbers the layers through."""
    entries = torchvision.entries(tiny_model(backbone="mobilenet_v3_large"))
    layers = {entry.path: int(entry.key.split(".")[2]) for entry in entries if entry.path[0] == "backbone"}
    for frozen_stages, last in enumerate((1, *OUTPUTS), start=1):
        frozen = {layer for path, layer in layers.items() if is_frozen(path, frozen_stages)}
        assert frozen == set(range(last + 1))
    assert not any(is_frozen(path, 0) for path in layers)
