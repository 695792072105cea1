"""Weights of torchvision and detectron2 in and out of our models, strictly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maskrcnn_jax.config import load_config, to_options
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.options import ModelOptions
from maskrcnn_jax.weights import detectron2
from maskrcnn_jax.weights.convert import load_weights, to_torchvision
from maskrcnn_jax.weights.torchvision import without_counterpart
from tests.models.tiny import tiny_batch, tiny_model

NARROW = {
    "backbone": "resnet50",
    "stem_channels": 4,
    "stage_channels": 8,
    "bottleneck_channels": 4,
    "box_fc_channels": (12, 12),
}
V2 = {
    "norm": "batch",
    "head_norm": "batch",
    "rpn_conv_depth": 2,
    "box_conv_channels": (6, 7, 6, 5),
    "box_fc_channels": (12,),
}


def narrow_model(**options) -> MaskRCNN:
    return tiny_model(**(NARROW | options))


def without_memory(num_classes: int, config: str) -> MaskRCNN:
    """Build the model of a config whose arrays are views of one zero."""
    options = to_options(load_config(config)).model
    model = nnx.eval_shape(lambda: MaskRCNN(num_classes, options, rngs=nnx.Rngs(0)))
    nnx.update(model, jax.tree.map(lambda a: np.broadcast_to(np.zeros((), a.dtype), a.shape), nnx.state(model)))
    return model


def state(model) -> dict:
    return {path: np.asarray(variable[...]) for path, variable in nnx.to_flat_state(nnx.state(model))}


def other_values(arrays: dict, seed: int = 1) -> dict:
    """Return arrays of the same names, shapes and dtypes with random values."""
    rng = np.random.default_rng(seed)
    return {
        key: (rng.integers(0, 1000, a.shape) if a.dtype.kind == "i" else rng.normal(size=a.shape)).astype(a.dtype)
        for key, a in arrays.items()
    }


MOBILENET = {"backbone": "mobilenet_v3_large"}


@pytest.mark.parametrize("options", [{}, V2, MOBILENET], ids=["v1", "v2", "mobilenet"])
def test_a_state_dict_goes_in_and_out_bit_for_bit(options):
    model = narrow_model(**options)
    arrays = other_values(to_torchvision(model))
    report = load_weights(model, arrays)
    assert sorted(report.loaded) == sorted(arrays)
    assert not (report.reinitialised or report.untouched or report.ignored)
    out = to_torchvision(model)
    assert list(out) and out.keys() == arrays.keys()
    for key, array in arrays.items():
        assert out[key].dtype == array.dtype
        assert out[key].tobytes() == array.tobytes(), key


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, MOBILENET], ids=["resnet", "mobilenet"])
def test_an_exported_backbone_starts_another_model(options):
    model, other = narrow_model(**options), narrow_model(**options)
    arrays = other_values(to_torchvision(model, backbone_only=True))
    report = load_weights(other, arrays, partial=True)
    assert sorted(report.loaded) == sorted(arrays)
    assert {path.split("/")[0] for path in report.untouched} == {"fpn", "rpn", "box_head", "mask_head"}
    out = to_torchvision(other, backbone_only=True)
    assert all(np.array_equal(out[key], arrays[key]) for key in arrays)


def test_loading_copies_the_arrays():
    """torch changes its parameters in place; a model that shared their memory would change with them."""
    model = narrow_model()
    arrays = other_values(to_torchvision(model))
    load_weights(model, arrays)
    before = to_torchvision(model)
    for array in arrays.values():
        array[...] = 0
    after = to_torchvision(model)
    assert all(np.array_equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("config", "build", "num_parameters"),
    [
        ("torchvision_r50_fpn", "maskrcnn_resnet50_fpn", 44_401_393),
        ("torchvision_r50_fpn_v2", "maskrcnn_resnet50_fpn_v2", 46_359_409),
    ],
)
def test_the_configs_have_torchvisions_arrays_by_name_shape_and_number(config, build, num_parameters):
    torch = pytest.importorskip("torch")
    from tools.torchvision_reference import import_torchvision

    torchvision = import_torchvision()
    with torch.device("meta"):
        reference = getattr(torchvision.models.detection, build)(weights=None, weights_backbone=None).state_dict()
    model = without_memory(91, config)
    counted = [p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param))]
    # A frozen norm's 26,560 pairs are no parameters of ours; torchvision counts its own likewise.
    assert sum(counted) == num_parameters
    ours = {key: array.shape for key, array in to_torchvision(model).items()}
    frozen = config == "torchvision_r50_fpn"  # without pretrained weights torchvision builds batch norms instead
    theirs = {k: tuple(t.shape) for k, t in reference.items() if not (frozen and k.endswith("num_batches_tracked"))}
    assert ours == theirs


@pytest.mark.parametrize(
    "options", [{}, V2, MOBILENET, MOBILENET | {"norm": "batch"}], ids=["v1", "v2", "mobilenet", "trained_norms"]
)
def test_an_exported_model_loads_strictly_into_torchvision(options):
    torch = pytest.importorskip("torch")
    from tools.torchvision_reference import build_reference

    model = narrow_model(**options)
    arrays = to_torchvision(model)
    config = load_config("torchvision_r50_fpn_v2" if options is V2 else "torchvision_r50_fpn").model.to_dict()
    config |= NARROW | {"norm_eps": 1e-5, "fpn_channels": 16, "mask_channels": 16} | options
    reference = build_reference(ModelOptions(**config), 5)
    reference.load_state_dict({key: torch.tensor(array) for key, array in arrays.items()}, strict=True)


def test_the_old_names_of_the_first_version_are_understood():
    model = narrow_model()
    arrays = other_values(to_torchvision(model))
    old = {}
    for key, array in arrays.items():
        key = key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        for i in range(4):
            key = key.replace(f"fpn.inner_blocks.{i}.0.", f"fpn.inner_blocks.{i}.")
            key = key.replace(f"fpn.layer_blocks.{i}.0.", f"fpn.layer_blocks.{i}.")
            key = key.replace(f"mask_head.{i}.0.", f"mask_head.mask_fcn{i + 1}.")
        old[key] = array
    assert sum(key not in arrays for key in old) == 16 + 2 + 8
    old["backbone.body.bn1.num_batches_tracked"] = np.array(7)
    report = load_weights(model, old)
    assert report.ignored == ["backbone.body.bn1.num_batches_tracked"]
    out = to_torchvision(model)
    assert all(np.array_equal(out[key], arrays[key]) for key in arrays)


def test_all_mismatches_are_reported_together_and_nothing_is_changed():
    model = narrow_model()
    before = state(model)
    arrays = other_values(to_torchvision(model))
    del arrays["rpn.head.cls_logits.bias"]
    arrays["backbone.body.conv1.weight"] = arrays["backbone.body.conv1.weight"][:, :, :5, :5]
    arrays["roi_heads.extra"] = np.zeros(3)
    with pytest.raises(UserError) as error:
        load_weights(model, arrays, source="some.pth")
    said = str(error.value)
    assert "some.pth: 3 arrays do not fit" in said
    assert "rpn.head.cls_logits.bias is missing" in said
    assert "backbone.body.conv1.weight has shape (4, 3, 5, 5) instead of (4, 3, 7, 7)" in said
    assert "roi_heads.extra is unknown" in said
    after = state(model)
    assert all(np.array_equal(before[path], after[path]) for path in before)


def test_other_classes_reinitialise_the_three_predictors_and_nothing_else():
    arrays = other_values(to_torchvision(narrow_model(num_classes=9)))
    model = narrow_model()
    before = state(model)
    with pytest.raises(UserError, match="another number of classes"):
        load_weights(model, arrays)
    report = load_weights(model, arrays, partial=True)
    predictors = ["box_predictor.cls_score", "box_predictor.bbox_pred", "mask_predictor.mask_fcn_logits"]
    assert sorted(report.reinitialised) == sorted(
        f"roi_heads.{name}.{leaf}" for name in predictors for leaf in ("weight", "bias")
    )
    assert "re-initialised     6" in str(report)
    after = state(model)
    kept = {path for path in after if np.array_equal(before[path], after[path])}
    assert kept == {
        ("box_head", "cls_score", "kernel"),
        ("box_head", "cls_score", "bias"),
        ("box_head", "bbox_pred", "kernel"),
        ("box_head", "bbox_pred", "bias"),
        ("mask_head", "logits_kernel"),
        ("mask_head", "logits_bias"),
    }


@pytest.mark.slow
def test_predictors_of_other_classes_must_be_whole_and_fit_each_other():
    arrays = other_values(to_torchvision(narrow_model(num_classes=9)))
    del arrays["roi_heads.mask_predictor.mask_fcn_logits.bias"]
    arrays["roi_heads.box_predictor.bbox_pred.bias"] = np.zeros(35, np.float32)
    with pytest.raises(UserError) as error:
        load_weights(narrow_model(), arrays, partial=True)
    said = str(error.value)
    assert "2 arrays do not fit" in said
    assert "roi_heads.mask_predictor.mask_fcn_logits.bias is missing" in said
    assert "roi_heads.box_predictor.bbox_pred.bias has shape (35,) instead of (36,)" in said


def test_an_array_by_its_old_and_its_new_name_is_refused():
    arrays = other_values(to_torchvision(narrow_model()))
    arrays["rpn.head.conv.weight"] = arrays["rpn.head.conv.0.0.weight"] + 1
    with pytest.raises(UserError, match=r"rpn\.head\.conv\.0\.0\.weight twice"):
        load_weights(narrow_model(), arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a * 1j, "dtype complex64 where floats"),
        (lambda a: a.astype(np.int8), "dtype int8 where floats"),
        (lambda a: np.full_like(a, np.nan), "not finite in float32"),
        (lambda a: np.full(a.shape, 1e300), "not finite in float32"),
    ],
)
def test_weights_that_would_be_changed_are_refused(change, message):
    model = narrow_model()
    arrays = other_values(to_torchvision(model))
    arrays["backbone.body.conv1.weight"] = change(arrays["backbone.body.conv1.weight"])
    with pytest.raises(UserError, match=message):
        load_weights(model, arrays)


def test_a_counter_that_does_not_fit_is_refused():
    model = narrow_model(**V2)
    arrays = other_values(to_torchvision(model))
    arrays["backbone.body.bn1.num_batches_tracked"] = np.array(2**31)
    with pytest.raises(UserError, match="num_batches_tracked holds numbers that do not fit int32"):
        load_weights(model, arrays)


def test_a_backbone_fills_the_backbone_and_is_not_enough_to_detect_with():
    model = narrow_model()
    arrays = {
        key.removeprefix("backbone.body."): array
        for key, array in other_values(to_torchvision(model)).items()
        if key.startswith("backbone.body.")
    }
    arrays |= {"fc.weight": np.zeros((10, 64)), "fc.bias": np.zeros(10)}
    with pytest.raises(UserError, match="only a backbone"):
        load_weights(model, arrays)
    report = load_weights(model, arrays, partial=True)
    assert sorted(report.ignored) == ["fc.bias", "fc.weight"]
    assert all(not name.startswith("backbone") for name in report.untouched)
    out = to_torchvision(model)
    assert all(np.array_equal(out[f"backbone.body.{key}"], arrays[key]) for key in arrays if "fc" not in key)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["torchvision", "mobilenet", "detectron2"])
def test_weights_of_rgb_fill_a_model_of_more_channels_by_their_mean(family):
    options = MOBILENET if family == "mobilenet" else {}
    original = narrow_model(**options)
    arrays = detectron2_arrays(original) if family == "detectron2" else to_torchvision(original)
    model = narrow_model(in_channels=5, **options)
    with pytest.raises(UserError, match=r"(?s)1 arrays .*weight is for 3 channels where model.in_channels is 5"):
        load_weights(model, arrays)
    report = load_weights(model, arrays, partial=True)
    assert len(report.widened) == 1
    assert len(report.loaded) == len(arrays) - 1
    assert f"more channels      1  {report.widened[0]}" in str(report)
    before, after = state(original), state(model)
    (path,) = [path for path in before if before[path].shape != after[path].shape]
    rgb, kernel = before[path], after[path]
    # detectron2's went through a division and a multiplication.
    np.testing.assert_allclose(kernel[:, :, :3], rgb, rtol=1e-6)
    for channel in (3, 4):
        np.testing.assert_allclose(kernel[:, :, channel], rgb.mean(axis=2), rtol=1e-4, atol=1e-6)
    if family != "detectron2":
        out = to_torchvision(model)
        assert not load_weights(narrow_model(in_channels=5, **options), out).widened


def mobilenet_of_imagenet() -> dict:
    """Return arrays by the names that torchvision's classifier has."""
    arrays = other_values(to_torchvision(narrow_model(**MOBILENET, norm="batch")))
    prefix = "backbone.body."
    arrays = {f"features.{key.removeprefix(prefix)}": a for key, a in arrays.items() if key.startswith(prefix)}
    for layer, shape in ((0, (1280, 960)), (3, (1000, 1280))):
        arrays |= {f"classifier.{layer}.weight": np.zeros(shape), f"classifier.{layer}.bias": np.zeros(shape[0])}
    return arrays


