"""Draw what a trained model finds on an image, a folder of images or a video.

    python predict.py --workdir=runs/shapes --input=IMAGE|DIR|VIDEO --output=DIR [--min_score=0.5]
    python predict.py --weights=NAME --input=... --output=DIR
    python predict.py --weights=FILE --config=configs/torchvision_r50_fpn_v2.py --input=... --output=DIR

The output folder gets the pictures or the video, detections.json (COCO results) and images.json (which file or frame
each image_id is). A folder is read without the folders inside it. Pictures below 512 pixels are enlarged, so that
their captions can be read.
"""

from absl import flags

from maskrcnn_jax.commands.app import define_model_flags, find_config, load_model, run_app
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.media import is_video, list_images, predict_images, predict_video
from maskrcnn_jax.inference.predictor import MIN_SCORE, Predictor

FLAGS = flags.FLAGS
define_model_flags()
flags.DEFINE_string("input", None, "An image, a folder of images or a video.", required=True)
flags.DEFINE_string("output", None, "Folder for the pictures and the JSON files.", required=True)
flags.DEFINE_float("min_score", MIN_SCORE, "Detections below are left out.", lower_bound=0.0, upper_bound=1.0)


def main() -> None:
    paths = None if is_video(FLAGS.input) else list_images(FLAGS.input)
    config = find_config()
    channels = config.model.in_channels
    if paths is None and channels != 3:
        raise UserError(f"the video {FLAGS.input} has 3 channels where model.in_channels is {channels}; give images")
    predictor = Predictor(*load_model(config), config)
    if paths is None:
        frames = predict_video(predictor, FLAGS.input, FLAGS.output, min_score=FLAGS.min_score)
        print(f"{frames} frames drawn into {FLAGS.output}")
        return
    unreadable = predict_images(predictor, paths, FLAGS.output, min_score=FLAGS.min_score)
    print(
        f"{len(paths) - len(unreadable)} images drawn into {FLAGS.output}, {len(unreadable)} unreadable files skipped"
    )


if __name__ == "__main__":
    run_app(main)
