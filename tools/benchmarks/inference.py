"""Inference from the padded pixels to detections on the device, whole and by stage."""

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.detect import make_detect
from maskrcnn_jax.models.mask_rcnn import BOX_POOL_SIZE, MaskRCNN
from maskrcnn_jax.structures import Detections
from tools.benchmarks.inputs import Settings, default_dtype, make_model, on_gpu, pad_images, read_photos
from tools.benchmarks.timing import OURS, Row, Spread, compare, measure

FEW = 5
SAME_PIXELS, SAME_SCORE = 0.05, 1e-3


def run(settings: Settings) -> list[Row]:
    """Measure at 800x1088 with as many detections as the model allows and with few; then every stage."""
    settings = settings.having(height=800, width=1066, rounds=7, dtype=default_dtype())
    batch_sizes = [settings.batch_size] if settings.batch_size else [1, 8] if on_gpu() else [1]
    return [row for size in batch_sizes for row in _run(settings.having(batch_size=size))]


def _run(settings: Settings) -> list[Row]:
    # One image, repeated: a score threshold then leaves the same number of detections in each.
    photos = read_photos(settings, 1) * settings.batch_size
    images, sizes = pad_images(photos)
    arrays, variants = None, []
    if settings.against:
        from tools.benchmarks import reference

        torch_model, arrays = reference.make_reference(settings, photos)
        variants = reference.make_variants(torch_model, settings)
    inputs = jax.device_put((images, sizes))
    most = settings.model_options.box_detections_per_img
    threshold, rows, best = 0.05 if settings.against else 0.0, [], None
    for wanted in (most, FEW):
        model = make_model(settings, arrays, box_score_thresh=threshold)
        detect = make_detect(model)
        found = jax.device_get(detect(*inputs))
        number = int(found.valid.sum(axis=1).max())
        said = settings.describe() | {"detections": number}
        references = {}
        for variant in variants:
            variant.model.roi_heads.score_thresh = threshold
            tensors = reference.image_list(images, sizes, variant)
            said["same_detections"] = _check(found, reference.detect(variant, tensors), settings, number)
            references[variant.name] = lambda v=variant, x=tensors: reference.detect(v, x)
        name = f"inference, batch {settings.batch_size}, {number} detections"
        rows.append(compare(name, lambda detect=detect: detect(*inputs), references, settings.rounds, **said))
        if wanted == most:
            best = next((v for v in variants if v.name == rows[-1].reference_name), None)
            stage_rows = _by_stage(model, images, sizes, best, settings) if number else []
        scores = np.sort(found.scores[0][found.valid[0]])[::-1]
        if len(scores) <= FEW:
            break
        threshold = float((scores[FEW - 1] + scores[FEW]) / 2)
    return rows + stage_rows


def _check(found: Detections, wanted: list[dict], settings: Settings, number: int) -> float:
    """Return the share of the reference's detections that we found too; in float32 nearly all, or nothing is timed."""
    same = []
    for i, theirs in enumerate(wanted):
        boxes, scores, labels = (theirs[name].cpu().float().numpy() for name in ("boxes", "scores", "labels"))
        ours = found.valid[i]
        near = np.abs(found.boxes[i][None] - boxes[:, None]).max(axis=2) < SAME_PIXELS
        near &= np.abs(found.scores[i][None] - scores[:, None]) < SAME_SCORE
        same.extend((near & (found.labels[i][None] == labels[:, None]) & ours[None]).any(axis=1))
    share, count = float(np.mean(same)), len(same) / max(len(wanted), 1)
    if settings.dtype == "float32" and not on_gpu() and (share < 0.98 or count != number):
        raise UserError(
            f"the two sides do not find the same: {number} detections an image here and {count:g} there, {share:.0%} "
            "of which are here too; tools/compare_torch.py tells where they part"
        )
    return round(share, 4)


def our_stages(model: MaskRCNN, images: jax.Array, sizes: jax.Array) -> dict[str, Callable]:
    """Return a compiled function for each stage of detection, which works on what the stage before it gave."""
    model.eval()
    graphdef, state = nnx.split(model)
    shape, functions, found = images.shape[1:3], {}, {}

    def stage(name: str, function: Callable, *arguments):
        compiled = jax.jit(lambda state, *args: function(nnx.merge(graphdef, state), *args))
        functions[name] = lambda: compiled(state, *arguments)
        found[name] = functions[name]()
        return found[name]

    maps = stage("backbone", lambda m, x, s: m.backbone(m.normalize(x, s)), images, sizes)
    levels = stage("FPN", lambda m, x: m.fpn(x), maps)
    objectness, deltas = stage("RPN head", lambda m, x: m.rpn(x), levels)
    proposals = stage(
        "proposals",
        lambda m, x, o, d, s: m.propose(o, d, m.anchors(x, shape), s, train=False),
        *(levels, objectness, deltas, sizes),
    )
    logits, offsets = stage(
        "box head with RoIAlign",
        lambda m, x, boxes: m.box_head(m.pool(x, boxes, shape, BOX_POOL_SIZE)),
        *(levels, proposals.boxes),
    )
    boxes, _, labels, valid = stage(
        "detections from the box head", lambda m, *outputs: m.select(*outputs), logits, offsets, proposals, sizes
    )
    stage(
        "mask head with RoIAlign",
        lambda m, x, *detected: jax.nn.sigmoid(m.mask_logits(x, *detected, shape)),
        *(levels, boxes, labels, valid),
    )
    return functions


def _by_stage(model: MaskRCNN, images: np.ndarray, sizes: np.ndarray, best, settings: Settings) -> list[Row]:
    """Time every stage of both sides, the reference in the setting that was the fastest as a whole."""
    ours, theirs, rows = our_stages(model, *jax.device_put((images, sizes))), {}, []
    if best is not None:
        from tools.benchmarks import reference

        theirs = reference.stages(best, reference.image_list(images, sizes, best))
    for name, function in ours.items():
        references = {best.name: theirs[name]} if theirs else {}
        title = f"inference, batch {settings.batch_size}: {name}"
        rows.append(compare(title, function, references, settings.rounds, **settings.describe()))
    return rows


def time_of_ours(model: MaskRCNN, settings: Settings) -> Spread:
    """Time our detection alone, as :mod:`scaling` needs it."""
    detect = make_detect(model)
    inputs = jax.device_put(pad_images(read_photos(settings, settings.batch_size)))
    return measure({OURS: lambda: detect(*inputs)}, settings.rounds)[OURS]