def test_the_names_of_a_mobilenet_are_those_of_torchvisions_classifier():
    torch = pytest.importorskip("torch")
    from tools.torchvision_reference import import_torchvision

    with torch.device("meta"):
        reference = import_torchvision().models.mobilenet_v3_large().state_dict()
    arrays = mobilenet_of_imagenet()
    assert {key: a.shape for key, a in arrays.items()} == {key: tuple(t.shape) for key, t in reference.items()}


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_a_mobilenet_of_imagenet_fills_the_backbone(norm):
    arrays, model = mobilenet_of_imagenet(), narrow_model(**MOBILENET, norm=norm)
    with pytest.raises(UserError, match="only a backbone"):
        load_weights(model, arrays)
    report = load_weights(model, arrays, partial=True)
    assert report.family == "a MobileNetV3, for the backbone"
    counters = [key for key in arrays if key.endswith("num_batches_tracked")]
    classifier = [f"classifier.{layer}.{leaf}" for layer in (0, 3) for leaf in ("weight", "bias")]
    assert sorted(report.ignored) == sorted(classifier + (counters if norm == "frozen" else []))
    assert all(not name.startswith("backbone") for name in report.untouched)
    out = to_torchvision(model)
    for key in arrays.keys() - set(report.ignored):
        assert out[key.replace("features.", "backbone.body.", 1)].tobytes() == arrays[key].tobytes(), key


