"""The training step and the detection, lowered for devices that are not there, from shapes and dtypes alone."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from maskrcnn_jax.data.loader import mask_side
from maskrcnn_jax.data.plan import buckets_for, training_buckets
from maskrcnn_jax.data.transforms import RESIZE
from maskrcnn_jax.distributed import make_mesh, replicated, split, state_layout
from maskrcnn_jax.inference.detect import detect_on_mesh
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.options import DataOptions, Options
from maskrcnn_jax.structures import Batch, GroundTruth
from maskrcnn_jax.training.optimizer import make_optimizer, make_schedule
from maskrcnn_jax.training.step import TrainStep, split_train_state


def image_size(options: DataOptions, *, train: bool) -> tuple[int, int]:
    """Return the (height, width) of the largest padded images: of the longest ones, in landscape format."""
    buckets = training_buckets if train else buckets_for
    return max(buckets(dataclasses.replace(options, buckets="auto")), key=lambda size: (size[0] * size[1], size[1]))


def lower_train_step(options: Options, num_classes: int, num_objects: int, devices: Sequence) -> jax.stages.Lowered:
    """Lower the training step that ``maskrcnn-jax train`` runs.

    Args:
        options: Of the run.
        num_classes: C + 1.
        num_objects: G of the batches.
        devices: To compile for.
    """
    mesh = make_mesh(devices)
    # Milestones would have to fit the length of the run; the program is nearly that of a cosine over any steps.
    schedule = make_schedule(dataclasses.replace(options.optim, schedule="cosine"), 1000, 1)
    optimizer = make_optimizer(options.optim, schedule)
    structure: list[nnx.GraphDef] = []

    def make_state():
        model = MaskRCNN(num_classes, options.model, rngs=nnx.Rngs(0))
        graphdef, state = split_train_state(model, optimizer, options.optim)
        structure.append(graphdef)
        return state

    state = jax.eval_shape(make_state)
    state = _placed(state, state_layout(state, mesh, shard=options.shard_params))
    key = _placed(jax.eval_shape(lambda: jax.random.key(0)), replicated(mesh))
    batch = _train_batch(options, num_objects, mesh)
    return TrainStep(structure[0], optimizer, mesh, options.optim).lower(state, batch, key)


def lower_detect(options: Options, num_classes: int, devices: Sequence) -> jax.stages.Lowered:
    """Lower the detection that evaluation and prediction run, for batches of ``batch_size`` images."""
    mesh = make_mesh(devices)
    model = nnx.eval_shape(lambda: MaskRCNN(num_classes, options.model, rngs=nnx.Rngs(0)))
    model.eval()
    graphdef, state = nnx.split(model)
    rows = options.batch_size
    images = jax.ShapeDtypeStruct(
        (rows, *image_size(options.data, train=False), options.model.in_channels), RESIZE[options.data.resize]
    )
    batch = _placed((images, jax.ShapeDtypeStruct((rows, 2), jnp.int32)), split(mesh))
    return detect_on_mesh.lower(graphdef, mesh, _placed(state, replicated(mesh)), batch)


def _train_batch(options: Options, num_objects: int, mesh: Mesh) -> Batch:
    """Return the shapes of a batch as the loader makes it, of the largest images."""
    rows, data = options.batch_size, options.data
    side = mask_side(min(data.long_side, 640), num_objects)  # COCO's images have 640 pixels

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    gt = GroundTruth(
        boxes=array(np.float32, num_objects, 4),
        labels=array(np.int32, num_objects),
        masks=array(np.uint8, num_objects, side, side // 8),
        mask_windows=array(np.int32, num_objects, 4),
        mask_sizes=array(np.int32, 2),
        valid=array(np.bool_, num_objects),
        ignored=array(np.bool_, num_objects) if data.ignore_regions else None,
    )
    batch = Batch(
        images=array(RESIZE[data.resize], *image_size(data, train=True), options.model.in_channels),
        sizes=array(np.int32, 2),
        original_sizes=array(np.int32, 2),
        image_index=array(np.int32),
        valid=array(np.bool_),
        gt=gt,
    )
    return _placed(batch, split(mesh))


def _placed(tree, layouts):
    """Return shapes and dtypes with the layouts that arrays would have: one layout for all, or a tree of them."""
    if isinstance(layouts, NamedSharding):
        layouts = jax.tree.map(lambda _: layouts, tree)
    return jax.tree.map(lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), tree, layouts)
