"""The five losses of the paper and their alternatives, as masked sums over padded arrays.

Every loss divides by the number of samples in the whole batch, as torchvision does, unless it is given another number.
A batch without samples gives 0. All are computed in float32 or wider, whatever the compute dtype of the network.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.models.box_head import BOX_WEIGHTS
from maskrcnn_jax.ops.boxes import decode_boxes, encode_boxes, paired_giou, paired_iou
from maskrcnn_jax.ops.devices import sum_over_devices
from maskrcnn_jax.options import ModelOptions

# Of the classes with a sigmoid: a prior probability of 0.01, without which the many absent ones would dominate the
# loss at first. Sec. 4.1, Focal Loss for Dense Object Detection.
FOCAL_BIAS = math.log(0.01 / (1 - 0.01))


def masked_mean(
    values: Float[Array, "*shape"], mask: Bool[Array, "*#shape"], count: Int[Array, ""] | None = None
) -> Float[Array, ""]:
    """Return the sum of the values where mask is True, divided by ``count`` (by default the sum of the mask).

    Where devices share a batch, the sum is that of this device, and the count that of all. The mean is then the sum of
    the values that the devices return.
    """
    count = sum_over_devices(jnp.sum(mask) if count is None else count)
    total = jnp.sum(jnp.where(mask, values, 0))
    return total / jnp.maximum(count, 1).astype(values.dtype)


def smooth_l1(
    predictions: Float[Array, "*shape"], targets: Float[Array, "*shape"], beta: float = ModelOptions.smooth_l1_beta
) -> Float[Array, "*shape"]:
    """Return the elementwise smooth L1 distance: d^2 / (2 beta) below beta, |d| - beta / 2 above.

    With a beta below 1e-5 it is L1, as in detectron2, since d^2 / beta may underflow.
    """
    if beta < 1e-5:
        difference = predictions - targets
        return difference * jnp.sign(difference)  # at 0, the gradient is 0, as torch's; that of jnp.abs is 1
    return optax.losses.huber_loss(predictions, targets, delta=beta) / beta


def objectness_loss(
    logits: Float[Array, "B S"],
    foreground: Bool[Array, "B S"],
    valid: Bool[Array, "B S"],
    count: Int[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Compute the binary cross-entropy of the sampled anchors.

    Args:
        logits: [B, S].
        foreground: [B, S] bool target.
        valid: [B, S] bool.
        count: What the sum is divided by, of this device; by default the number of valid anchors.

    Returns:
        Scalar mean over the valid anchors. Source: Eqn. 1, Faster R-CNN.
    """
    values = optax.losses.sigmoid_binary_cross_entropy(logits, foreground.astype(logits.dtype))
    return masked_mean(values, valid, count)


