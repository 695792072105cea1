"""The operations that hold most of the time beside convolutions, one by one; results are compared before they race."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from pycocotools import mask as coco_mask

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.paste import encode_rle, paste_mask
from maskrcnn_jax.models.mask_rcnn import BOX_POOL_SIZE, MASK_POOL_SIZE
from maskrcnn_jax.models.postprocess import select_detections
from maskrcnn_jax.models.proposals import select_proposals
from maskrcnn_jax.ops.anchors import grid_anchors
from maskrcnn_jax.ops.cpu.nms import nms_one_by_one
from maskrcnn_jax.ops.nms import nms, nms_in_rounds
from maskrcnn_jax.ops.roi_align import multiscale_roi_align
from maskrcnn_jax.structures import Proposals
from tools.benchmarks.inputs import STRIDE, Settings
from tools.benchmarks.timing import Row, compare

PASTED_SIZE = (480, 640)
NUM_BOXES, TRAIN_IMAGES, TRAIN_BOXES = 1000, 2, 512


def run(settings: Settings) -> list[Row]:
    """Measure all operations at 800x1088."""
    settings = settings.having(height=800, width=1066, rounds=7, dtype="float32")
    rng = np.random.default_rng(settings.seed)
    shape = tuple(-(-side // STRIDE) * STRIDE for side in (settings.height, settings.width))
    channels = settings.model_options.fpn_channels
    return [
        _roi_align(settings, rng, shape, channels, 1, NUM_BOXES, gradient=False),
        _roi_align(settings, rng, shape, channels, TRAIN_IMAGES, TRAIN_BOXES, gradient=True),
        *_nms(settings, rng, shape),
        _proposals(settings, rng, shape),
        _detections(settings, rng, shape),
        _paste(settings, rng),
    ]


def random_boxes(rng: np.random.Generator, shape: tuple[int, int], *leading: int) -> np.ndarray:
    """Draw boxes [..., 4] float32 with sides of 8 pixels to three quarters of the image, small ones most often."""
    size = np.array(shape[::-1])
    sides = np.exp(rng.uniform(np.log(8), np.log(0.75 * size), (*leading, 2)))
    corner = rng.uniform(0, 1, (*leading, 2)) * (size - sides)
    return np.concatenate([corner, corner + sides], axis=-1).astype(np.float32)


def check(name: str, ours, theirs, atol: float) -> None:
    """Refuse to time two functions that do not give the same.

    Raises:
        UserError: if the arrays differ by more than ``atol``.
    """
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=0, atol=atol):
        raise UserError(f"{name}: the two sides give different results, {ours.shape} and {theirs.shape}")


def _roi_align(settings, rng, shape, channels, num_images, num_boxes, *, gradient) -> Row:
    maps = [
        rng.normal(size=(num_images, shape[0] // s, shape[1] // s, channels)).astype(np.float32)
        for s in (4, 8, 16, 32)
    ]
    boxes = random_boxes(rng, shape, num_images, num_boxes)
    upstream = rng.normal(size=(num_images, num_boxes, BOX_POOL_SIZE, BOX_POOL_SIZE, channels)).astype(np.float32)

    def pool(maps, boxes):
        one = functools.partial(multiscale_roi_align, image_shape=shape, output_size=BOX_POOL_SIZE)
        return jax.vmap(one)(maps, boxes)

    def pool_and_gradient(maps, boxes, upstream):
        pooled, backward = jax.vjp(lambda maps: pool(maps, boxes), maps)
        return pooled, backward(upstream)[0]

    arguments = jax.device_put((maps, boxes, upstream) if gradient else (maps, boxes))
    compiled = jax.jit(pool_and_gradient if gradient else pool)
    size = f"{num_images} x {num_boxes} boxes, {shape[0]}x{shape[1]}"
    name = f"RoIAlign {BOX_POOL_SIZE}x{BOX_POOL_SIZE} {'forward + backward' if gradient else 'forward'}, {size}"
    references = {}
    if settings.against:
        references = _torch_roi_align(maps, boxes, upstream, shape, gradient)
        theirs = next(iter(references.values()))()
        ours = compiled(*arguments)
        pooled = ours[0] if gradient else ours
        check(name, pooled.reshape(-1, *pooled.shape[2:]), theirs[0].detach().permute(0, 2, 3, 1).cpu(), 1e-3)
        for mine, wanted in zip(ours[1] if gradient else (), theirs[1], strict=True):
            check(f"{name}, gradient", mine, wanted.permute(0, 2, 3, 1).cpu(), 1e-2)
    return compare(name, lambda: compiled(*arguments), references, settings.rounds, channels=channels)


def _torch_roi_align(maps, boxes, upstream, shape, gradient) -> dict[str, Callable]:
    """Return torchvision's multi-scale pooling of the same, per memory format: () -> (pooled, gradients)."""
    import torch

    from tools.benchmarks import reference

    reference.import_torchvision()
    from torchvision.ops import MultiScaleRoIAlign

    device, names = reference.torch_device(), ["0", "1", "2", "3"]
    pool = MultiScaleRoIAlign(names, BOX_POOL_SIZE, 2)
    per_image = [torch.tensor(b, device=device) for b in boxes]
    upstream = torch.tensor(upstream, device=device).flatten(0, 1).permute(0, 3, 1, 2)

    def contender(memory_format):
        levels = [torch.tensor(m, device=device).permute(0, 3, 1, 2) for m in maps]
        levels = [m.contiguous(memory_format=memory_format).requires_grad_(gradient) for m in levels]
        given = upstream.contiguous(memory_format=memory_format)

        def call():
            with torch.set_grad_enabled(gradient):
                pooled = pool(dict(zip(names, levels, strict=True)), per_image, [shape] * len(per_image))
                return pooled, torch.autograd.grad(pooled, levels, given, materialize_grads=True) if gradient else ()

        return call

    formats = reference.MEMORY_FORMATS.items()
    return {f"{reference.reference_name()}, {layout}": contender(format) for layout, format in formats}


