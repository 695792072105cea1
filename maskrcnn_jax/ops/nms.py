"""Non-maximum suppression with static shapes. Every form keeps exactly what the greedy algorithm keeps."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from maskrcnn_jax.ops.boxes import exceeds_iou, iou_with
from maskrcnn_jax.ops.cpu.nms import nms_one_by_one


def nms(boxes: Float[Array, "N 4"], valid: Bool[Array, " N"], *, iou_threshold: float) -> Bool[Array, " N"]:
    """Suppress boxes that overlap a better one that is itself kept.

    Args:
        boxes: [N, 4], best first.
        valid: [N] bool; invalid boxes are never kept and suppress nothing.
        iou_threshold: overlap above which (strictly) the worse box goes.

    Returns:
        [N] bool, the boxes kept.
    """
    if boxes.shape[0] == 0:
        return valid
    forms = {"cpu": nms_one_by_one, "default": nms_in_rounds}
    forms = {name: functools.partial(form, iou_threshold=iou_threshold) for name, form in forms.items()}
    return jax.lax.platform_dependent(boxes, valid, **forms)


def nms_in_rounds(boxes: Float[Array, "N 4"], valid: Bool[Array, " N"], *, iou_threshold: float) -> Bool[Array, " N"]:
    """Return what :func:`nms` returns, from all N^2 overlaps at once and a few rounds; for accelerators.

    A round keeps the boxes that no better box kept by the round before suppresses. After k rounds the best k boxes are
    final. The loop ends when a round changes nothing, usually after a handful.
    """
    position = jnp.arange(boxes.shape[0])
    overlaps = jax.vmap(functools.partial(exceeds_iou, iou_threshold=iou_threshold), (0, None))(boxes, boxes.T)
    suppresses = overlaps & (position[:, None] < position[None, :])  # [N, N]: whether the row's box is the better

    def changed(state):
        return state[1]

    def play_round(state):
        before, _ = state
        keep = valid & ~jnp.any(suppresses & before[:, None], axis=0)
        return keep, jnp.any(keep != before)

    return jax.lax.while_loop(changed, play_round, (valid, jnp.any(valid)))[0]


class Picks(NamedTuple):
    """Result of :func:`class_nms`, best first."""

    box_index: Int32[Array, " D"]
    class_index: Int32[Array, " D"]
    scores: Float[Array, " D"]
    valid: Bool[Array, " D"]


def class_nms(
    boxes: Float[Array, "N C 4"],
    scores: Float[Array, "N C"],
    *,
    iou_threshold: float,
    score_threshold: float,
    max_picks: int,
    method: str = "hard",
    sigma: float = 0.5,
    class_agnostic: bool = False,
) -> Picks:
    """Suppress within each class and return the best of all classes together.

    Instead of sorting every (box, class) pair, the best pair left is picked ``max_picks`` times and only its class is
    updated. This needs no cap on candidates, so the result is that of the full per-class algorithm.

    Args:
        boxes: [N, C, 4], a box for each class.
        scores: [N, C]; 0 or below for pairs that must not be picked.
        iou_threshold: overlap above which (strictly) the worse box of a class goes.
        score_threshold: scores at or below it are never picked; at least 0.
        max_picks: D.
        method: "hard" drops the boxes that overlap a better one. "linear" and "gaussian" lower their scores instead,
            by the factor 1 - IoU where the IoU exceeds the threshold, or by exp(-IoU^2 / sigma) everywhere.
        sigma: of "gaussian".
        class_agnostic: suppress among the boxes of all classes.

    Returns:
        The picks, in descending order of score, which may have been lowered; of equal scores the lower class and box
        index come first.

    Source: "linear" and "gaussian": Soft-NMS (Bodla et al., 2017), equations 2 and 3.
    """
    if class_agnostic:
        number = boxes.shape[0]
        picks = class_nms(
            boxes.swapaxes(0, 1).reshape(-1, 1, 4),
            scores.T.reshape(-1, 1),
            iou_threshold=iou_threshold,
            score_threshold=score_threshold,
            max_picks=max_picks,
            method=method,
            sigma=sigma,
        )
        return picks._replace(box_index=picks.box_index % number, class_index=picks.box_index // number)
    rescore = functools.partial(
        _rescore, method=method, iou_threshold=iou_threshold, score_threshold=score_threshold, sigma=sigma
    )

    def of_batch(boxes, scores):
        return _pick_best(boxes, jnp.where(scores > score_threshold, scores, -1), rescore, max_picks)

    # A plain vmap would copy the boxes and scores of every image with each pick.
    @jax.custom_batching.custom_vmap
    def of_image(boxes, scores):
        return jax.tree.map(lambda array: array[0], of_batch(boxes[None], scores[None]))

    @of_image.def_vmap
    def _(axis_size, in_batched, *arrays):
        every = [
            array if is_batched else jnp.broadcast_to(array, (axis_size, *array.shape))
            for array, is_batched in zip(arrays, in_batched, strict=True)
        ]
        picks = of_batch(*every)
        return picks, jax.tree.map(lambda _: True, picks)

    return of_image(boxes, scores)


def _rescore(picked, others, scores, *, method, iou_threshold, score_threshold, sigma):
    """Return the scores [N] of boxes after one was picked, -1 where they must not be picked.

    Args:
        picked: [4] the box.
        others: [4, N] corners of the boxes, the picked one among them.
        scores: [N] before.
    """
    exceeds = exceeds_iou(picked, others, iou_threshold)
    if method == "hard":
        return jnp.where(exceeds, -1, scores)
    iou = iou_with(picked, others)
    factor = jnp.where(exceeds, 1 - iou, 1) if method == "linear" else jnp.exp(-(iou**2) / sigma)
    return jnp.where(scores * factor > score_threshold, scores * factor, -1)


def _pick_best(boxes, alive, rescore, max_picks):
    """Return the picks [B, D] of boxes [B, N, C, 4]; alive [B, N, C] is 0 or below where none must be picked."""
    batch, number, num_classes = alive.shape
    corners = boxes.transpose(3, 0, 2, 1).reshape(4, batch * num_classes, number)
    alive = alive.transpose(0, 2, 1)
    best = jnp.max(alive, axis=2)
    alive = alive.reshape(batch * num_classes, number)
    image = jnp.arange(batch)

    def more(state):
        count, _, best, _ = state
        return (count < max_picks) & (jnp.max(best) > 0)

    def pick(state):
        count, alive, best, picks = state
        classes = jnp.argmax(best, axis=1)
        rows = image * num_classes + classes
        scores = alive[rows]
        index = jnp.argmax(scores, axis=1)
        others = corners[:, rows]  # [4, B, N]
        picked = jnp.take_along_axis(others, index[None, :, None], axis=2)
        survivors = jax.vmap(rescore, (1, 1, 0))(picked[..., 0], others, scores).at[image, index].set(-1)
        found = best[image, classes]
        new = Picks(index.astype(jnp.int32), classes.astype(jnp.int32), jnp.maximum(found, 0), found > 0)
        picks = jax.tree.map(lambda old, new: old.at[:, count].set(new), picks, new)
        best = best.at[image, classes].set(jnp.max(survivors, axis=1))
        return count + 1, alive.at[rows].set(survivors), best, picks

    nothing = Picks(
        jnp.zeros((batch, max_picks), jnp.int32),
        jnp.zeros((batch, max_picks), jnp.int32),
        jnp.zeros((batch, max_picks), alive.dtype),
        jnp.zeros((batch, max_picks), bool),
    )
    return jax.lax.while_loop(more, pick, (0, alive, best, nothing))[3]
