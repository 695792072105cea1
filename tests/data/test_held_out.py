"""Holding out images for evaluation: shares of classes, groups, and the record that keeps the choice."""

import json
import logging
import pickle

import numpy as np
import pytest

from maskrcnn_jax import api
from maskrcnn_jax.data.dataset import load_coco, load_dataset, load_whole
from maskrcnn_jax.data.held_out import choose_held_out, record_held_out, take_part
from maskrcnn_jax.data.shapes import write_dataset
from maskrcnn_jax.data.tfds_builder import build
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.options import DataOptions, Options
from maskrcnn_jax.run_folder import load_options, save_options

NAMES = ((1, "cat"), (2, "dog"), (3, "rare"))


def boxes(labels):
    """Returns an annotation for each (image id, category id)."""
    return [
        {"id": i, "image_id": image, "category_id": label, "bbox": [1, 1, 9, 9], "iscrowd": 0, "area": 81}
        for i, (image, label) in enumerate(labels, start=1)
    ]


def many(dataset, num_images=200, seed=0):
    """Writes images of which a tenth have a rare class, and opens them."""
    rng = np.random.default_rng(seed)
    labels = [(i, 1 + int(rng.integers(2))) for i in range(1, num_images + 1) for _ in range(int(rng.integers(1, 4)))]
    labels += [(i, 3) for i in range(1, num_images + 1) if i % 10 == 0]
    root = dataset.write([(20, 24)] * num_images, boxes(labels), NAMES)
    return load_coco(root, "train2017")


def images_with(index, rows, label):
    return sum(label in index.annotations(row).labels for row in rows)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_each_class_has_its_share(dataset, share):
    index = many(dataset)
    held_out = choose_held_out(index, share, np.arange(200), seed=0)
    rows = np.flatnonzero(held_out)
    assert len(rows) == pytest.approx(200 * share, abs=5)
    for label in (1, 2, 3):
        assert images_with(index, rows, label) == pytest.approx(images_with(index, range(200), label) * share, abs=1.5)


