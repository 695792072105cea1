"""Draw what a model finds in an image, a folder of images or a video.

    maskrcnn-jax predict --workdir=runs/r50 --input=IMAGE|DIR|VIDEO --output=DIR
    maskrcnn-jax predict --weights=torchvision:maskrcnn_resnet50_fpn_v2 --input=photo.jpg --output=DIR
    maskrcnn-jax predict --weights=model.pth --config=torchvision_r50_fpn_v2 --input=photo.jpg --output=DIR
    maskrcnn-jax predict --weights=r50.onnx --runtime=openvino --input=photo.jpg --output=DIR

The output folder gets the pictures or the video, detections.json (COCO results), images.json (the file or frame of
each image_id), detections.csv and counts.csv. Folders inside the folder of images are not read. Of a file with several
pages or frames, the first is read. Pictures below 512 pixels are enlarged so that their captions can be read.
"""

import argparse

from maskrcnn_jax.commands.app import add_model_options, add_runtime_options, at_least, load
from maskrcnn_jax.commands.detection import (
    add_detection_options,
    class_names,
    minimum_scores,
    share,
    with_detection_options,
)
from maskrcnn_jax.errors import UserError

_CHOICES = ("min_score", "classes", "tile", "overlap", "whole_image", "tta")  # of Predictor.stream


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_model_options(parser)
    add_runtime_options(parser)
    parser.add_argument("--input", required=True, metavar="PATH", help="an image, a folder of images or a video")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the pictures and the JSON files")
    parser.add_argument(
        "--min_score",
        type=minimum_scores,
        default=0.5,
        metavar="SCORE",
        help="leave out detections with a lower score; %(default)s. For some classes by name: 0.4,person=0.7",
    )
    parser.add_argument(
        "--classes",
        type=class_names,
        metavar="NAMES",
        help="leave out other classes; such as person,dog. A name with a comma is quoted",
    )
    add_detection_options(parser)
    large = parser.add_argument_group("large images")
    large.add_argument(
        "--tile", type=at_least(1), metavar="PIXELS", help="detect in tiles of this size and merge the results"
    )
    large.add_argument(
        "--overlap", type=share, default=0.2, metavar="SHARE", help="of neighbouring tiles, at least; %(default)s"
    )
    large.add_argument("--whole_image", action="store_true", help="detect in the whole image, too")
    files = parser.add_argument_group("files for other tools")
    files.add_argument(
        "--masks",
        choices=("png",),
        help="label images of 16 bits: instances/ and classes/, whose pixels are category ids",
    )
    files.add_argument(
        "--polygons",
        choices=("geojson", "labelme"),
        help="a file with polygons for each image; labelme's can be corrected and converted to a dataset",
    )


def main(options: argparse.Namespace) -> None:
    """Predict."""
    from maskrcnn_jax.inference.annotation_files import Annotations
    from maskrcnn_jax.inference.media import is_video, list_images, predict_images, predict_video

    paths = None if is_video(options.input) else list_images(options.input)
    model = with_detection_options(load(options), options)
    channels = model.options.model.in_channels
    if paths is None and channels != 3:
        raise UserError(f"the video {options.input} has 3 channels, but model.in_channels is {channels}; give images")
    choices = {name: getattr(options, name) for name in _CHOICES}
    annotations = Annotations(masks=options.masks is not None, polygons=options.polygons or "")
    if paths is None:
        frames = predict_video(model, options.input, options.output, annotations=annotations, **choices)
        print(f"{frames} frames drawn into {options.output}")
        return
    unreadable = predict_images(model, paths, options.output, annotations=annotations, **choices)
    drawn = len(paths) - len(unreadable)
    print(f"{drawn} images drawn into {options.output}, {len(unreadable)} unreadable files skipped")
