"""Standardise images by the statistics that pretrained backbones expect."""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Real

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.ops.precision import at_least_float32

# Of ImageNet's images scaled to 0..1.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
# Of further channels, about which nothing is known: roughly those of values that fill 0..1.
EXTRA_MEAN, EXTRA_STD = 0.5, 0.25


def channel_statistics(in_channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and the standard deviation of each channel of images scaled to 0..1."""
    extra = in_channels - 3
    return (*IMAGE_MEAN, *[EXTRA_MEAN] * extra), (*IMAGE_STD, *[EXTRA_STD] * extra)


def normalize_images(
    images: Real[Array | np.ndarray, "B H W I"],
    sizes: Int[Array | np.ndarray, "B 2"],
    *,
    in_channels: int,
    dtype: DTypeLike,
) -> Float[Array, "B H W I"]:
    """Standardise images; the padding is zero.

    Args:
        images: [B, H, W, I] in 0..255.
        sizes: [B, 2] (height, width) of the images inside the padding.
        in_channels: I that the model takes.
        dtype: Of the result.

    Raises:
        UserError: if the images have another number of channels.
    """
    if images.shape[-1] != in_channels:
        raise UserError(
            f"images have {images.shape[-1]} channels where model.in_channels is {in_channels}; change the option, or "
            "give other images"
        )
    wide = at_least_float32(dtype)
    mean, std = (jnp.array(value, wide).reshape(1, 1, 1, -1) for value in channel_statistics(in_channels))
    normalized = (images.astype(wide) / 255 - mean) / std
    inside_y = jnp.arange(images.shape[1])[None, :] < sizes[:, :1]
    inside_x = jnp.arange(images.shape[2])[None, :] < sizes[:, 1:]
    inside = inside_y[:, :, None, None] & inside_x[:, None, :, None]
    return jnp.where(inside, normalized, 0).astype(dtype)
