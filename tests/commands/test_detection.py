"""Options of predict and eval by which a trained model detects otherwise, as they are typed."""

import pytest

from maskrcnn_jax.commands import eval as eval_command
from maskrcnn_jax.commands import predict as predict_command
from maskrcnn_jax.commands.app import parse
from maskrcnn_jax.commands.detection import with_detection_options
from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.predictor import Predictor
from maskrcnn_jax.options import Options
from tests.models.tiny import tiny_model, tiny_options

PREDICT = ["--workdir=run", "--input=photos", "--output=out"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.3", 0.3),
        ("person=0.7,dog=0.25", {"person": 0.7, "dog": 0.25}),
        ("0.4,traffic light=0.7", {None: 0.4, "traffic light": 0.7}),
        ("a=b=1", {"a=b": 1.0}),
        ('0.4, "cup, blue=0.7"', {None: 0.4, "cup, blue": 0.7}),
    ],
)
def test_minimum_scores_are_read_for_all_classes_or_by_name(text, expected):
    assert parse(predict_command, [*PREDICT, f"--min_score={text}"]).min_score == expected


@pytest.mark.parametrize("text", ["1.5", "high", "nan", "person=", "0.4,0.5", "person=0.4,person=0.5", ""])
def test_minimum_scores_that_are_none_are_refused(text):
    with pytest.raises(UserError, match="min_score"):
        parse(predict_command, [*PREDICT, f"--min_score={text}"])


def test_options_of_detection_change_the_model_only_if_given():
    categories = Categories.create([1, 2, 3, 4], ["cup", "dog", "person", "tree"])
    model = Predictor(tiny_model(), categories, Options(model=tiny_options()))
    assert with_detection_options(model, parse(eval_command, ["--workdir=run"])) is model
    arguments = ["--workdir=run", "--nms=gaussian", "--nms_thresh=0.4", "--class_agnostic_nms"]
    changed = with_detection_options(model, parse(eval_command, arguments)).options.model
    assert (changed.box_nms_method, changed.box_nms_thresh, changed.box_nms_class_agnostic) == ("gaussian", 0.4, True)
    options = parse(predict_command, [*PREDICT, "--nms=linear", "--max_detections=7"])
    assert with_detection_options(model, options).network.options == (
        tiny_options(box_nms_method="linear", box_detections_per_img=7)
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [("cup", ["cup"]), ("cup, dog", ["cup", "dog"]), ('"cup, blue",dog', ["cup, blue", "dog"]), ("", [""])],
)
def test_names_of_classes_are_read(text, expected):
    assert parse(predict_command, [*PREDICT, f"--classes={text}"]).classes == expected


def test_choices_of_prediction_are_read():
    options = parse(
        predict_command,
        [*PREDICT, "--classes=cup,dog", "--tile=512", "--overlap=0.3", "--whole_image", "--tta=flip,400"],
    )
    assert (options.classes, options.tile, options.overlap) == (["cup", "dog"], 512, 0.3)
    assert options.whole_image and options.tta == "flip,400"
    with pytest.raises(UserError, match="--masks"):
        parse(predict_command, [*PREDICT, "--masks=jpg"])
