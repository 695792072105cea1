"""The five losses of the paper, as masked sums over padded arrays.

Every loss divides by the number of samples in the whole batch, as torchvision does; a batch without any gives 0. All
are computed in float32 at least, whatever the network computes in.
"""

import jax
import jax.numpy as jnp
import optax

# Where smooth L1 turns from quadratic to linear, in units of weighted offsets.
SMOOTH_L1_BETA = 1.0 / 9


def masked_mean(values: jax.Array, mask: jax.Array, count: jax.Array | None = None) -> jax.Array:
    """Return the sum of values where mask holds, divided by ``count`` (the number of mask entries when not given)."""
    count = jnp.sum(mask) if count is None else count
    total = jnp.sum(jnp.where(mask, values, 0))
    return total / jnp.maximum(count, 1).astype(values.dtype)


def smooth_l1(predictions: jax.Array, targets: jax.Array, beta: float = SMOOTH_L1_BETA) -> jax.Array:
    """Return the elementwise smooth L1 distance: d^2 / (2 beta) below beta, |d| - beta / 2 above."""
    return optax.losses.huber_loss(predictions, targets, delta=beta) / beta


def objectness_loss(logits: jax.Array, foreground: jax.Array, valid: jax.Array) -> jax.Array:
    """Binary cross-entropy of the sampled anchors.

    Args:
      logits: [B, S].
      foreground: [B, S] bool target.
      valid: [B, S] bool.

    Returns:
      Scalar mean over the valid anchors. Source: Eqn. 1, Faster R-CNN.
    """
    return masked_mean(optax.losses.sigmoid_binary_cross_entropy(logits, foreground.astype(logits.dtype)), valid)


def box_loss(deltas: jax.Array, targets: jax.Array, foreground: jax.Array, valid: jax.Array) -> jax.Array:
    """Smooth L1 of the box offsets of foreground samples, over the number of all samples.

    Args:
      deltas: [B, S, 4] predicted offsets (of the true class where there is one per class).
      targets: [B, S, 4].
      foreground: [B, S] bool.
      valid: [B, S] bool, foreground or background samples.

    Returns:
      Scalar. The same form serves the RPN and the box head, as in torchvision.
    """
    return masked_mean(smooth_l1(deltas, targets), (foreground & valid)[..., None], jnp.sum(valid))


def classification_loss(logits: jax.Array, labels: jax.Array, valid: jax.Array) -> jax.Array:
    """Cross-entropy over the classes and background.

    Args:
      logits: [B, R, C + 1].
      labels: [B, R] int32, 0 for background.
      valid: [B, R] bool.

    Returns:
      Scalar mean over the valid RoIs.
    """
    return masked_mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels), valid)


def mask_loss(logits: jax.Array, targets: jax.Array, foreground: jax.Array) -> jax.Array:
    """Binary cross-entropy per pixel of the mask of the true class.

    Args:
      logits: [B, F, S, S] for the true class only: classes do not compete (Sec. 3, Mask R-CNN).
      targets: [B, F, S, S] in 0..1.
      foreground: [B, F] bool.

    Returns:
      Scalar mean over the pixels of the foreground RoIs.
    """
    pixels = optax.losses.sigmoid_binary_cross_entropy(logits, targets)
    return masked_mean(jnp.mean(pixels, axis=(-2, -1)), foreground)
