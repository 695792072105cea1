"""Options: allowed values, the config made of them, configuration files by name."""

import dataclasses
import json
import typing

import pytest
from ml_collections import ConfigDict

from maskrcnn_jax.config import config_names, default_config, load_config, to_options
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.options import DataOptions, ModelOptions, OptimOptions, Options
from maskrcnn_jax.run_folder import load_options, save_options

PARTS = (Options, ModelOptions, OptimOptions, DataOptions)
CHOICES = [
    (part, field.name, field.metadata["choices"])
    for part in PARTS
    for field in dataclasses.fields(part)
    if field.metadata.get("choices")
]


@pytest.mark.parametrize(("part", "name", "choices"), CHOICES)
def test_a_choice_that_does_not_exist_is_named_with_those_that_do(part, name, choices):
    with pytest.raises(UserError, match=f"{part.prefix}{name} is 'l2'; use one of {', '.join(choices)}"):
        part(**{name: "l2"})


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (DataOptions, {"hflip": 1.5}, "data.hflip is 1.5; use a value from 0 to 1"),
        (DataOptions, {"threads": 0}, "data.threads is 0; use at least 1"),
        (
            DataOptions,
            {"short_side": 800, "long_side": 700},
            "data.short_side is 800; use at most data.long_side, 700",
        ),
        (OptimOptions, {"ema_decay": 1.0}, "optim.ema_decay is 1.0; use a value below 1"),
        (OptimOptions, {"loss_scale": 0.5}, "optim.loss_scale is 0.5; use a value from 1"),
        (OptimOptions, {"loss_scale": float("nan")}, "optim.loss_scale is nan; use a value from 1"),
        (OptimOptions, {"loss_scale": 2.0**128}, "optim.loss_scale is 3.4"),
        (OptimOptions, {"loss_scale_interval": 0}, "optim.loss_scale_interval is 0; use at least 1"),
        (
            OptimOptions,
            {"schedule": "multistep"},
            "optim.milestones is () with optim.schedule multistep; use ascending",
        ),
        (OptimOptions, {"schedule": "multistep", "milestones": (3, 3)}, "whole numbers of epochs, such as (16, 22)"),
        (OptimOptions, {"schedule": "multistep", "milestones": (0, 3)}, "optim.milestones is (0, 3)"),
        (OptimOptions, {"schedule": "multistep", "milestones": (1.5, 3)}, "optim.milestones is (1.5, 3)"),
        (OptimOptions, {"gamma": 2.0}, "optim.gamma is 2.0; use a value from 0 to 1"),
        (ModelOptions, {"in_channels": "3"}, "model.in_channels is '3'; use a number"),
        (ModelOptions, {"anchor_sizes": 32}, "model.anchor_sizes is 32; use a tuple of numbers"),
        (
            ModelOptions,
            {"class_weights": (1.0, -1.0)},
            "class_weights is (1.0, -1.0); use a tuple of numbers from 0",
        ),
        (ModelOptions, {"class_weights": (0, 0)}, "not all of them 0"),
        (ModelOptions, {"class_weights": (1.0, float("inf"))}, "use a tuple of numbers from 0"),
        (ModelOptions, {"box_fc_channels": (1024.5,)}, "box_fc_channels is (1024.5,); use a tuple of whole numbers"),
        (ModelOptions, {"class_weights": (10**400,)}, "use a tuple of numbers from 0"),
        (ModelOptions, {"box_conv_channels": (0,)}, "use a tuple of whole numbers from 1"),
        (ModelOptions, {"anchor_sizes": (0, 64)}, "anchor_sizes is (0, 64); use a tuple of numbers from 1"),
        (ModelOptions, {"aspect_ratios": (-1.0,)}, "use a tuple of numbers from 0.01"),
        (ModelOptions, {"anchor_scales": ()}, "model.anchor_scales is empty"),
        (DataOptions, {"short_sides": (640.5,)}, "data.short_sides is (640.5,); use a tuple of whole numbers from 1"),
        (OptimOptions, {"b2": 1.0}, "optim.b2 is 1.0; use a value below 1 such as 0.999"),
        (OptimOptions, {"kind": "sgd", "momentum": 1}, "optim.momentum is 1; use a value below 1"),
        (
            ModelOptions,
            {"class_weights": (1, 2), "classification_loss": "focal"},
            "model.class_weights is for cross entropy; leave it empty with model.classification_loss=focal",
        ),
        (ModelOptions, {"remat": 1}, "model.remat is 1; use True or False"),
        (Options, {"seed": -1}, "seed is -1; use at least 0"),
        (Options, {"batch_size": True}, "batch_size is True; use a number"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_with_what_is(part, changes, message):
    with pytest.raises(UserError) as error:
        part(**changes)
    assert message in str(error.value)


def test_all_wrong_values_are_named_at_once():
    with pytest.raises(UserError, match=r"data\.resize .*; .*data\.hflip"):
        DataOptions(resize="nearest", hflip=-1.0)


def test_a_config_and_its_options_are_the_same():
    assert to_options(default_config()) == Options()
    config = default_config()
    config.model.anchor_sizes = (8, 16, 32, 64, 128)
    config.optim.lr = 0.1
    options = to_options(config)
    assert (options.model.anchor_sizes, options.optim.lr) == ((8, 16, 32, 64, 128), 0.1)
    assert ConfigDict(dataclasses.asdict(options)) == config


def test_a_list_counts_as_a_tuple_so_that_options_are_hashable():
    assert hash(ModelOptions(anchor_sizes=[8, 16, 32, 64, 128])) == hash(
        ModelOptions(anchor_sizes=(8, 16, 32, 64, 128))
    )


def test_whole_numbers_may_be_written_as_floats_and_options_that_are_not_used_may_have_any_value():
    assert DataOptions(short_sides=[640.0, 800]).short_sides == (640, 800)
    assert type(DataOptions(short_sides=(640.0,)).short_sides[0]) is int
    assert OptimOptions(kind="sgd", b2=1.0).b2 == OptimOptions(momentum=1.0).momentum == 1


def test_an_option_that_does_not_exist_is_named():
    config = default_config()
    config.model.unlock().anker_sizes = (8,)
    with pytest.raises(UserError, match="no option model.anker_sizes"):
        to_options(config)


def test_every_configuration_file_has_options_that_are_allowed():
    assert len(config_names()) >= 10
    for name in config_names():
        assert isinstance(to_options(load_config(name)), Options), name


def test_files_are_found_by_name_and_by_path_and_take_an_argument(tmp_path):
    assert load_config("paper:table=2,row=3").optim.lr == 1e-4
    path = tmp_path / "mine.py"
    path.write_text(
        "from maskrcnn_jax.config import load_config\n"
        "def get_config(lr='1'):\n"
        "    config = load_config('shapes')\n"
        "    config.optim.lr = float(lr)\n"
        "    return config\n"
    )
    assert load_config(path).optim.lr == 1
    assert load_config(f"{path}:0.25").optim.lr == 0.25
    with pytest.raises(UserError, match="no config 'r50_pfn'.*r50_fpn"):
        load_config("r50_pfn")


@pytest.mark.parametrize("part", PARTS)
def test_every_option_says_what_it_does(part):
    hints = typing.get_type_hints(part)
    for field in dataclasses.fields(part):
        if not dataclasses.is_dataclass(hints[field.name]):
            assert len(field.metadata["meaning"]) > 10, field.name


def test_options_of_runs_of_an_earlier_version_are_read(tmp_path):
    save_options(Options(), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["data"]["mask_side"] = 640
    content["model"]["box_iou_thresh"] = content["model"].pop("box_fg_iou_thresh")
    del content["optim"]["decay_norms"], content["optim"]["decay_biases"]
    content["optim"]["decay_norm_and_bias"] = True
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert load_options(tmp_path) == Options(optim=OptimOptions(decay_norms=True, decay_biases=True))