def _nms(settings: Settings, rng, shape) -> list[Row]:
    """Time every form of suppression that ops/nms.py has, on five levels at once."""
    boxes = random_boxes(rng, shape, 5, NUM_BOXES)  # best first
    references = {}
    if settings.against:
        import torch

        from tools.benchmarks import reference

        reference.import_torchvision()
        from torchvision.ops import batched_nms

        device = reference.torch_device()
        flat = torch.tensor(boxes.reshape(-1, 4), device=device)
        scores = torch.tile(torch.linspace(1, 0, NUM_BOXES, device=device), (5,))
        level = torch.repeat_interleave(torch.arange(5, device=device), NUM_BOXES)
        references = {reference.reference_name(): lambda: batched_nms(flat, scores, level, 0.7)}
    rows, inputs = [], jax.device_put((boxes, np.ones(boxes.shape[:2], bool)))
    for form in (nms, nms_in_rounds, nms_one_by_one):
        compiled = jax.jit(jax.vmap(functools.partial(form, iou_threshold=0.7)))
        name = f"NMS, form {form.__name__}, 5 levels x {NUM_BOXES}"
        for call in references.values():
            check(name, np.flatnonzero(compiled(*inputs)), np.sort(call().cpu()), 0)
        rows.append(compare(name, lambda compiled=compiled: compiled(*inputs), references, settings.rounds))
    return rows


