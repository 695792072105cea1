"""How two programs are compared that compute the same detections in different orders of additions."""

import numpy as np

from maskrcnn_jax.structures import Detections

BOX, SCORE, MASK_IOU = 0.05, 1e-4, 0.99  # pixels, probability
TIE = 1e-5  # scores nearer than this may come in either order


def check_agreement(found: Detections, expected: Detections) -> None:
    """Assert that detections [B, D, ...] are the same up to rounding; of nearly equal scores the order may differ."""
    boxes, scores, labels, masks, valid = map(np.asarray, found)
    wanted = Detections(*map(np.asarray, expected))
    np.testing.assert_array_equal(valid, wanted.valid)
    for i in range(len(valid)):
        unused = set(np.flatnonzero(valid[i]).tolist())
        for j in np.flatnonzero(wanted.valid[i]).tolist():
            near = [k for k in sorted(unused) if abs(scores[i, k] - scores[i, j]) <= TIE or k == j]
            same = [k for k in near if labels[i, k] == wanted.labels[i, j]]
            same = [k for k in same if np.abs(boxes[i, k] - wanted.boxes[i, j]).max() <= BOX]
            assert same, f"image {i}, detection {j}: {wanted.boxes[i, j]} is not among {boxes[i, near]}"
            k = same[0]
            unused.remove(k)
            assert abs(scores[i, k] - wanted.scores[i, j]) <= SCORE
            ours, theirs = masks[i, k] >= 0.5, wanted.masks[i, j] >= 0.5
            assert (ours & theirs).sum() >= MASK_IOU * (ours | theirs).sum()
            np.testing.assert_allclose(masks[i, k], wanted.masks[i, j], atol=1e-3)
