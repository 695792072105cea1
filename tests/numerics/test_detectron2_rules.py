"""detectron2's rules where they differ from torchvision's, each against a reference computed here.

RoIAlign itself is in test_roi_align_oracle.py, pasting in tests/inference/test_paste.py.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pycocotools import mask as coco_mask

torch = pytest.importorskip("torch")
from maskrcnn_jax.config import load_config  # noqa: E402
from maskrcnn_jax.data.run_lengths import cut_out  # noqa: E402
from maskrcnn_jax.data.transforms import pack_masks  # noqa: E402
from maskrcnn_jax.distributed import make_mesh, on_each_device  # noqa: E402
from maskrcnn_jax.models import losses  # noqa: E402
from maskrcnn_jax.ops.anchors import grid_anchors  # noqa: E402
from maskrcnn_jax.ops.masks import mask_targets  # noqa: E402
from maskrcnn_jax.ops.matching import Sample  # noqa: E402
from maskrcnn_jax.ops.pyramid import assign_levels  # noqa: E402
from maskrcnn_jax.structures import GroundTruth  # noqa: E402
from tests.models.tiny import tiny_model  # noqa: E402
from tools.torchvision_reference import import_torchvision  # noqa: E402

torchvision = import_torchvision()
compiled_targets = jax.jit(mask_targets, static_argnames=("max_size", "output_size", "aligned"))
SIZE = 28


def exact_level(boxes, aligned):
    """Return the level in float64, before the floor, of boxes with an area."""
    boxes = np.asarray(boxes, np.float64)
    side = np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1))
    if aligned:
        return 4 + np.log2(side / 224 + 1e-8)  # detectron2's assign_boxes_to_levels
    return 4 + np.log2(side / 224) + 1e-6  # torchvision's LevelMapper


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_levels_equal_the_formula_in_float64(dtype, aligned):
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 500, (3000, 2))
    boxes = np.concatenate([corner, corner + np.exp(rng.uniform(np.log(4), np.log(1300), (3000, 2)))], axis=1)
    boxes = boxes.astype(dtype)
    expected = exact_level(boxes, aligned)
    # In float32 4 + log2 has steps of 5e-7 and the side is off by 1e-7 of itself, more where corners are subtracted.
    margin = 1e-5 if dtype == "float32" else 1e-12
    clear = np.abs(expected - np.round(expected)) > margin
    assert clear.mean() > 0.999
    with jax.enable_x64(dtype == "float64"):
        levels = np.asarray(jax.jit(lambda b: assign_levels(b, finest=2, coarsest=5, aligned=aligned))(boxes))
    np.testing.assert_array_equal(levels[clear], np.floor(expected[clear]).clip(2, 5))
    assert set(levels) == {2, 3, 4, 5}


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_side_of_exactly_112_224_or_448_pixels_belongs_to_the_next_level(dtype, aligned):
    """Also where only the area is: 56 x 224 and 896 x 224. XLA's division by 224 is not exact."""
    rng = np.random.default_rng(1)
    sides = np.array([(112, 112), (224, 224), (448, 448), (56, 224), (448, 112), (896, 224)])
    corner = rng.integers(0, 2000, (200, 1, 2)) / 8
    boxes = np.concatenate(np.broadcast_arrays(corner, corner + sides), axis=-1).reshape(-1, 4).astype(dtype)
    boxes = np.concatenate([boxes[:, :2], boxes[:, 2:]], axis=-1)
    np.testing.assert_array_equal(np.floor(exact_level(boxes, aligned)[:6]), [3, 4, 5, 3, 4, 5])
    with jax.enable_x64(dtype == "float64"):
        levels = jax.jit(lambda b: assign_levels(b, finest=2, coarsest=5, aligned=aligned))(boxes)
    np.testing.assert_array_equal(np.reshape(levels, (200, 6)), [[3, 4, 5, 3, 4, 5]] * 200)


