"""Fewer channels: a trained network without those that matter least, smaller and faster, and a little less accurate.

Only channels that one layer gives and the next one reads go: those inside the residual blocks of a ResNet, and the
features between the fully connected layers of the box head. What blocks add up keeps its width, and so do the pyramid,
the RPN and the mask head, which gives hardly a mask without a third of its channels.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.models.layers import Conv, ConvNorm, GroupNorm, Linear
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.models.resnet import ResNet


def prune_channels(network: MaskRCNN, fraction: float) -> MaskRCNN:
    """Return a copy of a network with fewer channels between its layers; the original stays as it is.

    Of K channels int(fraction * K) go, those with the least product of two norms: the L1 norm of the filter, as its
    batch normalisation scales it, which bounds the channel where inputs are bounded, and the L2 norm of the weights
    that read it, which is how far the channel moves the next layer. A channel that gives nothing, or that nothing
    reads, has none. What a lost channel gave on average is not made up for, which did not help; docs/export.md has the
    AP of this criterion beside others.

    Args:
        network: with a ResNet.
        fraction: of the channels between two layers, 0 <= fraction < 1.

    Raises:
        UserError: for another fraction or backbone, or group norms.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"the share of channels to prune is {fraction}; use 0 or more and less than 1, such as 0.3")
    network = nnx.clone(network)
    if not isinstance(network.backbone, ResNet):
        raise UserError(f"channels of a {type(network.backbone).__name__} cannot be pruned; use a ResNet")
    if any(isinstance(module, GroupNorm) for _, module in nnx.iter_modules(network.backbone)):
        raise UserError("channels that are normalised in groups cannot be pruned; use model.norm batch or frozen")
    chains = [block.convs for stage in network.backbone.stages for block in stage]
    for layers in (*chains, network.box_head.fcs):
        for layer, reader in zip(layers[:-1], layers[1:], strict=True):
            _prune_between(layer, reader, fraction)
    return network


def _prune_between(layer: ConvNorm | Linear, reader: ConvNorm | Linear, fraction: float) -> None:
    """Take channels away from a layer and from the one that reads them through a ReLU."""
    filters, readers = _product(layer), _product(reader)
    norm = getattr(layer, "norm", None)
    importance = _norms(filters.kernel[...], -1, 1) * _norms(readers.kernel[...], -2, 2)
    if norm is not None:
        importance *= jnp.abs(norm.scale[...]) * jax.lax.rsqrt(norm.var[...] + norm.eps)
    ranked = np.argsort(np.asarray(importance), kind="stable")
    kept = np.sort(ranked[int(fraction * len(ranked)) :])
    of_channels = [filters.kernel, filters.bias]
    if norm is not None:
        of_channels += [norm.scale, norm.bias, norm.mean, norm.var]
    for variable in of_channels:
        if variable is not None:
            variable.set_value(jnp.take(variable[...], kept, axis=-1))
    readers.kernel.set_value(jnp.take(readers.kernel[...], kept, axis=-2))
    if isinstance(layer, Linear) and isinstance(reader, Linear):
        layer.out_features = reader.in_features = len(kept)


def _product(layer: ConvNorm | Linear) -> Conv | Linear:
    return layer.conv if isinstance(layer, ConvNorm) else layer


def _norms(kernel: jax.Array, axis: int, order: int) -> jax.Array:
    """Return the norms of the slices of a kernel along an axis."""
    return jnp.linalg.norm(jnp.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1), ord=order, axis=1)
