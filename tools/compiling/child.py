"""Compiles a program in a process of its own: ``python -m tools.compiling.child SETTINGS FOLDER``.

SETTINGS is a JSON object with what ``compile_for`` passes on; XLA writes the program's text and its memory to FOLDER.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from maskrcnn_jax.config import to_options
from tools.compiling.program import lower_detect, lower_train_step
from tools.compiling.targets import Target, parse_target

# Without a GPU to measure on, XLA finds no tiles for its own matrix products and stops; those of cuBLAS need none.
_COMPILER_OPTIONS: dict[str, dict] = {"cuda": {"xla_gpu_enable_triton_gemm": False}, "tpu": {}}


def main() -> None:
    """Compile."""
    settings, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    options = to_options(ConfigDict(settings["config"]))
    target = parse_target(settings["topology"], settings["slices"])
    devices = _devices(target, settings["topology"])
    if settings["what"] == "train":
        lowered = lower_train_step(options, settings["num_classes"], settings["num_objects"], devices)
    else:
        lowered = lower_detect(options, settings["num_classes"], devices)
    compiled = lowered.compile({"xla_dump_to": str(folder)} | _COMPILER_OPTIONS[target.chip.platform])
    memory = compiled.memory_analysis()
    if memory is not None:
        (folder / "code_bytes").write_text(str(memory.generated_code_size_in_bytes))


def _devices(target: Target, topology: str) -> Sequence:
    """Return the devices of a topology; libtpu or the CUDA plugin describes them, none has to be there."""
    if target.chip.platform == "cuda":
        description = (Path(__file__).parent / f"{target.name}.txtpb").read_text()
        nodes, gpus = target.shape
        return topologies.get_topology_desc(
            platform="cuda", topology_name=target.name, target_config=description, topology=f"1x{nodes}x{gpus}"
        ).devices
    arguments: dict = {"num_slices": target.slices} if target.slices > 1 else {}
    if target.name == "v4":  # else each of a chip's two cores would be a device
        arguments["chip_config_name"] = "megacore"
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **arguments).devices


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)  # a program from the cache would not be dumped
    main()