@pytest.mark.parametrize(
    ("below", "torchvision_level", "detectron2_level"), [(0, 4, 4), (5e-9, 4, 4), (1e-7, 4, 3), (2e-6, 3, 3)]
)
def test_the_small_constants_of_both_rules_move_the_border_between_levels(below, torchvision_level, detectron2_level):
    """Sides of 224 (1 - below): log2 is -1.44 below; torchvision adds 1e-6 to it, detectron2 1e-8 to its argument."""
    side = 224 * (1 - below)
    box = np.array([[0, 0, side, side]], np.float64)
    with jax.enable_x64(True):
        for aligned, level in ((False, torchvision_level), (True, detectron2_level)):
            assert assign_levels(jnp.asarray(box), finest=2, coarsest=5, aligned=aligned).tolist() == [level]
            assert math.floor(exact_level(box, aligned)[0]) == level


@pytest.mark.parametrize(
    ("image_shape", "shapes"),
    [
        ((800, 1088), [(200, 272), (100, 136), (50, 68), (25, 34), (13, 17)]),  # P6: 25 rows, every second
        ((320, 256), [(80, 64), (40, 32), (20, 16), (10, 8), (5, 4)]),
    ],
)
def test_exact_anchors_equal_a_loop_over_cells_and_ratios(image_shape, shapes):
    """Centres at i * stride, strides 4 to 64 however the grids were rounded; row, column, ratio."""
    sizes, ratios = (32, 64, 128, 256, 512), (0.5, 1.0, 2.0)
    levels = grid_anchors(image_shape, shapes, sizes, ratios, exact=True)
    for ours, (height, width), size, stride in zip(levels, shapes, sizes, (4, 8, 16, 32, 64), strict=True):
        expected = []
        for row in range(height):
            for column in range(width):
                for ratio in ratios:
                    w = math.sqrt(size**2 / ratio)
                    h = ratio * w
                    x, y = column * stride, row * stride
                    expected.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2))
        assert ours.dtype == np.float32
        # A corner of up to 362 pixels is rounded, 1.5e-5, and then its sum with the centre.
        np.testing.assert_allclose(ours, expected, rtol=1e-7, atol=2e-5)


