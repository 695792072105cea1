"""The final detections and all five losses against torchvision's own functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from maskrcnn_jax.distributed import make_mesh, on_each_device  # noqa: E402
from maskrcnn_jax.models import losses  # noqa: E402
from maskrcnn_jax.models.box_head import BOX_WEIGHTS  # noqa: E402
from maskrcnn_jax.models.postprocess import select_detections  # noqa: E402
from maskrcnn_jax.ops.boxes import encode_boxes  # noqa: E402
from maskrcnn_jax.ops.masks import mask_targets  # noqa: E402
from maskrcnn_jax.ops.matching import BACKGROUND, Sample  # noqa: E402
from maskrcnn_jax.options import ModelOptions  # noqa: E402
from maskrcnn_jax.structures import GroundTruth, Proposals  # noqa: E402
from tests.models.tiny import tiny_model  # noqa: E402
from tools.torchvision_reference import import_torchvision  # noqa: E402

torchvision = import_torchvision()
from torchvision.models.detection import _utils as det_utils  # noqa: E402
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_loss  # noqa: E402
from torchvision.models.detection.rpn import RegionProposalNetwork  # noqa: E402

# Means over hundreds of float32 terms; in float64 only the order of the additions is left.
TOLERANCES = {"float32": {"rtol": 1e-5, "atol": 1e-6}, "float64": {"rtol": 1e-12, "atol": 1e-12}}


def random_boxes(rng, count, side, dtype):
    corner = rng.uniform(0, side, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(2, side / 2, (count, 2))], axis=-1).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("detections_per_img", [20, 300])
def test_detections_equal_torchvisions_postprocessing(detections_per_img, dtype):
    rng = np.random.default_rng(0)
    num_proposals, num_classes, size = 60, 6, (80, 100)
    logits = (rng.normal(size=(num_proposals, num_classes)) * 2).astype(dtype)
    deltas = rng.normal(size=(num_proposals, num_classes, 4)).astype(dtype)
    deltas[::9, :, 0] = 100.0  # beyond the border: clipped to nothing
    boxes = random_boxes(rng, num_proposals, 70, dtype)
    heads = RoIHeads(None, None, None, 0.5, 0.5, 512, 0.25, None, 0.05, 0.5, detections_per_img)
    expected = heads.postprocess_detections(
        torch.tensor(logits), torch.tensor(deltas.reshape(num_proposals, -1)), [torch.tensor(boxes)], [size]
    )
    with jax.enable_x64(dtype == "float64"):
        # More proposals than torchvision gets, of the highest score, but invalid.
        extra = np.zeros((7, num_classes), dtype)
        extra[:, 1] = 50
        select = jax.jit(
            lambda c, d, p: select_detections(
                jax.nn.softmax(c)[:, 1:],
                d,
                p,
                jnp.array(size),
                ModelOptions(box_detections_per_img=detections_per_img),
            )
        )
        ours, scores, labels, valid = select(
            np.concatenate([logits, extra]),
            np.concatenate([deltas, deltas[:7]]),
            Proposals(
                jnp.asarray(np.concatenate([boxes, boxes[:7]])),
                jnp.zeros(num_proposals + 7),
                jnp.arange(num_proposals + 7) < num_proposals,
            ),
        )
        count = int(valid.sum())
        assert count == len(expected[0][0]) > 15
        assert bool(valid[:count].all())
        # Pixels up to 100 in float32.
        close = {"float32": {"rtol": 0, "atol": 5e-5}, "float64": {"rtol": 0, "atol": 1e-9}}[dtype]
        np.testing.assert_allclose(ours[:count], expected[0][0], **close)
        np.testing.assert_allclose(scores[:count], expected[1][0], **close)
        np.testing.assert_array_equal(labels[:count], expected[2][0])


def value_and_gradients(function, arrays):
    """Return the values of a torch function of leaf tensors, and the gradients of their sum."""
    tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
    values = function(*tensors)
    sum(values).backward()
    return [value.item() for value in values], [
        np.zeros(t.shape) if t.grad is None else t.grad.numpy() for t in tensors
    ]


def assert_same_losses(ours, expected, arrays, dtype):
    with jax.enable_x64(dtype == "float64"):

        def total(arrays):
            values = ours(*arrays)
            return sum(values), values

        (_, values), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))([jnp.asarray(a) for a in arrays])
        assert all(value.dtype == dtype for value in values)
        np.testing.assert_allclose(values, expected[0], **TOLERANCES[dtype])
        for gradient, wanted in zip(gradients, expected[1], strict=True):
            np.testing.assert_allclose(gradient, wanted, **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_classification_and_box_losses_equal_fastrcnn_loss(dtype):
    """Two images of 20 and 12 sampled RoIs: torchvision concatenates them, here the second is padded."""
    rng = np.random.default_rng(1)
    counts, rows, num_classes = (20, 12), 20, 6
    valid = np.arange(rows) < np.array(counts)[:, None]
    labels = rng.integers(0, num_classes, (2, rows))
    logits = rng.normal(size=(2, rows, num_classes)).astype(dtype)
    deltas = (rng.normal(size=(2, rows, num_classes, 4)) * 0.5).astype(dtype)  # on both sides of beta
    rois, gt = random_boxes(rng, 2 * rows, 70, dtype), random_boxes(rng, 2 * rows, 70, dtype)
    rois, gt = rois.reshape(2, rows, 4), gt.reshape(2, rows, 4)
    coder = det_utils.BoxCoder(BOX_WEIGHTS)
    targets = [coder.encode_single(torch.tensor(gt[i][valid[i]]), torch.tensor(rois[i][valid[i]])) for i in range(2)]

    def reference(logits, deltas):
        kept = torch.tensor(valid)
        split = [torch.tensor(labels[i][valid[i]]) for i in range(2)]
        return fastrcnn_loss(logits[kept], deltas[kept].flatten(1), split, targets)

    def ours(logits, deltas):
        own = jnp.take_along_axis(deltas, jnp.asarray(labels)[..., None, None], axis=2)[:, :, 0]
        return (
            losses.classification_loss(logits, jnp.asarray(labels), jnp.asarray(valid)),
            losses.box_loss(
                own,
                encode_boxes(jnp.asarray(gt), jnp.asarray(rois), BOX_WEIGHTS),
                jnp.asarray(labels > 0),
                jnp.asarray(valid),
            ),
        )

    assert_same_losses(ours, value_and_gradients(reference, [logits, deltas]), [logits, deltas], dtype)


@pytest.mark.parametrize("num_devices", [1, 4])
def test_weighted_cross_entropy_equals_torchs(num_devices):
    """Values and gradients in float64, and the same where devices share the batch."""
    rng = np.random.default_rng(4)
    weights = (0.25, 3.0, 0.0, 1.5, 0.7)
    logits, labels = rng.normal(size=(4, 9, 5)) * 2, rng.integers(0, 5, (4, 9))
    valid = rng.random((4, 9)) < 0.8
    inputs = torch.tensor(logits, requires_grad=True)
    loss = torch.nn.CrossEntropyLoss(weight=torch.tensor(weights, dtype=torch.float64))
    wanted = loss(inputs[valid], torch.tensor(labels[valid]))
    wanted.backward()

    def share(_, rows):
        logits, labels, valid = rows
        value, gradient = jax.value_and_grad(losses.classification_loss)(logits, labels, valid, weights)
        return value[None], gradient

    with jax.enable_x64(True):
        mesh = make_mesh(jax.devices()[:num_devices])
        values, gradients = jax.jit(on_each_device(share, mesh, returns_rows=True))((), (logits, labels, valid))
    np.testing.assert_allclose(np.asarray(values).sum(), wanted.item(), rtol=1e-12)
    np.testing.assert_allclose(gradients, inputs.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_mask_loss_equals_maskrcnn_loss(dtype):
    rng = np.random.default_rng(2)
    counts, rows, num_classes, side = (5, 3), 5, 4, 48
    foreground = np.arange(rows) < np.array(counts)[:, None]
    masks = (rng.random((2, 2, side, side)) > 0.5).astype(np.uint8)
    gt_labels = rng.integers(1, num_classes, (2, 2))
    index = rng.integers(0, 2, (2, rows))
    boxes = random_boxes(rng, 2 * rows, 30, dtype).reshape(2, rows, 4)
    logits = rng.normal(size=(2, rows, num_classes, 28, 28)).astype(dtype)

    def reference(logits):
        return (
            maskrcnn_loss(
                logits[torch.tensor(foreground)],
                [torch.tensor(boxes[i][foreground[i]]) for i in range(2)],
                [torch.tensor(m) for m in masks],
                [torch.tensor(label) for label in gt_labels],
                [torch.tensor(index[i][foreground[i]]) for i in range(2)],
            ),
        )

    def ours(logits):
        size = jnp.array([side, side])
        packed = jnp.asarray(np.packbits(masks, axis=-1, bitorder="little"))
        windows = jnp.array([[0, 0, side, side]] * 2)
        targets = jax.vmap(lambda p, b, i: mask_targets(p, windows, size, b, i, size, max_size=(side, side)))(
            packed, jnp.asarray(boxes), jnp.asarray(index, jnp.int32)
        )
        labels = np.take_along_axis(gt_labels, index, axis=1)
        own = jnp.take_along_axis(logits, jnp.asarray(labels)[:, :, None, None, None], axis=2)[:, :, 0]
        return (losses.mask_loss(own, targets, jnp.asarray(foreground)),)

    assert_same_losses(ours, value_and_gradients(reference, [logits]), [logits], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rpn_losses_equal_torchvisions_with_the_same_anchors_sampled(dtype):
    """The second image has no object. The sampler of the reference is replaced, for its draw is random."""
    rng = np.random.default_rng(3)
    num_anchors, sampled = 120, 24
    anchors = random_boxes(rng, num_anchors, 80, dtype)
    gt = np.concatenate([anchors[:3] + rng.normal(size=(3, 4)).astype(dtype), random_boxes(rng, 2, 80, dtype)])
    objectness = rng.normal(size=(2, num_anchors)).astype(dtype)
    deltas = (rng.normal(size=(2, num_anchors, 4)) * 0.3).astype(dtype)
    rpn = RegionProposalNetwork(None, None, 0.7, 0.3, 256, 0.5, {}, {}, 0.7)
    torch_anchors = [torch.tensor(anchors)] * 2
    targets = [{"boxes": torch.tensor(gt)}, {"boxes": torch.zeros((0, 4), dtype=torch.tensor(gt).dtype)}]
    labels, matched = rpn.assign_targets_to_anchors(torch_anchors, targets)
    labels = [label.to(torch_anchors[0]) for label in labels]  # float32 targets would round float64 logits
    regression = rpn.box_coder.encode([m.to(torch_anchors[0]) for m in matched], torch_anchors)
    positive = [torch.where(label == 1)[0][:10] for label in labels]
    negative = [torch.where(label == 0)[0][: 20 - 5 * i] for i, label in enumerate(labels)]
    assert len(positive[0]) >= 3
    assert len(positive[1]) == 0

    def mask(indices):
        masks = torch.zeros(2, num_anchors, dtype=torch.uint8)
        for i, index in enumerate(indices):
            masks[i, index] = 1
        return list(masks)

    rpn.fg_bg_sampler = lambda labels: (mask(positive), mask(negative))

    def reference(objectness, deltas):
        return rpn.compute_loss(objectness.reshape(-1, 1), deltas.reshape(-1, 4), labels, regression)

    index, foreground, valid = np.zeros((2, sampled + 20), np.int32), *np.zeros((2, 2, sampled + 20), bool)
    for i in range(2):
        drawn = torch.cat([positive[i], negative[i]]).numpy()
        index[i, : len(drawn)], valid[i, : len(drawn)] = drawn, True
        foreground[i, : len(positive[i])] = True

    with jax.enable_x64(dtype == "float64"):
        model = tiny_model()
        ground_truth = GroundTruth(
            boxes=jnp.stack([jnp.asarray(gt), jnp.asarray(gt)]),
            labels=jnp.ones((2, 5), jnp.int32),
            masks=None,
            mask_windows=None,
            mask_sizes=None,
            valid=jnp.array([[True] * 5, [False] * 5]),
        )
        levels = [jnp.asarray(anchors[:80]), jnp.asarray(anchors[80:])]
        matches = model.match_anchors(levels, ground_truth)
        np.testing.assert_array_equal(matches >= 0, torch.stack(labels) == 1)
        np.testing.assert_array_equal(matches == BACKGROUND, torch.stack(labels) == 0)
        sample = Sample(jnp.asarray(index), jnp.asarray(foreground), jnp.asarray(valid))

    def ours(objectness, deltas):
        terms = model.rpn_losses(
            [objectness[:, :80], objectness[:, 80:]],
            [deltas[:, :80], deltas[:, 80:]],
            levels,
            matches,
            sample,
            ground_truth,
        )
        return terms["loss_objectness"], terms["loss_rpn_box_reg"]

    assert_same_losses(ours, value_and_gradients(reference, [objectness, deltas]), [objectness, deltas], dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_other_losses_equal_torchvisions_operators(dtype):
    rng = np.random.default_rng(0)
    labels, foreground = rng.integers(0, 5, (2, 20)), rng.random((2, 20)) < 0.6
    logits = (rng.normal(size=(2, 20, 5)) * 3).astype(dtype)
    boxes, targets = (random_boxes(rng, 40, 30, dtype).reshape(2, 20, 4) for _ in range(2))
    one_hot = torch.nn.functional.one_hot(torch.tensor(labels), 5)[..., 1:].to(getattr(torch, dtype))
    focal = torchvision.ops.sigmoid_focal_loss(torch.tensor(logits[..., 1:]), one_hot, reduction="sum")
    pairs = torch.tensor(boxes[foreground]), torch.tensor(targets[foreground])
    iou = 1 - torch.diagonal(torchvision.ops.box_iou(*pairs))
    giou = torchvision.ops.generalized_box_iou_loss(*pairs)
    with jax.enable_x64(dtype == "float64"):
        ours = losses.focal_loss(jnp.asarray(logits), jnp.asarray(labels), jnp.ones((2, 20), bool))
        np.testing.assert_allclose(ours, focal / (labels > 0).sum(), **TOLERANCES[dtype])
        inputs = jnp.asarray(boxes), jnp.asarray(targets), jnp.asarray(foreground)
        np.testing.assert_allclose(losses.iou_loss(*inputs), iou.mean(), **TOLERANCES[dtype])
        # torchvision adds 1e-7 to what it divides by.
        np.testing.assert_allclose(losses.giou_loss(*inputs), giou.mean(), rtol=1e-6)