@pytest.mark.slow
def test_a_mobilenet_that_lacks_an_array_or_has_one_too_many_is_refused():
    arrays, model = mobilenet_of_imagenet(), narrow_model(**MOBILENET)
    arrays["features.17.0.weight"] = arrays.pop("features.4.block.2.fc1.weight")
    with pytest.raises(UserError) as error:
        load_weights(model, arrays, partial=True)
    assert "2 arrays do not fit" in str(error.value)
    assert "features.4.block.2.fc1.weight is missing" in str(error.value)
    assert "features.17.0.weight is unknown" in str(error.value)


@pytest.mark.slow
def test_weights_of_detectron2_do_not_fit_a_mobilenet():
    with pytest.raises(UserError, match="MobileNetV3 has no counterpart in detectron2"):
        load_weights(narrow_model(**MOBILENET), detectron2_arrays(narrow_model()))


def test_a_file_of_something_else_is_refused():
    with pytest.raises(UserError, match=r"no Mask R-CNN .* encoder\.weight"):
        load_weights(narrow_model(), {"encoder.weight": np.zeros(3)})


# detectron2


def detectron2_arrays(model) -> dict:
    """Write a model by detectron2's names and in its conventions."""
    values = state(model)
    return {
        entry.key: entry.layout.write(values[entry.path]).astype(np.float32) for entry in detectron2.entries(model)
    }