def targets(masks, boxes, index, image_size, canvas):
    """Return our soft targets for masks [G, h, w] of an image that the network sees at image_size."""
    packed, windows, raster = pack_masks([cut_out(mask) for mask in masks], masks.shape[1:], image_size, canvas)
    return np.asarray(
        compiled_targets(
            packed,
            windows,
            np.array(raster, np.int32),
            jnp.asarray(boxes, jnp.float32),
            np.asarray(index, np.int32),
            np.array(image_size, np.int32),
            max_size=tuple(-(-side // 320) * 320 for side in image_size),
            aligned=True,
        )
    )


def crop_and_resize(bitmasks, boxes, index):
    """Crop as detectron2's BitMasks.crop_and_resize, before its threshold of 0.5: RoIAlign of [G, H, W]."""
    rois = np.concatenate([np.asarray(index)[:, None], boxes], axis=1).astype(np.float32)
    bitmasks = torch.tensor(np.asarray(bitmasks, np.float32))[:, None]
    return torchvision.ops.roi_align(bitmasks, torch.tensor(rois), SIZE, 1.0, 0, aligned=True)[:, 0].numpy()


def assert_equal_at_the_threshold(ours, expected):
    """Assert the same soft values, hence the same side of 0.5."""
    # A coordinate of up to 1200 pixels in float32 is off by 1e-4, and so is the weight of a bit.
    np.testing.assert_allclose(ours, expected, atol=4e-4)
    clear = np.abs(expected - 0.5) > 4e-4
    assert clear.mean() > 0.99
    np.testing.assert_array_equal((ours >= 0.5)[clear], (expected >= 0.5)[clear])
    assert 0.1 < (expected >= 0.5).mean() < 0.9, "the case is trivial"


def smooth_blobs(rng, count, height, width):
    """Return random bitmasks with rounded borders and holes."""
    noise = rng.normal(size=(count, 1, height // 6, width // 6)).astype(np.float32)
    smooth = torch.nn.functional.interpolate(torch.tensor(noise), (height, width), mode="bicubic", align_corners=False)
    return (smooth[:, 0].numpy() > 0).astype(np.uint8)


@pytest.mark.parametrize("image_size", [(90, 120), (135, 180), (67, 91)])
def test_targets_of_random_blobs_equal_the_cropped_bitmasks(image_size):
    """Where the network sees the image enlarged or reduced, its bitmask is resized by the nearest-neighbour rule."""
    rng = np.random.default_rng(2)
    masks = smooth_blobs(rng, 4, 90, 120)
    height, width = image_size
    corner = rng.uniform(0, 0.6, (40, 2)) * [width, height]
    boxes = np.concatenate([corner, corner + rng.uniform(3, 0.9 * width, (40, 2))], axis=1)
    boxes = boxes.clip(0, [width, height, width, height])
    boxes[:8] = boxes[:8].round()
    boxes[0] = [0, 0, width, height]
    index = rng.integers(0, 4, 40)
    resized = torch.nn.functional.interpolate(torch.tensor(masks)[:, None].float(), size=list(image_size))[:, 0]
    assert_equal_at_the_threshold(
        targets(masks, boxes, index, image_size, 128), crop_and_resize(resized, boxes, index)
    )


def rasterized_in_box(polygons, box):
    """Return what detectron2's PolygonMasks give: the polygons moved and scaled into the box, then rasterised."""
    side = np.maximum(box[2:] - box[:2], 0.1)
    moved = [(np.reshape(p, (-1, 2)) - box[:2]) * (SIZE / side) for p in polygons]
    rle = coco_mask.merge(coco_mask.frPyObjects([p.ravel().tolist() for p in moved], SIZE, SIZE))
    return coco_mask.decode(rle)


def star(rng, centre, radius):
    """Return a polygon whose distance from its centre varies with the angle, without crossing itself."""
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    distance = radius * (1 + 0.3 * np.sin(3 * angle + rng.uniform(0, 6)) + 0.15 * np.sin(7 * angle))
    return centre + distance[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def test_targets_of_drawn_polygons_agree_with_rasterising_them_in_the_box():
    """Measured: 99.3 % of the cells. The rest lie on outlines, which the bitmask rounds to whole pixels."""
    rng = np.random.default_rng(3)
    polygons = [star(rng, rng.uniform(70, 130, 2), rng.uniform(20, 50)) for _ in range(30)]
    masks = np.stack(
        [coco_mask.decode(coco_mask.frPyObjects([p.ravel().tolist()], 200, 200))[..., 0] for p in polygons]
    )
    boxes = np.array([[*p.min(0), *p.max(0)] for p in polygons]) + rng.normal(size=(30, 4)) * 5
    ours = targets(masks, boxes, np.arange(30), (200, 200), 200) >= 0.5
    expected = np.stack([rasterized_in_box([p], box) for p, box in zip(polygons, boxes, strict=True)])
    share = (ours == expected).mean()
    print(f"equal cells: {share:.4f}")
    assert share > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("resize", [False, True])
def test_targets_of_annotated_objects_equal_both_of_detectron2s_rules(coco_dir, resize):
    """The bitmask exactly; of the polygon's cells, measured, 98.9 % at the size of the file and 98.5 % at 800 pixels.

    The boxes lie near the objects, as proposals do, off by a twentieth of their size.
    """
    path = min((coco_dir / "annotations").glob("instances_val*.json"), default=None)
    if path is None:
        pytest.skip("no instances_val*.json")
    dataset = json.loads(path.read_text())
    rng = np.random.default_rng(4)
    equal = []
    for image in sorted(dataset["images"], key=lambda image: image["id"])[:12]:
        raster = (image["height"], image["width"])
        scale = 800 / min(raster) if resize else 1
        image_size = tuple(int(side * scale + 0.5) for side in raster)
        objects = [a for a in dataset["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]]
        objects = [a for a in objects if min(a["bbox"][2:]) >= 8][:8]
        if not objects:
            continue
        masks = np.stack(
            [coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(a["segmentation"], *raster))) for a in objects]
        )
        boxes = np.array([a["bbox"] for a in objects]) * (np.tile(image_size[::-1], 2) / np.tile(raster[::-1], 2))
        boxes += rng.normal(size=boxes.shape) * 0.05 * np.tile(boxes[:, 2:], 2)
        boxes[:, 2:] += boxes[:, :2]
        boxes = boxes.clip(0, np.tile(image_size[::-1], 2)).astype(np.float32)
        index = np.arange(len(objects))
        # Padding the number of objects keeps the number of programs small.
        ours = targets(
            np.concatenate([masks, np.zeros((8 - len(masks), *raster), np.uint8)]),
            np.concatenate([boxes, np.zeros((8 - len(boxes), 4))]),
            np.concatenate([index, np.zeros(8 - len(index))]),
            image_size,
            640,
        )[: len(objects)]
        resized = torch.nn.functional.interpolate(torch.tensor(masks)[:, None].float(), size=list(image_size))[:, 0]
        assert_equal_at_the_threshold(ours, crop_and_resize(resized, boxes, index))
        factor = np.array(image_size[::-1]) / raster[::-1]
        for target, annotation, box in zip(ours, objects, boxes, strict=True):
            polygons = [np.reshape(p, (-1, 2)) * factor for p in annotation["segmentation"]]
            equal.append(((target >= 0.5) == rasterized_in_box(polygons, box)).mean())
    assert len(equal) > 20
    print(f"equal cells: {np.mean(equal):.4f}, least in an object {min(equal):.4f}, {len(equal)} objects")
    assert np.mean(equal) > 0.97


def sampled_anchors(rng, num_images=4, num_anchors=60, num_samples=24, num_gt=3):
    """Return the RPN's outputs, anchors, matches, a sample with unused slots, and objects, of random images."""
    corner = rng.uniform(0, 60, (num_anchors, 2))
    anchors = np.concatenate([corner, corner + rng.uniform(4, 30, (num_anchors, 2))], axis=1)
    matches = rng.integers(-2, num_gt, (num_images, num_anchors)).astype(np.int32)
    index = np.stack([rng.permutation(num_anchors)[:num_samples] for _ in range(num_images)]).astype(np.int32)
    valid = (rng.random(index.shape) < 0.7) & (np.arange(num_images) != 1)[:, None]  # the second image is a filler
    foreground = valid & (np.take_along_axis(matches, index, axis=1) >= 0)
    corner = rng.uniform(0, 50, (num_images, num_gt, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 40, corner.shape)], axis=-1)
    outputs = rng.normal(size=(num_images, num_anchors)), rng.normal(size=(num_images, num_anchors, 4)) * 0.2
    return outputs, anchors, matches, Sample(index, foreground, valid), boxes


@pytest.mark.parametrize("num_devices", [1, 4])
def test_rpn_losses_are_divided_by_256_for_each_image_and_boxes_have_an_l1_loss(num_devices):
    """Values and gradients; the second of four images is no more than a filler of the batch."""
    rng = np.random.default_rng(0)
    (logits, deltas), anchors, matches, sample, boxes = sampled_anchors(rng)
    present = np.arange(4) != 1
    objectness, offsets = (torch.tensor(array, requires_grad=True) for array in (logits, deltas))
    cross_entropy, distance = 0, 0
    for i, slot in zip(*np.nonzero(sample.valid), strict=True):
        anchor = sample.index[i, slot]
        target = torch.tensor(float(sample.foreground[i, slot]), dtype=torch.float64)
        cross_entropy += torch.nn.functional.binary_cross_entropy_with_logits(objectness[i, anchor], target)
        if sample.foreground[i, slot]:
            (x1, y1, x2, y2), (a1, b1, a2, b2) = boxes[i, matches[i, anchor]], anchors[anchor]
            shift = ((x1 + x2 - a1 - a2) / 2 / (a2 - a1), (y1 + y2 - b1 - b2) / 2 / (b2 - b1))
            scale = math.log((x2 - x1) / (a2 - a1)), math.log((y2 - y1) / (b2 - b1))
            distance += (offsets[i, anchor] - torch.tensor([*shift, *scale])).abs().sum()
    wanted = [cross_entropy / (256 * 3), distance / (256 * 3)]
    sum(wanted).backward()

    with jax.enable_x64(True):
        model = tiny_model(rpn_fixed_normalizer=True, smooth_l1_beta=0.0, rpn_batch_size_per_image=256)

        def shares(_, rows):
            logits, deltas, matches, sample, boxes, present = rows
            gt = GroundTruth(boxes, None, None, None, None, None)

            def loss(logits, deltas):
                terms = model.rpn_losses(
                    [logits[:, :40], logits[:, 40:]],
                    [deltas[:, :40], deltas[:, 40:]],
                    [jnp.asarray(anchors[:40]), jnp.asarray(anchors[40:])],
                    matches,
                    sample,
                    gt,
                    present,
                )
                return sum(terms.values()), jnp.stack([terms["loss_objectness"], terms["loss_rpn_box_reg"]])

            gradients, terms = jax.grad(loss, (0, 1), has_aux=True)(logits, deltas)
            return terms[None], gradients

        rows = (logits, deltas, matches, sample, boxes, present)
        mesh = make_mesh(jax.devices()[:num_devices])
        terms, gradients = jax.jit(on_each_device(shares, mesh, returns_rows=True))((), rows)
    np.testing.assert_allclose(np.asarray(terms).sum(axis=0), [w.item() for w in wanted], rtol=1e-12)
    for ours, theirs in zip(gradients, (objectness.grad, offsets.grad), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)


def test_the_box_head_has_an_l1_loss_divided_by_all_sampled_rois():
    rng = np.random.default_rng(1)
    corner = rng.uniform(0, 60, (2, 2, 10, 2))
    rois, gt = np.concatenate([corner, corner + rng.uniform(4, 30, corner.shape)], axis=-1)
    deltas, valid = rng.normal(size=(2, 10, 4)), rng.random((2, 10)) < 0.8
    foreground = rng.random((2, 10)) < 0.5
    center = [(b[..., :2] + b[..., 2:]) / 2 for b in (gt, rois)]
    size = [b[..., 2:] - b[..., :2] for b in (gt, rois)]
    targets = np.concatenate([(center[0] - center[1]) / size[1] * 10, np.log(size[0] / size[1]) * 5], axis=-1)
    kept = foreground & valid
    offsets = torch.tensor(deltas, requires_grad=True)
    wanted = torch.nn.functional.l1_loss(offsets[kept], torch.tensor(targets[kept]), reduction="sum") / valid.sum()
    wanted.backward()
    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(
            lambda deltas: losses.roi_box_loss(
                "smooth_l1", deltas, *map(jnp.asarray, (rois, gt, foreground, valid)), beta=0.0
            )
        )(jnp.asarray(deltas))
    np.testing.assert_allclose(value, wanted.item(), rtol=1e-12)
    np.testing.assert_allclose(gradient, offsets.grad, rtol=1e-12)


def test_the_configs_train_with_detectron2s_losses():
    for name in ("detectron2_r50_fpn", "detectron2_r101_fpn"):
        model = load_config(name).model
        assert (model.rpn_fixed_normalizer, model.smooth_l1_beta) == (True, 0.0)