def box_loss(
    deltas: Float[Array, "B S 4"],
    targets: Float[Array, "B S 4"],
    foreground: Bool[Array, "B S"],
    valid: Bool[Array, "B S"],
    *,
    beta: float = ModelOptions.smooth_l1_beta,
    count: Int[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Compute the smooth L1 of the box offsets of foreground samples, divided by the number of all samples.

    Args:
        deltas: [B, S, 4] predicted offsets (of the true class where there is one per class).
        targets: [B, S, 4].
        foreground: [B, S] bool.
        valid: [B, S] bool, foreground or background samples.
        beta: Of smooth L1, in units of weighted offsets.
        count: What the sum is divided by, of this device; by default the number of valid samples.

    Returns:
        Scalar. The same form serves the RPN and the box head, as in torchvision.
    """
    count = jnp.sum(valid) if count is None else count
    return masked_mean(smooth_l1(deltas, targets, beta), (foreground & valid)[..., None], count)


def classification_loss(
    logits: Float[Array, "B R C1"],
    labels: Int[Array, "B R"],
    valid: Bool[Array, "B R"],
    class_weights: tuple[float, ...] = (),
) -> Float[Array, ""]:
    """Compute the cross-entropy over the classes and background.

    Args:
        logits: [B, R, C + 1].
        labels: [B, R] int32, 0 for background.
        valid: [B, R] bool.
        class_weights: C + 1 numbers, or none for equal weights.

    Returns:
        Scalar mean over the valid RoIs, weighted by the weights of their classes.
    """
    values = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    if not class_weights:
        return masked_mean(values, valid)
    weights = jnp.where(valid, jnp.asarray(class_weights, values.dtype)[labels], 0)
    total = sum_over_devices(jnp.sum(weights))
    return jnp.sum(jnp.where(valid, values, 0) * weights) / jnp.where(total > 0, total, 1)


def check_class_weights(class_weights: tuple[float, ...], num_classes: int) -> None:
    """Raise a UserError unless there is a weight for each of ``num_classes``, background included, or none at all."""
    if class_weights and len(class_weights) != num_classes:
        raise UserError(
            f"model.class_weights has {len(class_weights)} numbers; use {num_classes}: the weight of the background, "
            "then those of the classes in the order of their labels"
        )


def focal_loss(
    logits: Float[Array, "B R C1"], labels: Int[Array, "B R"], valid: Bool[Array, "B R"]
) -> Float[Array, ""]:
    """Compute the sigmoid focal loss: independent classes, with low weights for easy examples.

    Args:
        logits: [B, R, C + 1]; the first is unused, since background means that no class is present.
        labels: [B, R] int32, 0 for background.
        valid: [B, R] bool.

    Returns:
        Scalar sum over RoIs and classes, divided by the number of foreground RoIs. Source: Eqn. 5, Focal Loss for
        Dense Object Detection, with its alpha of 0.25 and gamma of 2.
    """
    targets = jax.nn.one_hot(labels - 1, logits.shape[-1] - 1, dtype=logits.dtype)
    values = optax.losses.sigmoid_focal_loss(logits[..., 1:], targets, alpha=0.25, gamma=2.0)
    return masked_mean(jnp.sum(values, axis=-1), valid, jnp.sum(valid & (labels > 0)))


def roi_class_loss(
    kind: str,
    logits: Float[Array, "B R C1"],
    labels: Int[Array, "B R"],
    valid: Bool[Array, "B R"],
    class_weights: tuple[float, ...] = (),
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Compute the class loss of the box head, and the accuracy of all RoIs and of the foreground.

    Args:
        kind: "cross_entropy" or "focal".
        logits: [B, R, C + 1].
        labels: [B, R] int32, 0 for background.
        valid: [B, R] bool.
        class_weights: Of the cross entropy.
    """
    if kind == "focal":
        loss = focal_loss(logits, labels, valid)
        logits = logits.at[..., 0].set(0)  # background where no class is more likely present than not
    else:
        loss = classification_loss(logits, labels, valid, class_weights)
    correct = (jnp.argmax(logits, axis=-1) == labels).astype(logits.dtype)
    return loss, {
        "accuracy": masked_mean(correct, valid),
        "accuracy_foreground": masked_mean(correct, valid & (labels > 0)),
    }


def iou_loss(
    boxes: Float[Array, "B S 4"], targets: Float[Array, "B S 4"], foreground: Bool[Array, "B S"]
) -> Float[Array, ""]:
    """Return the mean of 1 - IoU over foreground samples.

    Boxes that do not overlap have no gradient. Source: UnitBox, without its logarithm.
    """
    return masked_mean(1 - paired_iou(boxes, targets), foreground)


def giou_loss(
    boxes: Float[Array, "B S 4"], targets: Float[Array, "B S 4"], foreground: Bool[Array, "B S"]
) -> Float[Array, ""]:
    """Return the mean of 1 - GIoU over foreground samples, which also attracts boxes that do not overlap."""
    return masked_mean(1 - paired_giou(boxes, targets), foreground)


def roi_box_loss(
    kind: str,
    deltas: Float[Array, "B S 4"],
    boxes: Float[Array, "B S 4"],
    targets: Float[Array, "B S 4"],
    foreground: Bool[Array, "B S"],
    valid: Bool[Array, "B S"],
    *,
    beta: float = ModelOptions.smooth_l1_beta,
) -> Float[Array, ""]:
    """Compute the loss of the box head.

    Args:
        kind: "smooth_l1" of the offsets, "iou" or "giou" of the boxes.
        deltas: [B, S, 4] predicted offsets of the true class.
        boxes: [B, S, 4] RoIs that they are relative to.
        targets: [B, S, 4] boxes of the matched objects.
        foreground: [B, S] bool.
        valid: [B, S] bool.
        beta: Of smooth L1.
    """
    if kind == "smooth_l1":
        return box_loss(deltas, encode_boxes(targets, boxes, BOX_WEIGHTS), foreground, valid, beta=beta)
    loss = iou_loss if kind == "iou" else giou_loss
    return loss(decode_boxes(deltas, boxes, BOX_WEIGHTS), targets, foreground)


def mask_loss(
    logits: Float[Array, "B F S S"], targets: Float[Array, "B F S S"], foreground: Bool[Array, "B F"]
) -> Float[Array, ""]:
    """Compute the binary cross-entropy per pixel of the mask of the true class.

    Args:
        logits: [B, F, S, S] for the true class only: classes do not compete (Sec. 3, Mask R-CNN).
        targets: [B, F, S, S] in 0..1.
        foreground: [B, F] bool.

    Returns:
        Scalar mean over the pixels of the foreground RoIs.
    """
    pixels = optax.losses.sigmoid_binary_cross_entropy(logits, targets)
    return masked_mean(jnp.mean(pixels, axis=(-2, -1)), foreground)


def dice_loss(
    logits: Float[Array, "B F S S"], targets: Float[Array, "B F S S"], foreground: Bool[Array, "B F"]
) -> Float[Array, ""]:
    """Return the mean of 1 - Dice over the masks of foreground RoIs.

    Numerator and denominator are one larger, for empty masks. The denominator has squares, as in V-Net, the source.
    With plain sums, which are also common, the best constant mask is all ones, where the sigmoid has no gradient. With
    squares it is the square root of the object's share of the box.
    """
    probabilities = jax.nn.sigmoid(logits)
    shared = jnp.sum(probabilities * targets, axis=(-2, -1))
    total = jnp.sum(jnp.square(probabilities) + jnp.square(targets), axis=(-2, -1))
    return masked_mean(1 - (2 * shared + 1) / (total + 1), foreground)
