"""RoIAlign, the choice of levels, and mask targets against torchvision: values in both precisions, and gradients.

detectron2's RoIAlign is torchvision's op, aligned and with sampling_ratio 0.
"""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from maskrcnn_jax.data.run_lengths import cut_out  # noqa: E402
from maskrcnn_jax.data.transforms import pack_masks  # noqa: E402
from maskrcnn_jax.ops.masks import mask_targets  # noqa: E402
from maskrcnn_jax.ops.roi_align import multiscale_roi_align, roi_align  # noqa: E402
from tools.torchvision_reference import import_torchvision  # noqa: E402

torchvision = import_torchvision()
from torchvision.models.detection.roi_heads import project_masks_on_boxes  # noqa: E402
from torchvision.ops import MultiScaleRoIAlign  # noqa: E402

# Features are N(0, 1); coordinates of up to 64 cells in float32 are off by 4e-6, times slopes of a few.
TOLERANCES = {"float32": 1e-4, "float64": 1e-9}


def edge_boxes(rng, height, width, count=24):
    """Return random boxes, some across the border, and then outside, on the border, without area, turned over."""
    corner = rng.uniform(-0.2, 0.9, (count, 2)) * [width, height]
    boxes = np.concatenate([corner, corner + rng.uniform(0, 0.7, (count, 2)) * [width, height]], axis=-1)
    special = [
        [0, 0, width, height],
        [-width, -height, -width / 2, -height / 2],
        [width, height, width, height],
        [width - 1, 0, width, 1],
        [-3, -3, 2, 2],
        [5, 5, 5, 5],
        [0, 0, 0, 0],
        [20, 20, 10, 12],
        [width - 1e-3, height - 1e-3, width + 9, height + 9],
    ]
    return np.concatenate([boxes, special])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("scale", "output_size", "sampling_ratio", "aligned"),
    [
        (0.25, 7, 2, False),
        (0.25, 7, 2, True),
        pytest.param(1.0, 7, 2, False, marks=pytest.mark.slow),
        pytest.param(1 / 32, 5, 2, False, marks=pytest.mark.slow),
        pytest.param(0.25, 3, 3, False, marks=pytest.mark.slow),
        pytest.param(0.125, 2, 1, True, marks=pytest.mark.slow),
    ],
)
def test_values_and_feature_gradients_equal_torchvisions(scale, output_size, sampling_ratio, aligned, dtype):
    rng = np.random.default_rng(0)
    grid = (12, 16)
    features = rng.normal(size=(*grid, 4)).astype(dtype)
    boxes = edge_boxes(rng, grid[0] / scale, grid[1] / scale).astype(dtype)
    cotangent = rng.normal(size=(len(boxes), output_size, output_size, 4)).astype(dtype)

    reference_features = torch.tensor(features.transpose(2, 0, 1)[None], requires_grad=True)
    expected = torchvision.ops.roi_align(
        reference_features, [torch.tensor(boxes)], output_size, scale, sampling_ratio, aligned
    )
    expected.backward(torch.tensor(cotangent.transpose(0, 3, 1, 2)))
    expected_gradient = reference_features.grad[0].numpy().transpose(1, 2, 0)

    with jax.enable_x64(dtype == "float64"):

        def pool(features, boxes, cotangent):
            pooled, transpose = jax.vjp(
                lambda f: roi_align(
                    f,
                    boxes,
                    output_size=output_size,
                    spatial_scale=scale,
                    sampling_ratio=sampling_ratio,
                    aligned=aligned,
                ),
                features,
            )
            return pooled, transpose(cotangent)[0]

        pooled, gradient = jax.jit(pool)(features, boxes, cotangent)
        assert pooled.dtype == dtype
        np.testing.assert_allclose(
            pooled, expected.detach().numpy().transpose(0, 2, 3, 1), atol=TOLERANCES[dtype], rtol=0
        )
        # A cell collects from several hundred samples.
        np.testing.assert_allclose(gradient, expected_gradient, atol=10 * TOLERANCES[dtype], rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("image_shape", [(128, 192), pytest.param((416, 544), marks=pytest.mark.slow)])
def test_pooling_from_the_pyramid_equals_multiscale_roi_align(image_shape, dtype):
    """Boxes just at, above and below the sizes at which the level changes included."""
    rng = np.random.default_rng(1)
    shapes = [tuple(-(-side // 2**level) for side in image_shape) for level in range(2, 6)]
    features = [rng.normal(size=(*shape, 3)).astype(dtype) for shape in shapes]
    sides = np.array([56, 112, 224, 448])[:, None] * [1 - 1e-4, 1, 1 + 1e-4]
    limits = np.stack([sides * 0, sides * 0 + 1, sides, sides + 1], axis=-1).reshape(-1, 4)
    boxes = np.concatenate([edge_boxes(rng, *image_shape)[:-4], limits]).astype(dtype)
    pooler = MultiScaleRoIAlign(["0", "1", "2", "3"], 4, 2)
    expected = pooler(
        {str(i): torch.tensor(f.transpose(2, 0, 1)[None]) for i, f in enumerate(features)},
        [torch.tensor(boxes)],
        [image_shape],
    )
    with jax.enable_x64(dtype == "float64"):
        pool = jax.jit(lambda f, b: multiscale_roi_align(f, b, image_shape=image_shape, output_size=4))
        np.testing.assert_allclose(
            pool(features, boxes), expected.numpy().transpose(0, 2, 3, 1), atol=TOLERANCES[dtype], rtol=0
        )


def boxes_of_all_sizes(rng, height, width, count):
    """Return random boxes of 2 to 1300 pixels, slender ones and integer ones included, some across the border."""
    sides = np.exp(rng.uniform(np.log(2), np.log(1300), (count, 2)))
    sides[: count // 2] = sides[: count // 2, :1] * np.exp(rng.normal(size=(count // 2, 2)) * 0.4)
    sides = sides.clip(max=1300)
    centre = rng.uniform(-0.05, 1.05, (count, 2)) * [width, height]
    boxes = np.concatenate([centre - sides / 2, centre + sides / 2], axis=-1)
    boxes[count // 4 : count // 2] = boxes[count // 4 : count // 2].round()
    special = [
        [20, 30, 1320, 39],  # 1300 x 9: 47 x 1 points a bin on P2
        [400, -30, 409, 1270],
        [0, 0, width, height],
        [0, 0, 56, 56],  # bins of 2 cells on P2
        [100.5, 3.25, 324.5, 227.25],
        [-50, -50, 30, 30],
        [-300, -300, -100, -50],
        [width - 4, height - 4, width + 90, height + 70],
        [600, 300, 600.5, 300.25],
    ]
    return np.concatenate([boxes, special])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("output_size", "aligned"),
    [(7, True), pytest.param(14, True, marks=pytest.mark.slow), pytest.param(7, False, marks=pytest.mark.slow)],
)
def test_adaptive_values_and_feature_gradients_equal_torchvisions(output_size, aligned, dtype):
    rng = np.random.default_rng(5)
    image_shape, scale = (320, 416), 0.25
    features = rng.normal(size=(80, 104, 3)).astype(dtype)
    boxes = np.concatenate([boxes_of_all_sizes(rng, *image_shape, 40), edge_boxes(rng, *image_shape)]).astype(dtype)
    # Larger ones have fewer samples here; a box without area has none and is 0, which the reference cannot express.
    sides = boxes[:, 2:] - boxes[:, :2]
    boxes = boxes[(sides <= 2 * np.array(image_shape[::-1])).all(axis=1)]
    empty = (boxes[:, 2:] <= boxes[:, :2]).any(axis=1) & aligned
    cotangent = rng.normal(size=(len(boxes), output_size, output_size, 3)).astype(dtype)

    reference_features = torch.tensor(features.transpose(2, 0, 1)[None], requires_grad=True)
    expected = torchvision.ops.roi_align(
        reference_features, [torch.tensor(boxes[~empty])], output_size, scale, 0, aligned
    )
    expected.backward(torch.tensor(cotangent[~empty].transpose(0, 3, 1, 2)))

    with jax.enable_x64(dtype == "float64"):

        def pool(features, boxes, cotangent):
            pooled, transpose = jax.vjp(
                lambda f: roi_align(
                    f, boxes, output_size=output_size, spatial_scale=scale, sampling_ratio=0, aligned=aligned
                ),
                features,
            )
            return pooled, transpose(cotangent)[0]

        pooled, gradient = jax.jit(pool)(features, boxes, cotangent)
    assert pooled.dtype == dtype and len(boxes) > 60
    np.testing.assert_array_equal(pooled[empty], 0)
    np.testing.assert_allclose(
        pooled[~empty], expected.detach().numpy().transpose(0, 2, 3, 1), atol=TOLERANCES[dtype], rtol=0
    )
    np.testing.assert_allclose(
        gradient, reference_features.grad[0].numpy().transpose(1, 2, 0), atol=10 * TOLERANCES[dtype], rtol=0
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_adaptive_pooling_from_the_pyramid_equals_detectron2s_pooler(dtype):
    """A batch of two images; each box from torchvision's op on the level of detectron2's formula, in float64."""
    rng = np.random.default_rng(6)
    image_shape = (800, 1344)
    features = [rng.normal(size=(2, 800 >> level, 1344 >> level, 2)).astype(dtype) for level in (2, 3, 4, 5)]
    boxes = np.stack([boxes_of_all_sizes(rng, *image_shape, 30) for _ in range(2)]).astype(dtype)
    width, height = (boxes[..., 2:] - boxes[..., :2]).astype(np.float64).transpose(2, 0, 1)
    levels = np.floor(4 + np.log2(np.sqrt(width * height) / 224 + 1e-8)).clip(2, 5).astype(int)
    assert set(levels.ravel()) == {2, 3, 4, 5}

    expected = np.zeros((*boxes.shape[:2], 7, 7, 2), dtype)
    gradients = []
    cotangent = rng.normal(size=expected.shape).astype(dtype)
    for level, feature in zip((2, 3, 4, 5), features, strict=True):
        reference = torch.tensor(feature.transpose(0, 3, 1, 2), requires_grad=True)
        chosen = [torch.tensor(boxes[image][levels[image] == level]) for image in range(2)]
        pooled = torchvision.ops.roi_align(reference, chosen, 7, 0.5**level, 0, aligned=True)
        pooled.backward(torch.tensor(cotangent[levels == level].transpose(0, 3, 1, 2)))
        expected[levels == level] = pooled.detach().numpy().transpose(0, 2, 3, 1)
        gradients.append(reference.grad.numpy().transpose(0, 2, 3, 1))

    with jax.enable_x64(dtype == "float64"):

        def pool(features, boxes, cotangent):
            pooled, transpose = jax.vjp(
                lambda f: jax.vmap(
                    lambda f, b: multiscale_roi_align(
                        f, b, image_shape=image_shape, output_size=7, sampling_ratio=0, aligned=True
                    )
                )(f, boxes),
                features,
            )
            return pooled, transpose(cotangent)[0]

        pooled, ours = jax.jit(pool)(features, boxes, cotangent)
    # Coordinates of up to 336 cells in float32 are off by 2e-5.
    tolerance = 2 * TOLERANCES[dtype]
    np.testing.assert_allclose(pooled, expected, atol=tolerance, rtol=0)
    for gradient, reference in zip(ours, gradients, strict=True):
        assert np.abs(reference).max() > 0.1
        np.testing.assert_allclose(gradient, reference, atol=10 * tolerance, rtol=0)


def assert_targets_equal(masks, boxes, index, image_size, canvas, dtype):
    """Compare with torchvision's nearest resize of the masks followed by its projection."""
    raster = masks.shape[1:]
    resized = torch.nn.functional.interpolate(torch.tensor(masks)[:, None].float(), size=list(image_size))[:, 0]
    expected = project_masks_on_boxes(resized, torch.tensor(boxes), torch.tensor(index), 28).numpy()
    packed = pack_masks([cut_out(mask) for mask in masks], raster, image_size, canvas)
    with jax.enable_x64(dtype == "float64"):
        ours = jax.jit(mask_targets, static_argnames=("max_size",))(
            *packed[:2],
            np.array(packed[2], np.int32),
            boxes,
            index.astype(np.int32),
            np.array(image_size, np.int32),
            max_size=tuple(-(-side // 32) * 32 for side in image_size),
        )
        assert ours.dtype == dtype
        # Masks are 0 or 1, so an error of 1e-5 in a coordinate is one of 1e-5 here.
        np.testing.assert_allclose(ours, expected, atol=TOLERANCES[dtype], rtol=0)
    assert 0.05 < expected.mean() < 0.95, "the case is trivial"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("raster", "image_size"),
    [((60, 77), (101, 128)), pytest.param((90, 61), (45, 31), marks=pytest.mark.slow), ((64, 64), (64, 64))],
)
def test_targets_of_random_masks_equal_torchvisions(raster, image_size, dtype):
    rng = np.random.default_rng(2)
    masks = (rng.random((3, *raster)) > 0.5).astype(np.uint8)
    boxes = edge_boxes(rng, *image_size).clip(0, [*image_size[::-1], *image_size[::-1]]).astype(dtype)
    assert_targets_equal(masks, boxes, rng.integers(0, 3, len(boxes)), image_size, 96, dtype)


# pycocotools 2.0.11 has not caught up with NumPy 2 here.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.slow
def test_targets_of_annotated_masks_equal_torchvisions(coco_dir):
    coco = pytest.importorskip("pycocotools.coco")
    path = min((coco_dir / "annotations").glob("instances_val*.json"), default=None)
    if path is None:
        pytest.skip("no instances_val*.json")
    api = coco.COCO()
    api.dataset = json.loads(path.read_text())
    api.createIndex()
    rng = np.random.default_rng(3)
    checked = 0
    for image_id in sorted(api.imgs):
        image = api.imgs[image_id]
        objects = [a for a in api.imgToAnns[image_id] if not a["iscrowd"] and a["bbox"][2] > 4 and a["bbox"][3] > 4]
        objects = objects[:6]
        if len(objects) < 2:
            continue
        raster = (image["height"], image["width"])
        scale = min(800 / min(raster), 1333 / max(raster))
        image_size = tuple(int(side * scale) for side in raster)
        boxes = np.array([a["bbox"] for a in objects])
        boxes[:, 2:] += boxes[:, :2]
        boxes = boxes * scale + rng.normal(size=boxes.shape) * 5  # as proposals: near the object
        boxes = boxes.clip(0, [*image_size[::-1], *image_size[::-1]]).astype(np.float32)
        masks = np.stack([api.annToMask(a) for a in objects])
        assert_targets_equal(masks, boxes, np.arange(len(objects)), image_size, 640, "float32")
        checked += 1
        if checked == 5:
            break
    assert checked