@pytest.mark.parametrize(("config", "blocks"), [("detectron2_r50_fpn", 16), ("detectron2_r101_fpn", 33)])
def test_the_names_and_shapes_are_those_of_detectron2s_model_zoo(config, blocks):
    model = without_memory(81, config)
    values = {path: variable[...] for path, variable in nnx.to_flat_state(nnx.state(model))}
    shapes = {entry.key: entry.layout.write(values[entry.path]).shape for entry in detectron2.entries(model)}
    # Per block three convolutions with a norm of four arrays each, four shortcuts, the stem; then the rest.
    assert len(shapes) == 5 * (3 * blocks + 4 + 1) + 16 + 6 + 8 + 12
    expected = {
        "backbone.bottom_up.stem.conv1.weight": (64, 3, 7, 7),
        "backbone.bottom_up.stem.conv1.norm.running_var": (64,),
        "backbone.bottom_up.res2.0.shortcut.weight": (256, 64, 1, 1),
        "backbone.bottom_up.res2.0.shortcut.norm.bias": (256,),
        "backbone.bottom_up.res5.2.conv2.weight": (512, 512, 3, 3),
        "backbone.fpn_lateral2.weight": (256, 256, 1, 1),
        "backbone.fpn_output5.bias": (256,),
        "proposal_generator.rpn_head.conv.weight": (256, 256, 3, 3),
        "proposal_generator.rpn_head.objectness_logits.weight": (3, 256, 1, 1),
        "proposal_generator.rpn_head.anchor_deltas.bias": (12,),
        "roi_heads.box_head.fc1.weight": (1024, 12544),
        "roi_heads.box_head.fc2.bias": (1024,),
        "roi_heads.box_predictor.cls_score.weight": (81, 1024),
        "roi_heads.box_predictor.bbox_pred.weight": (320, 1024),
        "roi_heads.mask_head.mask_fcn4.weight": (256, 256, 3, 3),
        "roi_heads.mask_head.deconv.weight": (256, 256, 2, 2),
        "roi_heads.mask_head.predictor.weight": (80, 256, 1, 1),
    }
    assert {key: shapes.get(key) for key in expected} == expected