def test_the_choice_is_seeded(dataset):
    index = many(dataset)
    first, again, other = (choose_held_out(index, 0.2, np.arange(200), seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_class_of_one_image_is_trained_on(dataset):
    root = dataset.write([(20, 24)] * 10, boxes([(i, 1) for i in range(1, 11)] + [(4, 3)]), NAMES)
    index = load_coco(root, "train2017")
    for seed in range(20):
        assert not choose_held_out(index, 0.2, np.arange(10), seed)[3]


@pytest.mark.parametrize(("share", "num"), [(0.01, 2), (0.9, 2), (0.2, 3)])
def test_neither_part_is_empty(dataset, share, num):
    index = load_coco(dataset.write([(20, 24)] * num), "train2017")
    held_out = choose_held_out(index, share, np.arange(num), seed=0)
    assert 0 < held_out.sum() < num


def write_videos(dataset, name):
    """Writes 12 videos of 2 to 9 frames, whose names ``name`` makes of the numbers of video and frame."""
    frames = [(video, frame) for video in range(12) for frame in range(2 + video % 8)]
    images = [
        {"id": i, "file_name": name(*which), "height": 20, "width": 24, "video_id": which[0]}
        for i, which in enumerate(frames, start=1)
    ]
    root = dataset.write([], images=images)
    for image in images:
        path = root / "train2017" / image["file_name"]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    return load_coco(root, "train2017"), np.array([video for video, _ in frames])


@pytest.mark.parametrize(
    ("group", "name"),
    [
        ("folder", "video {}/{}.jpg"),
        ("video_id", "{:03d}{:05d}.jpg"),
        (r"^(.*)_\d+", "clip-{}_{}.jpg"),
    ],
)
def test_frames_of_a_video_stay_together(dataset, tmp_path, group, name):
    index, videos = write_videos(dataset, name.format)
    path = tmp_path / "split.json"
    record_held_out(path, index, share=0.25, group=group, seed=0)
    parts = [take_part(index, path, held_out=held_out) for held_out in (False, True)]
    found = [set(videos[np.isin(index.file_names, part.file_names)].tolist()) for part in parts]
    assert found[0] | found[1] == set(range(12)) and not found[0] & found[1]
    assert len(parts[1]) == pytest.approx(0.25 * len(index), abs=4)


@pytest.mark.parametrize(
    "form",
    [
        lambda video: f"https://example.org/{'folder/' * 20}{video}.mp4",
        lambda video: {"video": video},
        lambda video: ["a", video],
    ],
)
def test_a_field_that_groups_may_be_a_long_text_or_an_object(dataset, tmp_path, form):
    images = [
        {"id": i, "file_name": f"{i}.jpg", "height": 20, "width": 24, "source": form(i % 4)} for i in range(1, 13)
    ]
    index, path = load_coco(dataset.write([(20, 24)] * 12, images=images), "train2017"), tmp_path / "split.json"
    record_held_out(path, index, share=0.25, group="source", seed=0)
    assert len(take_part(index, path, held_out=True)) == 3


@pytest.mark.parametrize(
    ("group", "told"),
    [
        ("folder", "all 5 are in one group"),
        ("camera", "no image in .* has such a field"),
        ("(a", "not a regular expression"),
        ("(z+)", "found in no file name, such as 1.jpg"),
    ],
)
def test_groups_that_are_none_are_refused(dataset, tmp_path, group, told):
    index = load_coco(dataset.write([(20, 24)] * 5), "train2017")
    with pytest.raises(UserError, match=told):
        record_held_out(tmp_path / "split.json", index, share=0.2, group=group, seed=0)


def test_the_parts_are_datasets_with_all_that_belongs_to_their_images(dataset, tmp_path):
    index, path = many(dataset, 30), tmp_path / "split.json"
    record_held_out(path, index, share=0.3, group="", seed=0)
    seen = []
    for held_out in (False, True):
        part = take_part(index, path, held_out=held_out)
        for row, name in enumerate(part.file_names.tolist()):
            whole = index.file_names.tolist().index(name)
            for a, b in zip(part.annotations(row), index.annotations(whole), strict=True):
                np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(part.masks(row), index.masks(whole))
            np.testing.assert_array_equal(part.read_image(row), index.read_image(whole))
            seen.append(whole)
    assert sorted(seen) == list(range(30))


def test_missing_files_are_those_of_the_part(dataset, tmp_path):
    root = dataset.write([(20, 24)] * 10)
    dataset.image_path("4.jpg").unlink()
    index = load_coco(root, "train2017", skip_broken=True)
    path = tmp_path / "split.json"
    names = [f"{i}.jpg" for i in range(1, 11)]
    path.write_text(json.dumps({"train": names[5:], "val": names[:5]}))
    assert take_part(index, path, held_out=True).missing.tolist() == [3]
    assert take_part(index, path, held_out=False).missing.tolist() == []


def test_images_that_came_later_are_for_training(dataset, tmp_path, caplog):
    index, path = load_coco(dataset.write([(20, 24)] * 6), "train2017"), tmp_path / "split.json"
    path.write_text(json.dumps({"train": ["1.jpg", "2.jpg"], "val": ["3.jpg"]}))
    with caplog.at_level(logging.WARNING, "maskrcnn_jax"):
        assert len(take_part(index, path, held_out=False)) == 5
    assert "3 images are not in" in caplog.text
    assert take_part(index, path, held_out=True).file_names.tolist() == ["3.jpg"]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"train": 3, "val": []}', '{"train": [], "val": ["other.jpg"]}'])
def test_a_record_that_names_no_images_is_refused(dataset, tmp_path, text):
    index, path = load_coco(dataset.write([(20, 24)] * 3), "train2017"), tmp_path / "split.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"split.json (does not say|holds out 0 of the 3)"):
        take_part(index, path, held_out=True)


@pytest.fixture
def shapes(tmp_path):
    write_dataset(tmp_path / "shapes", num_train=20, num_val=1, image_size=64, seed=1)
    return tmp_path / "shapes"


def hold_out(root, workdir, **data):
    options = Options(data=DataOptions(coco_dir=str(root), val_share=0.25, **data))
    return api._hold_out(options, workdir)


def test_a_run_records_the_choice_and_evaluates_on_it(shapes, tmp_path):
    options = hold_out(shapes, tmp_path / "run")
    train, held_out = (load_dataset(options.data, split) for split in ("train2017", "val2017"))
    assert len(held_out) in (4, 5, 6) and len(train) == 20 - len(held_out)
    assert not set(train.file_names) & set(held_out.file_names)
    recorded = json.loads((tmp_path / "run" / "split.json").read_text())
    assert sorted(recorded["val"]) == sorted(held_out.file_names.tolist())
    # What evaluates the run later knows it, also where the folder has been moved.
    save_options(options, tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    again = api.evaluation_options(load_options(tmp_path / "moved"))
    np.testing.assert_array_equal(load_dataset(again.data, "val2017").file_names, held_out.file_names)
    whole = api.evaluation_options(again, split="val2017")
    assert len(load_dataset(whole.data, "val2017")) == 1


def test_a_resumed_run_keeps_its_choice_and_a_run_that_never_started_does_not(shapes, tmp_path):
    run = tmp_path / "run"
    first = hold_out(shapes, run)
    save_options(first, run)
    before = (run / "split.json").read_bytes()
    changed = hold_out(shapes, run, val_group=r"(\d+)1\.jpg")  # nothing was trained yet
    assert (run / "split.json").read_bytes() != before
    save_options(changed, run)
    before = (run / "split.json").read_bytes()
    (run / "checkpoints" / "20").mkdir(parents=True)
    assert hold_out(shapes, run, val_group=r"(\d+)1\.jpg") == changed
    assert (run / "split.json").read_bytes() == before
    with pytest.raises(UserError, match="was started with data.val_share 0.25 and data.val_group"):
        hold_out(shapes, run)


def test_a_run_that_trained_on_all_images_cannot_hold_out_some(shapes, tmp_path):
    save_options(Options(data=DataOptions(coco_dir=str(shapes))), tmp_path)
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    with pytest.raises(UserError, match="was started with data.val_share 0.0"):
        hold_out(shapes, tmp_path)
    assert not (tmp_path / "split.json").exists()


def test_a_share_without_a_record_is_refused(shapes):
    with pytest.raises(UserError, match="not which images are held out"):
        load_dataset(DataOptions(coco_dir=str(shapes), val_share=0.2), "val2017")
    with pytest.raises(UserError, match="data.train_split and data.eval_split are both a"):
        DataOptions(val_share=0.2, train_split="a", eval_split="a")


def test_images_of_tfds_are_held_out_as_those_of_the_folder(shapes, tmp_path):
    build(shapes, tmp_path / "tfds", splits=["train2017"])
    path = tmp_path / "split.json"
    data = DataOptions(source="tfds", tfds_dir=str(tmp_path / "tfds"), split_file=str(path))
    record_held_out(path, load_whole(data, "train2017"), share=0.3, group="", seed=0)
    found = load_dataset(data, "val2017")
    expected = load_dataset(DataOptions(coco_dir=str(shapes), split_file=str(path)), "val2017")
    found = pickle.loads(pickle.dumps(found))  # as for a loading process
    np.testing.assert_array_equal(found.file_names, expected.file_names)
    for i in range(len(expected)):
        np.testing.assert_array_equal(found.masks(i), expected.masks(i))
        np.testing.assert_array_equal(found.read_image(i), expected.read_image(i))
