"""The imports of the package go one way only: read from the source, without importing anything."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "maskrcnn_jax"
# What each part of the package may import of it, itself aside.
_LEAVES = {"structures", "errors", "options", "paths", "writing"}
ALLOWED = {
    "structures": set(),
    "errors": set(),
    "writing": {"errors", "paths"},
    "page": {"writing"},
    "gallery": {"data", "inference", "page", "paths"},
    "paths": {"errors"},
    "option_fields": {"errors"},
    "model_options": {"option_fields", "errors"},
    "options": {"model_options", "option_fields", "errors", "paths"},
    "config": {"options", "errors", "paths"},
    "distributed": {"structures", "errors", "ops"},
    "anchor_shapes": set(),
    "ops": {"anchor_shapes", "structures", "errors"},
    "models": _LEAVES | {"ops"},
    "weights": _LEAVES | {"models", "ops"},
    "data": _LEAVES,
    "converting": _LEAVES | {"data"},
    "run_folder": _LEAVES | {"config", "data", "distributed", "models"},
    "inference": _LEAVES | {"config", "data", "distributed", "models", "ops"},
    "exporting": _LEAVES | {"anchor_shapes", "data", "inference", "models", "ops"} | {"__version__"},
    "checking": _LEAVES | {"anchor_shapes", "config", "data", "gallery", "inference", "page"},
    "serving": _LEAVES | {"data", "inference", "page"},
    "training": _LEAVES | {"checking", "config", "data", "distributed", "models", "ops", "run_folder", "weights"},
    "evaluation": _LEAVES
    | {"config", "data", "distributed", "gallery", "inference", "models", "ops", "page", "run_folder", "weights"}
    | {"__version__"},
    "api": _LEAVES
    | {
        "config",
        "data",
        "distributed",
        "evaluation",
        "inference",
        "models",
        "ops",
        "run_folder",
        "training",
        "weights",
    },
    "commands": _LEAVES
    | {"api", "checking", "config", "converting", "data", "distributed", "evaluation", "exporting", "inference"}
    | {"models", "ops", "run_folder", "serving", "training", "weights"}
    | {"", "__version__"},  # the functions of the package, which import their modules when they are used
}
FORBIDDEN_LIBRARIES = {
    "structures": {"jax", "flax"},
    "errors": {"jax", "flax"},
    "options": {"jax", "flax", "ml_collections"},
    "anchor_shapes": {"jax", "flax"},
    "ops": {"flax"},
    "data": {"jax", "flax", "optax", "orbax"},
    "converting": {"jax", "flax", "optax", "orbax"},
    "checking": {"jax", "flax", "optax", "orbax"},
    "gallery": {"jax", "flax", "optax", "orbax"},
    "weights": {"torch", "torchvision"},
}
# The code that is there for CPUs alone, and what may import it: everything else gets it from these.
CPU_CODE = "maskrcnn_jax.ops.cpu"
CPU_DOORS = ("maskrcnn_jax.ops.", "maskrcnn_jax.models.layers")
# Reading and writing .pth files needs torch, where it is installed.
EXCEPTIONS = {("maskrcnn_jax.weights.files", "torch")}
ENTRY_POINTS = {"train", "eval", "predict", "tools", "configs", "tests"}


def imported_modules(source: str, module: str) -> set[str]:
    """Return the dotted names that a module imports, also inside functions; ``from a import b`` gives a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join(parents + ([base] if base else []))
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def violations(source: str, module: str) -> list[str]:
    """Return what a module of the package imports although its part may not.

    Args:
        source: text of the module.
        module: dotted name, such as maskrcnn_jax.ops.boxes.
    """
    part = module.split(".")[1]
    if part not in ALLOWED:
        return [f"{module}: {part} is no known part of the package"]
    found = []
    for name in sorted(imported_modules(source, module)):
        first, *rest = name.split(".")
        if first == PACKAGE:
            target = rest[0] if rest else ""
            closed = name.startswith(CPU_CODE) and not module.startswith(CPU_DOORS)
            if closed or (target != part and target not in ALLOWED[part]):
                found.append(f"{module} imports {name}")
        elif (module, first) in EXCEPTIONS:
            continue
        elif first in ENTRY_POINTS or first in FORBIDDEN_LIBRARIES.get(part, set()):
            found.append(f"{module} imports {name}")
    return found


def package_modules():
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name != PACKAGE:
            yield name, path


def test_every_module_imports_only_what_lies_before_it():
    modules = list(package_modules())
    assert len(modules) > 20, "the package was not found"
    found = [violation for name, path in modules for violation in violations(path.read_text(), name)]
    assert not found, "\n".join(found)


def test_no_module_is_called_utils():
    assert not [
        name for name, _ in package_modules() if name.rpartition(".")[2] in {"utils", "util", "helpers", "misc"}
    ]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("maskrcnn_jax.structures", "from maskrcnn_jax.ops import boxes"),
        ("maskrcnn_jax.structures", "import jax"),
        ("maskrcnn_jax.ops.boxes", "from maskrcnn_jax.models.layers import conv"),
        ("maskrcnn_jax.ops.boxes", "from flax import nnx"),
        ("maskrcnn_jax.ops.boxes", "from ..models import layers"),
        ("maskrcnn_jax.ops.nms", "import maskrcnn_jax.models.rpn"),
        ("maskrcnn_jax.models.rpn", "from maskrcnn_jax import training"),
        ("maskrcnn_jax.models.resnet", "from maskrcnn_jax.ops.cpu.max_pool import max_of_slices"),
        ("maskrcnn_jax.data.loader", "def f():\n    import jax.numpy as jnp"),
        ("maskrcnn_jax.data.loader", "from maskrcnn_jax.ops.boxes import box_area"),
        ("maskrcnn_jax.training.loop", "from maskrcnn_jax.evaluation import coco_eval"),
        ("maskrcnn_jax.inference.paste", "from maskrcnn_jax.training.step import train_step"),
        ("maskrcnn_jax.inference.paste", "import predict"),
        ("maskrcnn_jax.training.loop", "from configs import base"),
        ("maskrcnn_jax.extras.thing", "import math"),
    ],
)
def test_a_forbidden_import_is_found(module, source):
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("maskrcnn_jax.ops.masks", "from maskrcnn_jax.ops.roi_align import interpolation_corners\nimport jax"),
        (
            "maskrcnn_jax.models.mask_rcnn",
            "from maskrcnn_jax.models import losses\nfrom maskrcnn_jax.structures import Batch",
        ),
        ("maskrcnn_jax.data.loader", "from maskrcnn_jax.errors import DataError\nfrom . import coco"),
        ("maskrcnn_jax.models.layers", "from maskrcnn_jax.ops.cpu.relu import relu"),
        ("maskrcnn_jax.ops.nms", "from maskrcnn_jax.ops.cpu.nms import nms_one_by_one"),
        ("maskrcnn_jax.inference.detect", "from maskrcnn_jax.data import loader\nimport jax"),
    ],
)
def test_an_allowed_import_is_not_reported(module, source):
    assert violations(source, module) == []