def _proposals(settings: Settings, rng, shape) -> Row:
    """Time the selection of proposals from the outputs of the RPN."""
    options = settings.model_options
    cells = [tuple(-(-side // s) for side in shape) for s in (4, 8, 16, 32, 64)]
    objectness = [rng.normal(size=(1, 3, *cell)).astype(np.float32) for cell in cells]
    deltas = [rng.normal(scale=0.3, size=(1, 12, *cell)).astype(np.float32) for cell in cells]
    size = np.array([settings.height, settings.width], np.int32)
    anchors = grid_anchors(shape, cells, options.anchor_sizes, options.aspect_ratios, exact=False)
    keys = {"pre_nms_top_n": "rpn_pre_nms_top_n_test", "post_nms_top_n": "rpn_post_nms_top_n_test"}
    limits = {name: getattr(options, key) for name, key in keys.items()}
    select = jax.jit(
        lambda o, d, s: select_proposals(
            o, d, [jnp.asarray(a) for a in anchors], s, nms_thresh=0.7, min_size=1e-3, **limits
        )
    )
    inputs = jax.device_put(
        (
            [o[0].transpose(1, 2, 0).reshape(-1) for o in objectness],
            [d[0].transpose(1, 2, 0).reshape(-1, 4) for d in deltas],
            size,
        )
    )
    name, references = f"proposals from RPN outputs, {shape[0]}x{shape[1]}, top {limits['pre_nms_top_n']}", {}
    if settings.against:
        import torch

        from tools.benchmarks import reference

        model = _torch_model(settings)
        maps = [[torch.tensor(m, device=reference.torch_device()) for m in side] for side in (objectness, deltas)]
        images = np.zeros((1, *shape, 3), np.float32), size[None]
        image_list = reference.image_list(*images, _plain(model))
        call = functools.partial(torch.inference_mode()(reference.propose), model, image_list, maps[0], *maps)
        # By area: of equal scores, which torchvision's sigmoid makes, either may come first.
        found = select(*inputs)
        pair = np.asarray(found.boxes)[np.asarray(found.valid)], call()[0].cpu().numpy()
        check(name, *(np.sort(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)) for boxes in pair), 1.0)
        references = {reference.reference_name(): call}
    return compare(name, lambda: select(*inputs), references, settings.rounds, **limits)


def _detections(settings: Settings, rng, shape) -> Row:
    """Time the selection of detections from the outputs of the box head."""
    options, classes = settings.model_options, settings.num_classes
    number = options.rpn_post_nms_top_n_test
    logits = rng.normal(scale=1.5, size=(number, classes)).astype(np.float32)
    deltas = rng.normal(scale=0.5, size=(number, classes, 4)).astype(np.float32)
    boxes, size = random_boxes(rng, shape, number), np.array([settings.height, settings.width], np.int32)
    select = jax.jit(
        lambda c, d, p, s: select_detections(
            jax.nn.softmax(c)[:, 1:],
            d,
            p,
            s,
            options,
        )
    )
    proposals = Proposals(boxes, np.zeros(number, np.float32), np.ones(number, bool))
    inputs = jax.device_put((logits, deltas, proposals, size))
    name, references = f"detections from box head outputs, {number} RoIs, {classes} classes", {}
    if settings.against:
        import torch

        from tools.benchmarks import reference

        heads = _torch_model(settings).roi_heads
        tensors = [
            torch.tensor(a, device=reference.torch_device()) for a in (logits, deltas.reshape(number, -1), boxes)
        ]

        @torch.inference_mode()
        def call():
            return heads.postprocess_detections(*tensors[:2], tensors[2:], [tuple(size.tolist())])

        found, wanted = select(*inputs), call()
        check(name, found[1][found[3]], wanted[1][0].cpu(), 1e-5)
        references = {reference.reference_name(): call}
    return compare(
        name, lambda: select(*inputs), references, settings.rounds, detections=int(select(*inputs)[3].sum())
    )


def _torch_model(settings: Settings):
    """Return a narrow model of torchvision's, of which only what has no weights is used."""
    from tools.benchmarks import reference
    from tools.benchmarks.inputs import NARROW

    options = settings.model_options
    kept = ("anchor_sizes", "rpn_pre_nms_top_n_test", "rpn_post_nms_top_n_test")
    narrow = NARROW | {name: getattr(options, name) for name in kept}
    return (
        reference.build_reference(dataclasses.replace(options, **narrow), settings.num_classes)
        .eval()
        .to(reference.torch_device())
    )


def _plain(model):
    from tools.benchmarks import reference

    return reference.Variant("", model, reference.MEMORY_FORMATS["contiguous"], False)


def random_masks(rng: np.random.Generator, number: int) -> np.ndarray:
    """Draw smooth masks [n, 28, 28] float32 in 0..1, round as objects are."""
    side = 2 * MASK_POOL_SIZE
    y, x = np.mgrid[:side, :side] / (side - 1) * 2 - 1
    radius = rng.uniform(0.6, 1.0, (number, 1, 1)) + 0.15 * np.sin(
        rng.uniform(2, 6, (number, 1, 1)) * np.arctan2(y, x)
    )
    return (1 / (1 + np.exp(8 * (np.hypot(x, y) - radius)))).astype(np.float32)


def _paste(settings: Settings, rng) -> Row:
    """Time the pasting and encoding of a hundred masks; both sides on the host."""
    boxes, masks = random_boxes(rng, PASTED_SIZE, 100), random_masks(rng, 100)

    def ours():
        return [encode_rle(*paste_mask(m, b, PASTED_SIZE), PASTED_SIZE) for m, b in zip(masks, boxes, strict=True)]

    name, references = f"paste + RLE, 100 masks, {PASTED_SIZE[1]}x{PASTED_SIZE[0]}", {}
    if settings.against:
        import torch

        from tools.benchmarks import reference

        reference.import_torchvision()
        from torchvision.models.detection.roi_heads import paste_masks_in_image

        tensors = torch.tensor(masks)[:, None], torch.tensor(boxes)

        def theirs():
            pasted = (paste_masks_in_image(*tensors, PASTED_SIZE)[:, 0] >= 0.5).numpy().astype(np.uint8)
            return [coco_mask.encode(np.asfortranarray(mask)) for mask in pasted]

        differing = sum(a["counts"] != b["counts"].decode() for a, b in zip(ours(), theirs(), strict=True))
        if differing > 2:  # of 100: a pixel at exactly one half may round either way
            raise UserError(f"{name}: {differing} masks differ between the two sides")
        references = {"torchvision and pycocotools": theirs}
    return compare(name, ours, references, settings.rounds)
