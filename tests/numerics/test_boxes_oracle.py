"""Boxes, anchors, matching and suppression against torchvision on random inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from maskrcnn_jax.models.proposals import select_proposals  # noqa: E402
from maskrcnn_jax.ops import boxes as box_ops  # noqa: E402
from maskrcnn_jax.ops.anchors import grid_anchors  # noqa: E402
from maskrcnn_jax.ops.matching import match  # noqa: E402
from maskrcnn_jax.ops.nms import class_nms, nms  # noqa: E402
from tools.torchvision_reference import import_torchvision  # noqa: E402

torchvision = import_torchvision()
from torchvision.models.detection import _utils as det_utils  # noqa: E402
from torchvision.models.detection.anchor_utils import AnchorGenerator  # noqa: E402
from torchvision.models.detection.image_list import ImageList  # noqa: E402
from torchvision.models.detection.rpn import RegionProposalNetwork  # noqa: E402

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
SIZES, RATIOS = (32, 64, 128, 256, 512), (0.5, 1.0, 2.0)
# Float32 rounding of coordinates up to 1000 and of exp; float64 proves that only rounding is left.
TOLERANCES = {"float32": {"rtol": 1e-5, "atol": 1e-4}, "float64": {"rtol": 1e-12, "atol": 1e-9}}


def random_boxes(rng, count, side=800.0, dtype="float64"):
    corner = rng.uniform(0, side, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(1, side / 2, (count, 2))], axis=-1).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_coding_overlap_and_clipping_equal_torchvisions(dtype):
    rng = np.random.default_rng(0)
    a, b = random_boxes(rng, 60, dtype=dtype), random_boxes(rng, 60, dtype=dtype)
    deltas = (rng.normal(size=(60, 4)) * [1, 1, 5, 20]).astype(dtype)  # some beyond the limit of growth
    coder = det_utils.BoxCoder(WEIGHTS)
    ta, tb = torch.tensor(a), torch.tensor(b)
    with jax.enable_x64(dtype == "float64"):
        close = TOLERANCES[dtype]
        np.testing.assert_allclose(
            box_ops.box_iou(jnp.asarray(a), jnp.asarray(b)), torchvision.ops.box_iou(ta, tb), **close
        )
        np.testing.assert_allclose(
            box_ops.encode_boxes(jnp.asarray(a), jnp.asarray(b), WEIGHTS), coder.encode_single(ta, tb), **close
        )
        decoded = box_ops.decode_boxes(jnp.asarray(deltas), jnp.asarray(b), WEIGHTS)
        assert decoded.dtype == dtype
        np.testing.assert_allclose(decoded, coder.decode_single(torch.tensor(deltas), tb), **close)
        clipped = box_ops.clip_boxes(jnp.asarray(a), jnp.array([600, 700]))
        np.testing.assert_array_equal(clipped, torchvision.ops.clip_boxes_to_image(ta, (600, 700)))


def test_overlaps_row_by_row_coverage_and_their_gradients_equal_torchvisions():
    rng = np.random.default_rng(5)
    a = random_boxes(rng, 60)
    b = a + rng.normal(size=a.shape) * 20  # near enough to overlap, most of them
    b[:5] += 2000  # apart
    ta, tb = torch.tensor(a, requires_grad=True), torch.tensor(b)
    with jax.enable_x64(True):
        close = TOLERANCES["float64"]
        np.testing.assert_allclose(box_ops.box_area(jnp.asarray(a)), torchvision.ops.box_area(ta).detach(), **close)
        for ours, theirs in (
            (box_ops.paired_iou, torchvision.ops.box_iou),
            (box_ops.paired_giou, torchvision.ops.generalized_box_iou),
        ):
            expected = torch.diagonal(theirs(ta, tb))
            (gradient,) = torch.autograd.grad(expected.sum(), ta)
            np.testing.assert_allclose(ours(jnp.asarray(a), jnp.asarray(b)), expected.detach(), **close)
            ours_gradient = jax.grad(lambda a, ours=ours: jnp.sum(ours(a, jnp.asarray(b))))(jnp.asarray(a))
            np.testing.assert_allclose(ours_gradient, gradient, **close)
        iou = torchvision.ops.box_iou(ta, tb).detach()
        areas = torchvision.ops.box_area(ta).detach()[:, None], torchvision.ops.box_area(tb)[None, :]
        intersection = iou * sum(areas) / (1 + iou)
        np.testing.assert_allclose(
            box_ops.box_coverage(jnp.asarray(a), jnp.asarray(b)), intersection / areas[0], **close
        )


def torch_anchors(image_shape, feature_shapes, sizes=SIZES, scales=(1,)):
    generator = AnchorGenerator(tuple(tuple(s * k for k in scales) for s in sizes), (RATIOS,) * len(sizes))
    features = [torch.zeros(1, 1, *shape) for shape in feature_shapes]
    return generator(ImageList(torch.zeros(1, 3, *image_shape), [image_shape]), features)[0].numpy()


@pytest.mark.parametrize("image_shape", [(800, 1088), (800, 1344), (1344, 800), (832, 832), (64, 96), (96, 160)])
def test_anchors_equal_torchvisions_bit_for_bit(image_shape):
    """Among them 800 x 1088, whose P6 has 13 rows and so a stride of 61."""
    shapes = [tuple(-(-side // 2**level) for side in image_shape) for level in range(2, 7)]
    for scales in ((1.0,), (1.0, 1.26, 1.587)):
        ours = np.concatenate(grid_anchors(image_shape, shapes, SIZES, RATIOS, scales=scales))
        np.testing.assert_array_equal(ours, torch_anchors(image_shape, shapes, scales=scales))


@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize("far_object", [False, True])
def test_matches_equal_torchvisions_also_for_an_object_that_overlaps_nothing(low_quality, far_object):
    rng = np.random.default_rng(1)
    boxes = random_boxes(rng, 300, 100, "float32")
    gt = np.concatenate([random_boxes(rng, 4, 100, "float32"), boxes[:2]])
    if far_object:
        gt = np.concatenate([gt, np.array([[5000, 5000, 5010, 5010]], np.float32)])
    matcher = det_utils.Matcher(0.7, 0.3, allow_low_quality_matches=low_quality)
    expected = matcher(torchvision.ops.box_iou(torch.tensor(gt), torch.tensor(boxes)))
    options = {"high_threshold": 0.7, "low_threshold": 0.3, "allow_low_quality": low_quality}
    ours = match(jnp.asarray(boxes), jnp.asarray(gt), jnp.ones(len(gt), bool), **options)
    np.testing.assert_array_equal(ours, expected)
    assert len(np.unique(expected)) > 2, "the case is trivial"


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("ties", [False, True])
def test_suppression_keeps_the_boxes_that_torchvision_keeps(threshold, ties):
    rng = np.random.default_rng(2)
    boxes = random_boxes(rng, 200, 100, "float32")
    scores = rng.random(200, np.float32)
    if ties:
        scores, boxes = np.round(scores, 1), np.round(boxes / 10) * 10
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 10)
    order = np.argsort(-scores, kind="stable")
    keep = nms(jnp.asarray(boxes[order]), jnp.ones(200, bool), iou_threshold=threshold)
    expected = torchvision.ops.nms(torch.tensor(boxes), torch.tensor(scores), threshold)
    np.testing.assert_array_equal(order[np.asarray(keep)], expected)


def test_suppression_within_classes_picks_what_torchvision_keeps():
    rng = np.random.default_rng(4)
    boxes = random_boxes(rng, 90, 100, "float32").reshape(30, 3, 4)
    scores = rng.permutation(np.linspace(0, 1, 90, dtype=np.float32)).reshape(30, 3)
    picks = class_nms(jnp.asarray(boxes), jnp.asarray(scores), iou_threshold=0.4, score_threshold=0.05, max_picks=100)
    flat, classes = scores.reshape(-1), np.tile(np.arange(3), 30)
    rows = np.flatnonzero(flat > 0.05)
    keep = torchvision.ops.batched_nms(
        *(torch.tensor(values[rows]) for values in (boxes.reshape(-1, 4), flat, classes)), 0.4
    )
    expected = rows[keep]
    assert 10 < len(expected) < 80, "the case is trivial"
    assert picks.valid.sum() == len(expected)
    np.testing.assert_array_equal(picks.box_index[picks.valid] * 3 + picks.class_index[picks.valid], expected)


@pytest.mark.parametrize("post_nms_top_n", [30, 1000])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_proposals_equal_those_of_torchvisions_region_proposal_network(post_nms_top_n, dtype):
    """Suppression per level, top-k before and after it, clipping and the minimum side, of one unpadded size."""
    rng = np.random.default_rng(3)
    image_shape, shapes, sizes = (96, 128), [(24, 32), (12, 16), (6, 8), (3, 4), (2, 2)], (8, 16, 32, 64, 96)
    anchors = grid_anchors(image_shape, shapes, sizes, RATIOS)
    counts = [len(level) for level in anchors]
    deltas = (rng.normal(size=(sum(counts), 4)) * 0.3).astype(dtype)
    deltas[::17, 0] = 40.0  # far beyond the border: clipped to nothing
    # Distinct after the sigmoid too, by which torchvision ranks.
    objectness = rng.permutation(np.linspace(-4, 4, sum(counts))).astype(dtype)
    size = (90, 120)
    rpn = RegionProposalNetwork(
        None,
        None,
        0.7,
        0.3,
        256,
        0.5,
        {"testing": 100, "training": 1},
        {"testing": post_nms_top_n, "training": 1},
        0.6,
    ).eval()
    decoded = rpn.box_coder.decode(torch.tensor(deltas), [torch.tensor(np.concatenate(anchors).astype(dtype))])
    boxes, scores = rpn.filter_proposals(decoded.reshape(1, -1, 4), torch.tensor(objectness)[None], [size], counts)
    splits = np.cumsum(counts)[:-1]
    with jax.enable_x64(dtype == "float64"):
        select = jax.jit(
            lambda o, d: select_proposals(
                o,
                d,
                anchors,
                jnp.array(size),
                pre_nms_top_n=100,
                post_nms_top_n=post_nms_top_n,
                nms_thresh=0.6,
                min_size=1e-3,
            )
        )
        ours = select(np.split(objectness, splits), np.split(deltas, splits))
        assert ours.boxes.dtype == dtype
        valid = np.asarray(ours.valid)
        assert valid.sum() == len(boxes[0])
        assert np.all(valid[: valid.sum()]), "invalid rows are not last"
        np.testing.assert_allclose(np.asarray(ours.boxes)[valid], boxes[0], **TOLERANCES[dtype])
        np.testing.assert_allclose(jax.nn.sigmoid(ours.scores)[valid], scores[0], **TOLERANCES[dtype])
