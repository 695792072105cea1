"""A training step, whole and by part: full quotas of RoIs, and as few positives as an ordinary photograph has."""

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from maskrcnn_jax.distributed import make_mesh, replicated, shard_batch
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.options import OptimOptions
from maskrcnn_jax.structures import Batch
from maskrcnn_jax.training.optimizer import make_optimizer
from maskrcnn_jax.training.step import TrainStep, compiler_options, create_train_state
from tools.benchmarks.inputs import (
    Objects,
    Settings,
    default_dtype,
    make_batch,
    make_model,
    objects_that_fill_the_quota,
    on_gpu,
    pad_images,
    random_objects,
    read_photos,
)
from tools.benchmarks.timing import Row, compare

LEARNING_RATE = 1e-7  # so small that the proposals, and with them the work, stay the same from round to round
ORDINARY = 7  # objects in an image of COCO, on average
SPARE = 1.25  # times the quota, since rounding and the first steps move a few proposals


def defaults(settings: Settings) -> Settings:
    """Return the settings with the sizes of this subject: 512x512 and batch 2; 800x1344 and 16 on a GPU."""
    if on_gpu():
        return settings.having(height=800, width=1333, batch_size=16, rounds=10, dtype=default_dtype())
    return settings.having(height=512, width=512, batch_size=2, rounds=5, dtype=default_dtype())


def run(settings: Settings) -> list[Row]:
    """Measure a step with full quotas, its parts, and a step with few positives."""
    settings = defaults(settings)
    photos = read_photos(settings, settings.batch_size)
    arrays, variants = None, []
    if settings.against:
        from tools.benchmarks import reference

        torch_model, arrays = reference.make_reference(settings, photos)
        variants = reference.make_variants(torch_model, settings)
    rows, ours = [], None
    for kind, objects in make_objects(settings, make_model(settings, arrays), photos).items():
        batch = make_batch(photos, objects)
        if ours is None:
            ours = OurTraining(make_model(settings, arrays), batch)
        ours.load(batch)
        theirs = {}
        said = settings.describe() | {"objects": [len(o.labels) for o in objects]}
        metrics = jax.device_get(ours.step()[1])
        said |= {"our_positives": float(metrics["num_foreground"]), "our_loss": float(metrics["loss"])}
        for variant in variants:
            inputs = reference.image_list(batch.images, batch.sizes, variant)
            training = reference.ReferenceTraining(variant, inputs, reference.make_targets(objects), LEARNING_RATE)
            said |= {"reference_positives": training.num_positives(), "reference_loss": float(training.forward())}
            theirs[variant.name] = training
        name = f"training step, batch {settings.batch_size}, {kind}"
        rows.append(compare(name, ours.step, {n: t.step for n, t in theirs.items()}, settings.rounds, **said))
        speed = {"images_per_s": settings.batch_size / rows[-1].ours.median}
        rows[-1] = rows[-1]._replace(settings=rows[-1].settings | speed)
        if kind == "full quotas":
            best = rows[-1].reference_name
            for part in ("forward", "gradient"):
                references = {best: getattr(theirs[best], part)} if theirs else {}
                title = f"training, batch {settings.batch_size}: {part}"
                rows.append(compare(title, getattr(ours, part), references, settings.rounds, **said))
    return rows


def make_objects(settings: Settings, model: MaskRCNN, photos: list[np.ndarray]) -> dict[str, list[Objects]]:
    """Return the objects of every image: so that positives fill their quota, and as in a photograph."""
    rng = np.random.default_rng(settings.seed)
    quota = model.options.box_batch_size_per_image * model.options.box_positive_fraction * SPARE
    boxes, valid = _proposals(model, *pad_images(photos))
    return {
        "full quotas": [
            objects_that_fill_the_quota(settings, b[v], quota, rng) for b, v in zip(boxes, valid, strict=True)
        ],
        "few positives": [random_objects(settings, ORDINARY, rng) for _ in photos],
    }


def _proposals(model: MaskRCNN, images: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes [B, N, 4] that a training step samples from, and which are valid."""
    model.train()
    graphdef, state = nnx.split(model)

    def propose(state, images, sizes):
        model = nnx.merge(graphdef, state)
        levels = model.features(images, sizes)
        anchors = model.anchors(levels, images.shape[1:3])
        return model.propose(*model.rpn(levels), anchors, sizes, train=True)

    found = jax.device_get(jax.jit(propose)(state, images, sizes))
    return found.boxes, found.valid


def mesh_for(batch_size: int) -> Mesh:
    """Return a mesh of as many devices as the batch can be divided among; of one where these are GPUs."""
    number = 1 if on_gpu() else max(n for n in range(1, jax.device_count() + 1) if batch_size % n == 0)
    return make_mesh(jax.devices()[:number])


class OurTraining:
    """Our training on one batch: loss, gradient and the optimizer's step, as the training loop has them."""

    def __init__(self, model: MaskRCNN, batch: Batch):
        mesh = mesh_for(len(batch.images))
        optim = OptimOptions(kind="sgd", decay_norms=True, decay_biases=True, clip_norm=0.0)
        optimizer = make_optimizer(optim, lambda _: LEARNING_RATE)
        graphdef, self.state = create_train_state(model, optimizer, mesh, optim)
        self._mesh, self.key = mesh, jax.device_put(jax.random.key(0), replicated(mesh))
        self.load(batch)
        self._step = TrainStep(graphdef, optimizer, mesh, optim)

        def loss(params, variables, batch, key):
            return sum(nnx.merge(graphdef, params, variables, copy=True).losses(batch, key)[0].values())

        options = compiler_options(mesh)
        self._forward = jax.jit(loss, compiler_options=options)
        self._gradient = jax.jit(jax.value_and_grad(loss), compiler_options=options)

    def load(self, batch: Batch) -> None:
        """Work on this batch from now on."""
        self.batch = shard_batch(batch, self._mesh)

    def forward(self) -> jax.Array:
        """Return the loss."""
        return self._forward(self.state.params, self.state.variables, self.batch, self.key)

    def gradient(self) -> tuple[jax.Array, nnx.State]:
        """Return the loss and its gradient."""
        return self._gradient(self.state.params, self.state.variables, self.batch, self.key)

    def step(self) -> tuple:
        """Do one whole step; returns the new state and the metrics."""
        self.state, metrics = self._step(self.state, self.batch, self.key)
        return self.state, metrics
