"""Draw what a trained model finds on an image, a folder of images or a video.

    python predict.py --workdir=runs/shapes --input=IMAGE|DIR|VIDEO --output=DIR [--min_score=0.5]
    python predict.py --config=configs/torchvision_r50_fpn_v2.py --weights=FILE_OR_NAME --input=... --output=DIR

The output folder gets the pictures or the video, detections.json (COCO results) and images.json (which file or frame
each image_id is). A folder is read without the folders inside it. Pictures below 512 pixels are enlarged, so that
their captions can be read.
"""

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from configs import base
from maskrcnn_jax.cli import define_model_flags, find_config, load_model, run_app
from maskrcnn_jax.data.loader import buckets_for
from maskrcnn_jax.data.transforms import RESIZE, resize_image, resized_size
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.evaluation.files import Label, Prepare, is_video, list_images, predict_images, predict_video
from maskrcnn_jax.evaluation.inference import make_detect
from maskrcnn_jax.structures import Batch

STRIDE = 32  # of the coarsest backbone level; padded sides are multiples of it

FLAGS = flags.FLAGS
define_model_flags()
flags.DEFINE_string("input", None, "An image, a folder of images or a video.", required=True)
flags.DEFINE_string("output", None, "Folder for the pictures and the JSON files.", required=True)
flags.DEFINE_float("min_score", 0.5, "Detections below are left out.", lower_bound=0.0, upper_bound=1.0)


def make_prepare(data: ConfigDict) -> Prepare:
    """Resize images as in training and pad them to one of a few sizes, so that few shapes are compiled."""
    buckets = buckets_for(data.short_side, data.long_side, data.buckets)

    def prepare(image: np.ndarray) -> Batch:
        height, width = size = resized_size(*image.shape[:2], data.short_side, data.long_side, data.resize)
        exact = (-(-height // STRIDE) * STRIDE, -(-width // STRIDE) * STRIDE)
        padded = next((bucket for bucket in buckets if bucket[0] >= height and bucket[1] >= width), exact)
        images = np.zeros((1, *padded, image.shape[2]), RESIZE[data.resize])
        images[0, :height, :width] = resize_image(image, size, data.resize)
        return Batch(
            images=images,
            sizes=np.array([size], np.int32),
            original_sizes=np.array([image.shape[:2]], np.int32),
            image_index=np.zeros(1, np.int32),
            valid=np.ones(1, bool),
            gt=None,
        )

    return prepare


def main() -> None:
    paths = None if is_video(FLAGS.input) else list_images(FLAGS.input)
    config = find_config(base.get_config())
    channels = config.model.in_channels
    if paths is None and channels != 3:
        raise UserError(f"the video {FLAGS.input} has 3 channels where model.in_channels is {channels}; give images")
    model, categories = load_model(config)
    columns = zip(categories.labels, categories.ids, categories.names, strict=True)
    labels = {label: Label(category_id, name) for label, category_id, name in columns}
    call = {"labels": labels, "min_score": FLAGS.min_score, "aligned_masks": config.model.roi_aligned}
    detect, prepare = make_detect(model), make_prepare(config.data)
    if paths is None:
        frames = predict_video(detect, prepare, FLAGS.input, FLAGS.output, **call)
        print(f"{frames} frames drawn into {FLAGS.output}")
        return
    unreadable = predict_images(detect, prepare, paths, FLAGS.output, channels=channels, **call)
    print(
        f"{len(paths) - len(unreadable)} images drawn into {FLAGS.output}, {len(unreadable)} unreadable files skipped"
    )


if __name__ == "__main__":
    run_app(main)