def test_the_background_comes_first_and_is_empty_where_detectron2_has_none():
    model = narrow_model()
    arrays = other_values(detectron2_arrays(model))
    load_weights(model, arrays)
    head = model.box_head
    scores = arrays["roi_heads.box_predictor.cls_score.weight"]
    np.testing.assert_array_equal(head.cls_score.kernel[...].T, np.concatenate([scores[-1:], scores[:-1]]))
    np.testing.assert_array_equal(head.bbox_pred.bias[...][:4], np.zeros(4))
    np.testing.assert_array_equal(head.bbox_pred.bias[...][4:], arrays["roi_heads.box_predictor.bbox_pred.bias"])
    masks = arrays["roi_heads.mask_head.predictor.weight"][:, :, 0, 0]
    np.testing.assert_array_equal(model.mask_head.logits_kernel[...][1:], masks)
    assert not np.any(model.mask_head.logits_kernel[...][0])


def test_class_agnostic_boxes_have_four_rows_in_files_whatever_the_classes():
    model = narrow_model(cls_agnostic_bbox_reg=True)
    arrays = other_values(detectron2_arrays(model))
    key = "roi_heads.box_predictor.bbox_pred.weight"
    assert arrays[key].shape == (4, 12)
    load_weights(model, arrays)
    np.testing.assert_array_equal(model.box_head.bbox_pred.kernel[...].T, arrays[key])
    np.testing.assert_array_equal(detectron2_arrays(model)[key], arrays[key])
    # To fine-tune for other classes, the boxes are kept.
    report = load_weights(narrow_model(cls_agnostic_bbox_reg=True, num_classes=9), arrays, partial=True)
    assert key in report.loaded and "roi_heads.box_predictor.cls_score.weight" in report.reinitialised
    # torchvision has nothing like it, and its files do not fit.
    assert without_counterpart(model.options) == ["cls_agnostic_bbox_reg=True"]
    with pytest.raises(UserError, match=r"bbox_pred.weight has shape \(20, 12\) instead of \(4, 12\)"):
        load_weights(model, to_torchvision(narrow_model()))


