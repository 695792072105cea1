"""The five losses of the paper and those that it tried in their place, as masked sums over padded arrays.

Every loss divides by a number of samples in the whole batch, as torchvision does; a batch without any gives 0. All
are computed in float32 at least, whatever the network computes in.
"""

import jax
import jax.numpy as jnp
import optax

from maskrcnn_jax.ops.boxes import paired_giou, paired_iou

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


def focal_loss(logits: jax.Array, labels: jax.Array, valid: jax.Array) -> jax.Array:
    """Sigmoid focal loss: every class decides for itself, and what is decided well already counts for little.

    Args:
      logits: [B, R, C + 1]; the first, of background, counts for nothing: background is that no class says yes.
      labels: [B, R] int32, 0 for background.
      valid: [B, R] bool.

    Returns:
      Scalar sum over RoIs and classes by the number of foreground RoIs. Source: Eqn. 5, Focal Loss for Dense Object
      Detection, with its alpha of 0.25 and gamma of 2.
    """
    targets = jax.nn.one_hot(labels - 1, logits.shape[-1] - 1, dtype=logits.dtype)
    values = optax.losses.sigmoid_focal_loss(logits[..., 1:], targets, alpha=0.25, gamma=2.0)
    return masked_mean(jnp.sum(values, axis=-1), valid, jnp.sum(valid & (labels > 0)))


def iou_loss(boxes: jax.Array, targets: jax.Array, foreground: jax.Array) -> jax.Array:
    """Return the mean of 1 - IoU over foreground samples: boxes and targets [B, S, 4], foreground [B, S] bool.

    Where two boxes do not overlap there is nothing to follow. Source: UnitBox, without its logarithm.
    """
    return masked_mean(1 - paired_iou(boxes, targets), foreground)


def giou_loss(boxes: jax.Array, targets: jax.Array, foreground: jax.Array) -> jax.Array:
    """Return the mean of 1 - GIoU, which also pulls boxes that do not overlap towards each other; as iou_loss."""
    return masked_mean(1 - paired_giou(boxes, targets), foreground)


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


def dice_loss(logits: jax.Array, targets: jax.Array, foreground: jax.Array) -> jax.Array:
    """Return the mean of 1 - Dice over the masks of foreground RoIs, with arguments as those of mask_loss.

    Both sums of the fraction are one larger, for masks without a pixel. The squares are V-Net's, its source: with the
    plain sums that are common as well, the best mask that is the same everywhere is all ones, and there the sigmoid
    has no gradient to leave it by; with squares it is the root of the share of the object.
    """
    probabilities = jax.nn.sigmoid(logits)
    shared = jnp.sum(probabilities * targets, axis=(-2, -1))
    total = jnp.sum(jnp.square(probabilities) + jnp.square(targets), axis=(-2, -1))
    return masked_mean(1 - (2 * shared + 1) / (total + 1), foreground)
