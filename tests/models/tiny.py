"""A Mask R-CNN small enough to compile in seconds, and batches for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.options import ModelOptions
from maskrcnn_jax.structures import Batch, GroundTruth

SIDE = 64
NUM_CLASSES = 5
OPTIONS = {
    "backbone": "resnet18",
    "stem_channels": 8,
    "stage_channels": 8,
    "norm": "frozen",
    "fpn_channels": 16,
    "anchor_sizes": (8, 16, 24, 32, 48),
    "rpn_batch_size_per_image": 32,
    "rpn_pre_nms_top_n_train": 24,
    "rpn_pre_nms_top_n_test": 24,
    "rpn_post_nms_top_n_train": 20,
    "rpn_post_nms_top_n_test": 20,
    "box_fc_channels": (32, 32),
    "box_batch_size_per_image": 16,
    "box_score_thresh": 0.01,
    "box_detections_per_img": 6,
    "mask_channels": 16,
}


def tiny_options(**changes) -> ModelOptions:
    """Return the options of the model, any of which can be changed."""
    return ModelOptions(**(OPTIONS | changes))


def tiny_model(*, num_classes: int = NUM_CLASSES, **changes) -> MaskRCNN:
    """Build the model; every option can be changed.

    Its values are drawn with numpy: drawing each in its own compiled program takes far longer. Biases and statistics
    are not the trivial ones of an initialised network, so that forgetting one shows.
    """
    graphdef, state = _drawn(num_classes, tiny_options(**changes), jax.dtypes.canonicalize_dtype(float))
    return nnx.merge(graphdef, jax.tree.map(jnp.array, state))


@functools.cache
def _drawn(num_classes: int, options: ModelOptions, widest: np.dtype) -> tuple[nnx.GraphDef, nnx.State]:
    """Return the structure of a model and its values as NumPy arrays, in no dtype wider than JAX has at the time."""
    model = nnx.eval_shape(lambda: MaskRCNN(num_classes, options, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        if "var" in name or "scale" in name:
            values = rng.uniform(0.5, 1.5, leaf.shape)
        elif leaf.ndim == 1:
            values = rng.normal(size=leaf.shape) * 0.1
        else:
            values = rng.normal(size=leaf.shape) * (1.0 / np.prod(leaf.shape[:-1])) ** 0.5
        return np.asarray(values, leaf.dtype)

    graphdef, state = nnx.split(model)
    return graphdef, jax.tree_util.tree_map_with_path(draw, state)


def tiny_batch(batch_size: int = 2, num_gt: int = 3, seed: int = 0, side: int = SIDE) -> Batch:
    """Build a batch with ``num_gt`` rectangular objects an image, the last of them invalid."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (batch_size, side, side, 3), dtype=np.uint8)
    corner = rng.uniform(0, side - 30, (batch_size, num_gt, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(8, 28, (batch_size, num_gt, 2))], axis=-1).astype(np.float32)
    masks = np.zeros((batch_size, num_gt, side, side), np.uint8)
    for b, g in np.ndindex(batch_size, num_gt):
        x1, y1, x2, y2 = boxes[b, g].astype(int)
        masks[b, g, y1:y2, x1:x2] = 1
    valid = np.ones((batch_size, num_gt), bool)
    valid[:, -1] = False
    sizes = np.full((batch_size, 2), side, np.int32)
    gt = GroundTruth(
        boxes=boxes,
        labels=rng.integers(1, NUM_CLASSES, (batch_size, num_gt), dtype=np.int32),
        masks=np.packbits(masks, axis=-1, bitorder="little"),
        mask_windows=np.tile(np.array([0, 0, side, side], np.int32), (batch_size, num_gt, 1)),
        mask_sizes=sizes,
        valid=valid,
    )
    return Batch(images, sizes, sizes, np.arange(batch_size, dtype=np.int32), np.ones(batch_size, bool), gt)


def compiled(model: MaskRCNN):
    """Return losses(batch, key) -> terms, metrics, gradients and detect(images, sizes), both compiled."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def losses(params, rest, batch, key):
        def total(params):
            terms, metrics = nnx.merge(graph, params, rest).losses(batch, key)
            return sum(terms.values()), (terms, metrics)

        gradients, (terms, metrics) = jax.grad(total, has_aux=True)(params)
        return terms, metrics, gradients

    def detect(params, rest, images, sizes):
        return nnx.merge(graph, params, rest).detect(images, sizes)

    losses, detect = jax.jit(losses), jax.jit(detect)
    return (
        lambda batch, key: losses(params, rest, batch, key),
        lambda images, sizes: detect(params, rest, jnp.asarray(images), jnp.asarray(sizes)),
        losses,
        detect,
        params,
        rest,
    )


def all_finite(tree) -> bool:
    """Return whether every array of a tree is finite."""
    return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(tree))