def test_the_first_convolution_answers_to_bgr_less_its_mean_as_detectron2_feeds_it():
    torch = pytest.importorskip("torch")
    model = narrow_model(stride_in_1x1=True)
    arrays = other_values(detectron2_arrays(model))
    load_weights(model, arrays)
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (1, 32, 64, 3)).astype(np.float32)
    bgr = image[..., ::-1] - np.array([103.53, 116.28, 123.675], np.float32)
    kernel = torch.tensor(arrays["backbone.bottom_up.stem.conv1.weight"])
    wanted = torch.nn.functional.conv2d(torch.tensor(bgr).permute(0, 3, 1, 2), kernel, stride=2, padding=3)
    ours = model.backbone.stem.conv(model.normalize(jnp.asarray(image), jnp.array([[32, 64]])))
    # Sums of 147 products of hundreds and ones, in float32.
    np.testing.assert_allclose(ours, wanted.permute(0, 2, 3, 1), rtol=1e-4, atol=2e-2)


def test_the_box_head_reads_pooled_maps_and_orders_its_outputs_as_detectron2s():
    """Two linear layers on maps flattened channels first; scores with the background last; four offsets a class."""
    torch = pytest.importorskip("torch")
    linear, relu = torch.nn.functional.linear, torch.relu
    model = narrow_model()
    arrays = other_values(detectron2_arrays(model))
    load_weights(model, arrays)
    pooled = np.random.default_rng(4).normal(size=(5, 7, 7, 16)).astype(np.float32)
    head = {
        name: [torch.tensor(arrays[f"roi_heads.{name}.{leaf}"]) for leaf in ("weight", "bias")]
        for name in ("box_head.fc1", "box_head.fc2", "box_predictor.cls_score", "box_predictor.bbox_pred")
    }
    x = torch.tensor(pooled).permute(0, 3, 1, 2).flatten(1)
    x = relu(linear(relu(linear(x, *head["box_head.fc1"])), *head["box_head.fc2"]))
    scores = linear(x, *head["box_predictor.cls_score"]).numpy()
    offsets = linear(x, *head["box_predictor.bbox_pred"]).numpy().reshape(5, -1, 4)
    logits, deltas = model.box_head(jnp.asarray(pooled))
    np.testing.assert_allclose(logits[:, 0], scores[:, -1], rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(logits[:, 1:], scores[:, :-1], rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(deltas[:, 1:], offsets, rtol=1e-4, atol=1e-2)


@pytest.mark.slow
def test_a_narrow_pkl_of_detectron2_loads_from_a_file_and_runs(tmp_path):
    import pickle

    from maskrcnn_jax.weights.files import read_arrays

    config = load_config("detectron2_r50_fpn").model.to_dict()
    same = ("norm", "stride_in_1x1", "exact_anchors", "roi_aligned", "roi_sampling_ratio", "mask_targets_binary")
    options = NARROW | {name: config[name] for name in same}
    original = narrow_model(**options)
    # What detectron2 has no numbers for is zero.
    original.box_head.bbox_pred.kernel[...] = original.box_head.bbox_pred.kernel[...].at[:, :4].set(0)
    arrays = detectron2_arrays(original)
    arrays["proposal_generator.anchor_generator.cell_anchors.0"] = np.zeros((3, 4), np.float32)
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}, protocol=2))

    model = narrow_model(**options)
    load_weights(model, other_values(detectron2_arrays(model)))
    report = load_weights(model, read_arrays(path))
    assert report.ignored == ["proposal_generator.anchor_generator.cell_anchors.0"]
    assert len(report.loaded) == len(arrays) - 1
    batch = tiny_batch()
    detect = nnx.jit(lambda model, images, sizes: model.detect(images, sizes))
    found, wanted = (detect(m, batch.images, batch.sizes) for m in (model, original))
    assert bool(wanted.valid.any())
    # The first convolution went through a division and a multiplication in float32.
    np.testing.assert_array_equal(found.labels, wanted.labels)
    np.testing.assert_allclose(found.boxes, wanted.boxes, atol=1e-2)
    np.testing.assert_allclose(found.masks, wanted.masks, atol=1e-3)


def test_suppression_that_torchvision_lacks_is_named():
    options = ModelOptions(box_nms_method="linear", box_nms_class_agnostic=True, box_nms_thresh=0.4)
    assert without_counterpart(options) == ["box_nms_method=linear", "box_nms_class_agnostic=True"]
