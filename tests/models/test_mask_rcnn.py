"""The whole network: sizes, terms, batch sizes, dtypes, compilation, several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maskrcnn_jax.models.layers import FrozenStatistics
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.models.proposals import limit_proposals
from maskrcnn_jax.ops.matching import BACKGROUND, IGNORED
from maskrcnn_jax.options import ModelOptions
from maskrcnn_jax.structures import GroundTruth, Proposals
from tests.models.tiny import NUM_CLASSES, SIDE, all_finite, compiled, tiny_batch, tiny_model
from tests.programs import equations

TERMS = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}


def count(model, kind):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, kind)))


@pytest.mark.parametrize(
    ("norm", "num_parameters"),
    [
        ("frozen", 44_401_393),  # torchvision's maskrcnn_resnet50_fpn with pretrained weights
        ("batch", 44_454_513),  # the same without: 26,560 channels of norms have a scale and a bias
    ],
)
def test_the_full_model_has_as_many_parameters_as_torchvisions(norm, num_parameters):
    model = nnx.eval_shape(lambda: MaskRCNN(options=ModelOptions(norm=norm), rngs=nnx.Rngs(0)))
    assert count(model, nnx.Param) == num_parameters


def test_frozen_statistics_are_no_parameters(tiny):
    assert count(tiny, FrozenStatistics) > 0
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(tiny, nnx.Param))]
    assert paths
    assert not [path for path in paths if "norm" in path]


@pytest.mark.slow
def test_every_stage_has_the_documented_shape():
    model = nnx.eval_shape(lambda: MaskRCNN(rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((2, 800, 1088, 3), jnp.uint8)
    sizes = jax.ShapeDtypeStruct((2, 2), jnp.int32)

    def stages(state, images, sizes):
        model = nnx.merge(graph, state)
        backbone = model.backbone(model.normalize(images, sizes))
        features = model.fpn(backbone)
        objectness, deltas = model.rpn(features)
        anchors = model.anchors(features, (800, 1088))
        proposals = model.propose(objectness, deltas, anchors, sizes, train=True)
        return backbone, features, objectness, deltas, anchors, proposals, model.detect(images, sizes)

    backbone, features, objectness, deltas, anchors, proposals, detections = jax.eval_shape(
        stages, state, images, sizes
    )
    grids = [(200, 272), (100, 136), (50, 68), (25, 34), (13, 17)]
    assert [f.shape for f in backbone] == [
        (2, h, w, k) for (h, w), k in zip(grids[:4], (256, 512, 1024, 2048), strict=True)
    ]
    assert [f.shape for f in features] == [(2, h, w, 256) for h, w in grids]
    assert [o.shape for o in objectness] == [(2, h * w * 3) for h, w in grids]
    assert [d.shape for d in deltas] == [(2, h * w * 3, 4) for h, w in grids]
    assert [a.shape for a in anchors] == [(h * w * 3, 4) for h, w in grids]
    assert [p.shape for p in proposals] == [(2, 2000, 4), (2, 2000), (2, 2000)]
    assert [d.shape for d in detections] == [(2, 100, 4), (2, 100), (2, 100), (2, 100, 28, 28), (2, 100)]


def test_an_unknown_backbone_or_norm_is_named_with_the_choices():
    with pytest.raises(ValueError, match="resnet7.*resnet50"):
        tiny_model(backbone="resnet7")
    with pytest.raises(ValueError, match="norm is 'layer'; use one of batch, frozen, group"):
        tiny_model(norm="layer")


def test_losses_have_five_finite_terms_and_gradients_reach_every_parameter(tiny_functions, key):
    terms, metrics, gradients = tiny_functions[0](tiny_batch(), key)
    assert set(terms) == TERMS
    assert set(metrics) == {"num_foreground", "accuracy", "accuracy_foreground"}
    assert all(term.shape == () and term.dtype == jnp.float32 for term in terms.values())
    assert all_finite((terms, metrics, gradients))
    silent = {path[:3] for path, gradient in nnx.to_flat_state(gradients) if not np.any(gradient[...])}
    # Small images have no large RoIs, and too few anchors on P5 and P6 for the sample to hit one for certain.
    assert silent <= {("fpn", "layer", 3)}


def test_losses_of_a_batch_without_ground_truth_are_refused(tiny, key):
    with pytest.raises(ValueError, match="need a batch with ground truth"):
        tiny.losses(tiny_batch()._replace(gt=None), key)


def test_every_image_has_draws_of_its_own_and_none_of_what_is_ignored(tiny, key):
    matches = jnp.array([[IGNORED, BACKGROUND, 0, BACKGROUND] * 50] * 2)
    sample = tiny.sample_anchors(key, matches)
    assert bool(sample.valid.all())
    assert not np.array_equal(sample.index[0], sample.index[1])
    drawn = np.take_along_axis(matches, sample.index, axis=1)
    np.testing.assert_array_equal(drawn, np.where(sample.foreground, 0, BACKGROUND))


@pytest.mark.slow
def test_objects_without_a_mask_train_boxes_only(tiny, key):
    losses = compiled(tiny)[0]
    batch = tiny_batch()
    has_mask = np.array([[True, False, True], [False, False, False]])

    def of(has_mask, masks):
        return losses(batch._replace(gt=batch.gt._replace(has_mask=has_mask, masks=masks)), key)

    terms, _, gradients = of(has_mask, batch.gt.masks)
    changed = np.where(has_mask[..., None, None], batch.gt.masks, 255 - batch.gt.masks)
    others = of(has_mask, changed)[0]
    everything = of(np.ones_like(has_mask), batch.gt.masks)[0]
    for name in TERMS:
        np.testing.assert_array_equal(terms[name], others[name])
        assert name == "loss_mask" or float(terms[name]) == pytest.approx(float(everything[name]), rel=1e-6)
    assert float(terms["loss_mask"]) != pytest.approx(float(everything["loss_mask"]), rel=1e-3)
    nothing, _, gradients = of(np.zeros_like(has_mask), batch.gt.masks)
    assert float(nothing["loss_mask"]) == 0
    assert all_finite(gradients)
    assert not any(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(gradients["mask_head"]))


@pytest.mark.slow
def test_regions_are_neither_object_nor_background(tiny, key):
    batch = tiny_batch()
    # The last row of an image is no object; here it is a region: the left half of the first image.
    boxes = batch.gt.boxes.copy()
    boxes[0, 2] = [0, 0, SIDE / 2, SIDE]
    ignored = np.array([[False, False, True], [False, False, False]])
    plain = GroundTruth(
        jnp.asarray(boxes), jnp.asarray(batch.gt.labels), None, None, None, jnp.asarray(batch.gt.valid)
    )
    with_region = plain._replace(ignored=jnp.asarray(ignored))
    fixed = np.array([[2, 2, 18, 18], [40, 40, 60, 60], [24, 0, 40, 16], [20, 0, 45, 20]], np.float32)
    # With the objects' own boxes among the anchors, no object takes another for want of a better.
    anchors = jnp.concatenate([*boxes[:, :2], fixed])
    matches, regarded = (np.asarray(tiny.match_anchors([anchors], gt)) for gt in (plain, with_region))
    inside = np.clip(np.asarray(anchors)[:, [0, 2]], 0, SIDE / 2)
    half = inside[:, 1] - inside[:, 0] >= (anchors[:, 2] - anchors[:, 0]) / 2
    covered = np.stack([half, np.zeros_like(half)])
    assert (matches == BACKGROUND)[covered].any()
    np.testing.assert_array_equal(regarded, np.where((matches == BACKGROUND) & covered, IGNORED, matches))

    proposals = Proposals(jnp.stack([fixed] * 2), jnp.zeros((2, 4)), jnp.ones((2, 4), bool))
    rois = tiny.sample_rois(key, proposals, with_region)
    first = np.asarray(rois.valid & (rois.labels == 0))[0]
    assert first.any()
    drawn = np.asarray(rois.boxes)[0][first]
    assert not (drawn[:, 2] <= SIDE / 2).any(), "a box inside the region was taken for background"


@pytest.mark.slow
def test_the_losses_of_the_heads_do_not_train_the_rpn(key):
    """Proposals are given to the second stage, as in torchvision; otherwise its box offsets would move them."""
    # At this threshold the first proposals are foreground, not only the annotated boxes.
    graph, params, rest = nnx.split(tiny_model(box_fg_iou_thresh=0.01), nnx.Param, ...)

    @jax.jit
    @jax.grad
    def gradient(params, batch):
        terms, _ = nnx.merge(graph, params, rest).losses(batch, key)
        return terms["loss_classifier"] + terms["loss_box_reg"] + terms["loss_mask"]

    gradients = gradient(params, tiny_batch())
    assert not any(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(gradients["rpn"]))
    assert all(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(gradients["box_head"]))


def test_the_same_key_gives_the_same_bits_and_another_key_another_draw(tiny_functions, key):
    losses, batch = tiny_functions[0], tiny_batch()
    first, again, other = losses(batch, key)[0], losses(batch, key)[0], losses(batch, jax.random.key(1))[0]
    for name in TERMS:
        np.testing.assert_array_equal(first[name], again[name])
    assert any(float(first[name]) != float(other[name]) for name in TERMS)


@pytest.mark.parametrize("batch_size", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_detect_runs_at_any_batch_size_and_each_image_is_on_its_own(tiny_functions, batch_size):
    images = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)[:batch_size]
    sizes = np.array([[64, 64], [50, 64], [33, 40]], np.int32)[:batch_size]
    detections = tiny_functions[1](images, sizes)
    assert detections.boxes.shape == (batch_size, 6, 4)
    assert all_finite(detections)
    assert bool(detections.valid.any())
    valid = np.asarray(detections.valid)
    assert np.all(np.diff(np.where(valid, detections.scores, -1), axis=1) <= 0), "not best first"
    labels = np.asarray(detections.labels)[valid]
    assert labels.min() >= 1
    assert labels.max() < NUM_CLASSES
    assert np.all(np.asarray(detections.boxes) <= sizes[:, None, [1, 0, 1, 0]])
    assert float(detections.masks.min()) >= 0
    assert float(detections.masks.max()) <= 1
    alone = tiny_functions[1](images[:1], sizes[:1])
    # Another batch size may block convolutions differently.
    np.testing.assert_allclose(detections.boxes[:1], alone.boxes, atol=1e-3)
    np.testing.assert_allclose(detections.scores[:1], alone.scores, atol=1e-5)


def test_nothing_is_compiled_after_the_first_call(tiny_functions, key):
    losses, detect, jitted_losses, jitted_detect = tiny_functions[:4]
    for function, jitted, calls in (
        (losses, jitted_losses, [(tiny_batch(seed=i), jax.random.key(i)) for i in range(3)]),
        (detect, jitted_detect, [(tiny_batch(seed=i).images, tiny_batch().sizes - i) for i in range(3)]),
    ):
        function(*calls[0])
        after_warm_up = jitted._cache_size()
        for arguments in calls[1:]:
            function(*arguments)
        assert jitted._cache_size() == after_warm_up


@pytest.mark.slow
def test_float16_adds_up_no_more_than_a_few_numbers():
    """Beside matrix products and convolutions, in which XLA sums in float32."""
    graph, params, rest = nnx.split(tiny_model(dtype="float16", norm="batch"), nnx.Param, ...)

    def loss(params):
        model = nnx.merge(graph, params, rest, copy=True)
        return sum(model.losses(tiny_batch(), jax.random.key(0))[0].values())

    sums, scattered, other = [], [], set()
    for equation in equations(jax.make_jaxpr(jax.grad(loss))(params).jaxpr):
        operand = next(iter(equation.invars), None)
        if getattr(getattr(operand, "aval", None), "dtype", None) != jnp.float16:
            continue
        if equation.primitive.name == "reduce_sum":
            sums.append(operand.aval.size // equation.outvars[0].aval.size)
        if equation.primitive.name == "scatter-add":
            scattered.append(operand.aval.shape)
        else:
            other.add(equation.primitive.name)
    assert sums, "upsampling adds up two cells in its gradient"
    assert max(sums) == 2
    # The gradient of the RPN's offsets alone; the sampled anchors differ, so nothing but zeros is added there.
    (shape,) = scattered
    assert shape[-1] == 4
    assert not other & {"exp", "log", "logistic", "rsqrt", "sqrt", "integer_pow", "square", "cumsum"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_losses_and_detections_run_in_other_dtypes(dtype):
    with jax.enable_x64(dtype == "float64"):
        losses, detect, *_, params, _ = compiled(tiny_model(dtype=dtype))
        batch = tiny_batch()
        wide = jnp.float64 if dtype == "float64" else jnp.float32
        terms, metrics, gradients = losses(batch, jax.random.key(0))
        assert all(leaf.dtype == wide for leaf in jax.tree.leaves((params, gradients, terms)))
        assert all_finite((terms, metrics, gradients))
        detections = detect(batch.images, batch.sizes)
        assert detections.boxes.dtype == wide
        assert all_finite(detections)


@pytest.mark.slow
@pytest.mark.parametrize("box_loss", ["iou", "giou"])
def test_the_second_set_of_losses_trains_with_and_without_objects(box_loss, key):
    model = tiny_model(classification_loss="focal", box_loss=box_loss, mask_loss="dice")
    losses, detect, losses_of, *_ = compiled(model)
    batch = tiny_batch()
    terms, _, gradients = losses(batch, key)
    assert all(float(terms[name]) > 0 for name in TERMS)
    assert all_finite((terms, gradients))
    assert np.any(gradients["mask_head"]["logits_kernel"][...])
    none = batch._replace(gt=batch.gt._replace(valid=np.zeros_like(batch.gt.valid)))
    terms, _, gradients = losses(none, key)
    assert all_finite((terms, gradients))
    assert float(terms["loss_box_reg"]) == float(terms["loss_mask"]) == 0
    # A RoI counts as background where no class is more likely than not, whatever the logit of background.
    model.box_head.cls_score.kernel[...] *= 0
    for logits, is_background in ([-5.0, -1, -2, -2, -2], True), ([5.0, 1, -2, -2, -2], False):
        model.box_head.cls_score.bias[...] = jnp.array(logits)
        _, params, rest = nnx.split(model, nnx.Param, ...)
        metrics = losses_of(params, rest, batch, key)[1]
        background = 1 - metrics["num_foreground"] / 16
        if is_background:
            assert float(metrics["accuracy"]) == pytest.approx(float(background))
            assert 0 < background < 1 and not metrics["accuracy_foreground"]
        else:
            assert float(metrics["accuracy"]) <= 1 - background
    # Classes that decide for themselves may all be likely at once.
    images, sizes = jnp.asarray(batch.images), jnp.asarray(batch.sizes)
    logits, deltas = jnp.full((2, 20, NUM_CLASSES), 3.0), jnp.zeros((2, 20, NUM_CLASSES, 4))
    proposals = Proposals(
        jnp.tile(jnp.array([4.0, 4, 40, 40]), (2, 20, 1)), jnp.ones((2, 20)), jnp.ones((2, 20), bool)
    )
    scores = model.select(logits, deltas, proposals, sizes)[1]
    np.testing.assert_allclose(scores[:, : NUM_CLASSES - 1], jax.nn.sigmoid(3.0), rtol=1e-6)
    assert all_finite(detect(images, sizes))


@pytest.mark.slow
def test_the_network_of_the_paper_trains_and_detects(key):
    """Sec. 2.2 to 2.6: annotated boxes first, nine anchors, a wider RPN, a mask head of five convolutions; RoIPool."""
    model = tiny_model(
        train_proposals="gt_then_rpn",
        min_proposals=15,
        anchor_scales=(1.0, 1.26, 1.587),
        rpn_channels=24,
        mask_deconv=False,
        roi_operator="pool",
    )
    losses, detect, *_ = compiled(model)
    batch = tiny_batch()
    terms, _, gradients = losses(batch, key)
    assert all_finite((terms, gradients))
    assert all(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(gradients))
    assert gradients["rpn"]["cls_logits"]["kernel"][...].shape[-2:] == (24, 9)
    found = detect(batch.images, batch.sizes)
    assert found.masks.shape[-2:] == (14, 14)
    assert bool(found.valid.any())


@pytest.mark.parametrize(
    ("source", "num_gt", "expected"),
    [("rpn", 2, 6), ("gt", 2, 0), ("gt_then_rpn", 2, 3), ("gt_then_rpn", 0, 5), ("gt_then_rpn", 7, 0)],
)
def test_proposals_fill_what_the_annotated_boxes_leave(source, num_gt, expected):
    proposals = Proposals(jnp.ones((8, 4)), jnp.arange(8.0)[::-1], jnp.arange(8) < 6)
    gt = GroundTruth(jnp.ones((9, 4)), jnp.ones(9, int), None, None, None, jnp.arange(9) < num_gt)
    valid = limit_proposals(proposals, gt, source=source, min_proposals=5).valid
    np.testing.assert_array_equal(valid, np.arange(8) < expected)


@pytest.mark.slow
def test_one_box_for_all_classes_is_a_box_for_each_that_is_the_same(key):
    """Losses, detections and gradients equal those of a network that predicts the one box for every class."""
    agnostic, specific = tiny_model(cls_agnostic_bbox_reg=True), tiny_model()
    nnx.update(specific, nnx.state(agnostic, lambda path, _: "bbox_pred" not in path or "rpn" in path))
    one, each = agnostic.box_head.bbox_pred, specific.box_head.bbox_pred
    assert one.kernel.shape == (32, 4)
    each.kernel[...], each.bias[...] = jnp.tile(one.kernel[...], NUM_CLASSES), jnp.tile(one.bias[...], NUM_CLASSES)
    batch, results = tiny_batch(), []
    for model in (agnostic, specific):
        losses, detect = compiled(model)[:2]
        results.append((*losses(batch, key), detect(batch.images, batch.sizes)))
    (ours, _, gradients, found), (theirs, _, of_each, wanted) = results
    for a, b in zip(jax.tree.leaves((ours, found)), jax.tree.leaves((theirs, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    bias = of_each.box_head.bbox_pred.bias[...].reshape(NUM_CLASSES, 4).sum(axis=0)
    np.testing.assert_allclose(gradients.box_head.bbox_pred.bias[...], bias, rtol=1e-4, atol=1e-7)
    assert float(jnp.abs(bias).max()) > 0


def test_the_focal_loss_starts_with_every_class_unlikely():
    options = ModelOptions(backbone="resnet18", box_fc_channels=(8, 8), classification_loss="focal")
    model = MaskRCNN(5, options, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(jax.nn.sigmoid(model.box_head.cls_score.bias[...]), 0.01, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "scores", "labels"),
    [
        # The second box is the upper half of the first one. Softmax of two classes and background.
        ({}, [0.8, 0.6, 0.3, 0.1], [1, 1, 2, 2]),
        ({"box_nms_thresh": 0.4}, [0.8, 0.3], [1, 2]),
        ({"box_nms_thresh": 0.4, "box_nms_method": "linear"}, [0.8, 0.3, 0.3, 0.05], [1, 1, 2, 2]),
        ({"box_nms_method": "gaussian", "box_nms_sigma": 1.0}, [0.8, 0.6 * 0.7788, 0.3, 0.1 * 0.7788], [1, 1, 2, 2]),
        ({"box_nms_class_agnostic": True}, [0.8, 0.6], [1, 1]),
    ],
)
def test_options_choose_how_duplicates_are_suppressed(changes, scores, labels):
    model = tiny_model(num_classes=3, box_score_thresh=0.04, **changes)
    logits = jnp.log(jnp.array([[[0.1, 0.8, 0.1], [0.1, 0.6, 0.3]]]))
    proposals = Proposals(jnp.array([[[0.0, 0, 40, 40], [0.0, 0, 40, 20]]]), jnp.ones((1, 2)), jnp.ones((1, 2), bool))
    _, found, classes, valid = model.select(logits, jnp.zeros((1, 2, 3, 4)), proposals, jnp.array([[64, 64]]))
    number = int(valid.sum())
    np.testing.assert_allclose(found[0, :number], scores, rtol=1e-4)
    assert classes[0, :number].tolist() == labels


@pytest.mark.slow
def test_trained_norms_update_their_running_statistics_in_training_only():
    model = tiny_model(norm="batch")
    before = model.backbone.stem.norm.mean[...]

    @nnx.jit
    def losses(model, batch, key):
        return sum(model.losses(batch, key)[0].values())

    model.eval()
    losses(model, tiny_batch(), jax.random.key(0))
    np.testing.assert_array_equal(model.backbone.stem.norm.mean[...], before)
    model.train()
    assert bool(jnp.isfinite(losses(model, tiny_batch(), jax.random.key(0))))
    assert float(jnp.abs(model.backbone.stem.norm.mean[...] - before).max()) > 0
