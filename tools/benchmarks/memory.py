"""Peak memory of a training step, each side in a process of its own: of the device, or of the process on a CPU."""

import tempfile
from pathlib import Path

import jax
import numpy as np

from tools.benchmarks import train
from tools.benchmarks.child import peak_memory, run_child
from tools.benchmarks.inputs import Objects, Settings, make_batch, make_model, on_gpu, read_photos
from tools.benchmarks.timing import Row, Spread, wait_for

STEPS = 3
MEMORY_FORMATS = ("contiguous", "channels_last")  # torch's, tried one by one


def run(settings: Settings) -> list[Row]:
    """Measure a step with full quotas in turns; libraries alone take some of it, which a second row leaves out."""
    rounds, settings = settings.rounds or 3, train.defaults(settings)
    with tempfile.TemporaryDirectory() as folder:
        _write_inputs(settings, Path(folder))
        cache = {"JAX_COMPILATION_CACHE_DIR": str(Path(folder) / "cache")}

        def measure_one():
            return run_child("memory:measure_ours", settings, folder, environment=cache)

        cold = measure_one()  # which fills the cache, as the first start of a training does
        ours, theirs = [], {name: [] for name in MEMORY_FORMATS if settings.against}
        for _ in range(rounds):
            ours.append(measure_one())
            for name, measured in theirs.items():
                measured.append(run_child("memory:measure_reference", settings, folder, name))
    said = settings.describe() | {"ours_when_it_compiles_mb": cold["peak"], "reference": theirs, "ours": ours}
    where = "GPU memory" if on_gpu() else "process"
    title = f"peak memory of training, batch {settings.batch_size}, {where}"

    def row(title, value):
        spreads = {name: Spread.of([value(m) for m in measured]) for name, measured in theirs.items()}
        best = min(spreads, key=lambda name: spreads[name].median, default=None)
        reference = {"reference": spreads[best], "reference_name": f"torchvision, {best}"} if spreads else {}
        return Row(title, Spread.of([value(m) for m in ours]), **reference, unit="MB", settings=said)

    return [row(title, lambda m: m["peak"]), row(f"{title}, less libraries", lambda m: m["peak"] - m["libraries"])]


def _write_inputs(settings: Settings, folder: Path) -> None:
    """Write the weights and the objects that both processes read."""
    photos, arrays = read_photos(settings, settings.batch_size), None
    if settings.against:
        from tools.benchmarks import reference

        _, arrays = reference.make_reference(settings, photos)
    objects = train.make_objects(settings, make_model(settings, arrays), photos)["full quotas"]
    np.savez(folder / "weights.npz", **(arrays or {}))
    for i, one in enumerate(objects):
        np.savez(folder / f"objects{i}.npz", **one._asdict())


def _read_inputs(settings: Settings, folder: str) -> tuple[dict | None, list[Objects]]:
    arrays = dict(np.load(Path(folder) / "weights.npz"))
    objects = [Objects(**np.load(Path(folder) / f"objects{i}.npz")) for i in range(settings.batch_size)]
    return arrays or None, objects


def measure_ours(settings: Settings, folder: str) -> dict:
    """Train some steps; returns the peak and what the libraries took before, in MB."""
    wait_for(jax.numpy.zeros(1) + 1)
    libraries = 0.0 if on_gpu() else peak_memory()
    arrays, objects = _read_inputs(settings, folder)
    batch = make_batch(read_photos(settings, settings.batch_size), objects)
    training = train.OurTraining(make_model(settings, arrays), batch)
    del arrays
    for _ in range(STEPS):
        wait_for(training.step())
    if on_gpu():
        return {"peak": jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 1e6, "libraries": libraries}
    return {"peak": peak_memory(), "libraries": libraries}


def measure_reference(settings: Settings, folder: str, memory_format: str) -> dict:
    """Do the same with torchvision's model."""
    import torch

    from tools.benchmarks import reference
    from tools.torchvision_reference import build_reference, import_torchvision, load_reference

    import_torchvision()
    device, layout = reference.torch_device(), reference.MEMORY_FORMATS[memory_format]
    libraries = 0.0 if device == "cuda" else peak_memory()
    arrays, objects = _read_inputs(settings, folder)
    model = build_reference(settings.model_options, settings.num_classes)
    load_reference(model, arrays)
    del arrays
    model = model.to(device).to(memory_format=layout)
    variant = reference.Variant("", model, layout, device == "cuda" and settings.dtype == "bfloat16")
    batch = make_batch(read_photos(settings, settings.batch_size), objects)
    inputs, targets = reference.image_list(batch.images, batch.sizes, variant), reference.make_targets(objects)
    training = reference.ReferenceTraining(variant, inputs, targets, train.LEARNING_RATE)
    for _ in range(STEPS):
        wait_for(training.step())
    peak = torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else peak_memory()
    return {"peak": peak, "libraries": libraries}
