"""Networks of one's own as the backbone: one to four maps, in whatever container."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from maskrcnn_jax.distributed import make_mesh, shard_batch
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.models.backbone import check_backbone, feature_list
from maskrcnn_jax.models.layers import Conv
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.models.unfilled import make_unfilled
from maskrcnn_jax.options import OptimOptions
from maskrcnn_jax.training.step import TrainStep, create_train_state, split_train_state
from maskrcnn_jax.weights.convert import to_torchvision
from tests.models.tiny import NUM_CLASSES, all_finite, tiny_batch, tiny_options

CONTAINERS = {
    "array": lambda maps: maps[0],
    "list": list,
    "tuple": tuple,
    "dict": lambda maps: {str(i): maps[i] for i in reversed(range(len(maps)))},
}


class Strided(nnx.Module):
    """Convolutions of stride 2, of which the last few, the finest with stride 8, are the maps."""

    def __init__(self, num_maps: int, container: str = "list"):
        channels = [3, 4, *range(5, 6 + num_maps)]
        pairs = zip(channels[:-1], channels[1:], strict=True)
        self.convs = nnx.List([Conv(i, o, 3, stride=2, dtype=jnp.float32, rngs=nnx.Rngs(0)) for i, o in pairs])
        self.out_channels = tuple(channels[-num_maps:])
        self.container = container

    def __call__(self, x):
        outputs = []
        for convolution in self.convs:
            x = nnx.relu(convolution(x))
            outputs.append(x)
        return CONTAINERS[self.container](outputs[-len(self.out_channels) :])


def model_with(backbone, anchor_sizes, **options) -> MaskRCNN:
    options = tiny_options(anchor_sizes=anchor_sizes, **options)
    return MaskRCNN(NUM_CLASSES, options, backbone=backbone, rngs=nnx.Rngs(0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_maps", "containers"), [(1, ("array", "list", "tuple", "dict")), (3, ("list", "tuple", "dict"))]
)
def test_losses_and_detections_are_the_same_program_whatever_the_container(num_maps, containers, key):
    batch = tiny_batch(1)

    def program(container):
        model = model_with(Strided(num_maps, container), (16, 24, 32, 48)[: num_maps + 1])
        graph, state = nnx.split(model)

        def run(state, batch):
            model = nnx.merge(graph, state)
            return model.losses(batch, key), model.detect(batch.images, batch.sizes)

        return jax.jit(run).lower(state, batch).as_text()

    programs = {program(container) for container in containers}
    assert len(programs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["align", "pool"])
def test_a_backbone_with_one_map_trains_a_step_and_detects(operator, key):
    mesh, optimizer = make_mesh(), optax.sgd(1e-2)
    model = model_with(Strided(1, "array"), (16, 32), roi_operator=operator)
    before = np.asarray(model.backbone.convs[0].kernel[...])
    graphdef, state = create_train_state(model, optimizer, mesh, OptimOptions())
    batch = tiny_batch(8)
    state, metrics = TrainStep(graphdef, optimizer, mesh, OptimOptions())(state, shard_batch(batch, mesh), key)
    assert all_finite((metrics, state.params))
    model = nnx.merge(graphdef, state.params, state.variables)
    assert not np.array_equal(model.backbone.convs[0].kernel[...], before)
    model.eval()
    found = nnx.jit(lambda model, images, sizes: model.detect(images, sizes))(model, batch.images, batch.sizes)
    assert all_finite(found)


@pytest.mark.parametrize("num_maps", [1, 2, 3, 4])
def test_pyramid_anchors_and_pooling_follow_the_maps(num_maps):
    model = model_with(Strided(num_maps), (16, 24, 32, 48, 64)[: num_maps + 1])
    batch = tiny_batch(1, side=128)
    boxes = jnp.array([[[8.0, 8, 40, 40], [0, 0, 128, 128]]])

    def stages(model):
        features = model.features(batch.images, batch.sizes)
        return features, model.anchors(features, (128, 128)), model.pool(features, boxes, (128, 128), 7)

    features, anchors, pooled = nnx.eval_shape(stages, model)
    sides = [16 >> level for level in range(num_maps + 1)]
    assert [feature.shape for feature in features] == [(1, side, side, 16) for side in sides]
    assert [len(level) for level in anchors] == [3 * side**2 for side in sides]
    assert pooled.shape == (1, 2, 7, 7, 16)


def test_pooling_reads_the_one_map_at_its_own_scale():
    model = model_with(Strided(1), (16, 32))
    rows = jnp.broadcast_to(jnp.arange(64.0).reshape(1, 64, 1, 1), (1, 64, 64, 16))
    # So large that Eqn. 1 of the paper wants a coarser map; that which the pyramid adds is for proposals alone.
    boxes = jnp.array([[[8.0, 16, 40, 44], [0, 0, 448, 448]]])
    pooled = model.pool([rows, jnp.full((1, 32, 32, 16), jnp.nan)], boxes, (512, 512), 7)
    # Not aligned: the value of cell i is taken to lie at pixel 8 i.
    np.testing.assert_allclose(pooled[0, 0, :, 0, 0], 2 + 0.5 * (np.arange(7) + 0.5), rtol=1e-5)
    np.testing.assert_allclose(pooled[0, 1, :, 0, 0], 8 * (np.arange(7) + 0.5), rtol=1e-5)


def ones(*shapes):
    return [jnp.ones(shape) for shape in shapes]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (None, "returned a NoneType; return an array"),
        ({"0": 1, "pool": 2}, r"maps named \['0', 'pool'\]; name them \['0', '1'\]"),
        (dict(zip("123", ones((1, 8, 8, 4), (1, 4, 4, 6), (1, 2, 2, 6)), strict=True)), "maps named"),
        ([1, 2], "maps of type int"),
        (ones((1, 8, 8, 4)), "must be 2 of shape"),
        (ones((1, 8, 8, 4), (1, 4, 4, 5)), "must be 2 of shape"),
        (ones((1, 8, 8, 4), (4, 4, 6)), "must be 2 of shape"),
        (ones((1, 8, 8, 4))[0], "must be 2 of shape"),
        (ones((1, 8, 8, 4), (1, 8, 8, 6)), "half the height"),
    ],
)
def test_what_is_no_pyramid_is_refused(features, message):
    with pytest.raises(UserError, match=message):
        feature_list(features, (4, 6))


def test_odd_sides_are_rounded_up():
    maps = ones((1, 13, 8, 4), (1, 7, 4, 6))
    assert feature_list(tuple(maps), (4, 6)) == maps


@pytest.mark.parametrize("out_channels", [None, [8], (), (8,) * 5, ("8",)])
def test_a_backbone_tells_its_channels(out_channels):
    backbone = nnx.Module()
    if out_channels is not None:
        backbone.out_channels = nnx.static(out_channels) if isinstance(out_channels, list) else out_channels
    with pytest.raises(UserError, match="out_channels of the backbone Module is .* tuple"):
        model_with(backbone, (8, 16))


def test_another_kind_of_backbone_or_number_of_sizes_is_refused():
    with pytest.raises(UserError, match="of type int; give an nnx.Module"):
        check_backbone(50)
    with pytest.raises(UserError, match="use 3 sizes, .* 2 maps and one coarser"):
        model_with(Strided(2), (8, 16, 24, 32, 48))


@pytest.fixture
def my_networks(tmp_path, monkeypatch):
    """Write a module my_networks with functions that return a backbone of one map, or no backbone."""
    (tmp_path / "my_networks.py").write_text(
        "from tests.models.test_backbone import Strided\n"
        "def small(options, *, dtype, rngs):\n"
        "    assert options.in_channels == 3 and dtype == 'float32' and rngs is not None\n"
        "    return Strided(1)\n"
        "def number(options, *, dtype, rngs):\n"
        "    return 50\n"
        "nothing = None\n"
    )
    (tmp_path / "broken_networks.py").write_text("import a_module_that_is_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("my_networks", "broken_networks"):
        sys.modules.pop(name, None)


def test_a_config_names_a_function_that_builds_the_backbone(my_networks):
    options = tiny_options(backbone="my_networks:small", anchor_sizes=(16, 32))
    for model in (MaskRCNN(NUM_CLASSES, options, rngs=nnx.Rngs(0)), make_unfilled(NUM_CLASSES, options)):
        assert isinstance(model.backbone, Strided) and model.backbone.out_channels == (6,)
    with pytest.raises(UserError, match="frozen_stages is 2, which freezes nothing of the backbone Strided"):
        split_train_state(model, optax.sgd(1e-2), OptimOptions(frozen_stages=2))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (":small", "name a function as module:function, such as my_networks:swin"),
        ("my_networks:", "name a function as module:function"),
        ("my networks:small", "name a function as module:function"),
        ("no_networks:small", "no_networks cannot be imported: No module named 'no_networks'; install it, or put"),
        ("broken_networks:small", "No module named 'a_module_that_is_not_installed'"),
        ("my_networks:large", "but my_networks has no function large; add it"),
        ("my_networks:nothing", "my_networks has no function nothing"),
        ("sys:small", "but sys has no function small"),  # no file has it
        ("my_networks:number", "the backbone is of type int; give an nnx.Module"),
        ("small", "or a function of yours as module:function"),
    ],
)
def test_what_names_no_function_that_builds_a_backbone_is_told(my_networks, name, message):
    with pytest.raises(UserError, match=message):
        MaskRCNN(NUM_CLASSES, tiny_options(backbone=name), rngs=nnx.Rngs(0))


def test_weights_of_a_network_of_ones_own_have_no_foreign_names():
    with pytest.raises(UserError, match="the backbone Strided has no counterpart in torchvision"):
        to_torchvision(model_with(Strided(1), (16, 32)))
