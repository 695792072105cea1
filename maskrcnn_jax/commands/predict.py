"""Draw what a model finds in an image, a folder of images or a video.

    maskrcnn-jax predict --workdir=runs/r50 --input=IMAGE|DIR|VIDEO --output=DIR
    maskrcnn-jax predict --weights=torchvision:maskrcnn_resnet50_fpn_v2 --input=photo.jpg --output=DIR
    maskrcnn-jax predict --weights=model.pth --config=torchvision_r50_fpn_v2 --input=photo.jpg --output=DIR
    maskrcnn-jax predict --weights=r50.onnx --runtime=openvino --input=photo.jpg --output=DIR

The output folder gets the pictures or the video, detections.json (COCO results) and images.json (the file or frame of
each image_id). Folders inside the folder of images are not read. Of a
file with several pages or frames, the first is read. Pictures below 512 pixels are enlarged so that their
captions can be read.
"""

import argparse

from maskrcnn_jax.commands.app import add_model_options, add_runtime_options, load
from maskrcnn_jax.errors import UserError


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_model_options(parser)
    add_runtime_options(parser)
    parser.add_argument("--input", required=True, metavar="PATH", help="an image, a folder of images or a video")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the pictures and the JSON files")
    parser.add_argument(
        "--min_score",
        type=_score,
        default=0.5,
        metavar="SCORE",
        help="leave out detections with a lower score; %(default)s",
    )


def main(options: argparse.Namespace) -> None:
    """Predict."""
    from maskrcnn_jax.inference.media import is_video, list_images, predict_images, predict_video

    paths = None if is_video(options.input) else list_images(options.input)
    model = load(options)
    channels = model.options.model.in_channels
    if paths is None and channels != 3:
        raise UserError(f"the video {options.input} has 3 channels, but model.in_channels is {channels}; give images")
    if paths is None:
        frames = predict_video(model, options.input, options.output, min_score=options.min_score)
        print(f"{frames} frames drawn into {options.output}")
        return
    unreadable = predict_images(model, paths, options.output, min_score=options.min_score)
    drawn = len(paths) - len(unreadable)
    print(f"{drawn} images drawn into {options.output}, {len(unreadable)} unreadable files skipped")


def _score(text: str) -> float:
    score = float(text)
    if not 0 <= score <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return score
