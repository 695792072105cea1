import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from maskrcnn_jax.data import shapes
from maskrcnn_jax.data.dataset import load_coco
from maskrcnn_jax.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    shapes.write_dataset(root, num_train=150, num_val=20, image_size=128, seed=0)
    return root


def test_the_layout_is_cocos_and_pycocotools_reads_it(root):
    reference = COCO(root / "annotations" / "instances_train2017.json")
    assert len(reference.imgs) == 150
    assert [c["name"] for c in reference.cats.values()] == list(shapes.NAMES)
    assert len(list((root / "train2017").glob("*.jpg"))) == 150
    assert len(list((root / "val2017").glob("*.jpg"))) == 20
    for ann in reference.anns.values():
        mask = reference.annToMask(ann)
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        x, y = columns[0], rows[0]
        assert ann["bbox"] == [x, y, columns[-1] + 1 - x, rows[-1] + 1 - y]
        assert ann["area"] == mask.sum() >= 12


def test_the_reader_finds_nothing_to_repair(root):
    for split, num in (("train2017", 150), ("val2017", 20)):
        index = load_coco(root, split)
        assert len(index) == num
        assert index.problems == {}
        assert index.categories.num_classes == 9
        assert index.read_image(num - 1).shape == (128, 128, 3)


def test_there_are_all_classes_empty_images_crowds_polygons_and_run_lengths():
    drawn = [shapes.draw_image(np.random.default_rng([0, k]), 64)[1] for k in range(400)]
    numbers = np.array([sum(not fields["iscrowd"] for fields in objects) for objects in drawn])
    assert 2 <= (numbers == 0).sum() <= 30
    assert numbers.max() <= 7
    assert np.median(numbers) >= 2
    every = [fields for objects in drawn for fields in objects]
    assert {fields["category_id"] for fields in every} == set(range(1, 9))
    crowds = [fields for fields in every if fields["iscrowd"]]
    assert 1 <= len(crowds) <= 25
    assert all(isinstance(fields["segmentation"], dict) for fields in crowds)
    ordinary = [fields for fields in every if not fields["iscrowd"]]
    polygons = [fields for fields in ordinary if isinstance(fields["segmentation"], list)]
    assert 0.5 < len(polygons) / len(ordinary) < 1
    assert any(len(fields["segmentation"]) > 1 for fields in polygons)  # split by an object on top


def test_masks_of_an_image_never_overlap(root):
    index = load_coco(root, "train2017")
    assert all(index.masks(i, with_crowd=True).sum(axis=0, dtype=int).max(initial=0) <= 1 for i in range(150))


def test_sizes_lie_between_10_and_100_pixels_and_fit_the_image():
    rng = np.random.default_rng(0)
    for size, largest in ((128, 100), (64, 51.2)):
        sides = []
        for _ in range(300):
            item = shapes._make_object(rng, size, crowd=False)
            if item is not None and shapes.NAMES[item.shapes[0].category] == "circle":
                sides.append(2 * np.sqrt(item.area / np.pi))
        assert 9 < min(sides) < 16
        assert largest * 0.6 < max(sides) < largest + 1


@pytest.mark.parametrize("name", shapes.NAMES)
def test_distances_are_negative_inside_and_grow_by_one_a_pixel_near_the_outline(name):
    x, y = np.meshgrid(*2 * [np.arange(-60, 60, dtype=np.float32) + 0.5])
    distance = shapes._distance(shapes.NAMES.index(name), x.ravel(), y.ravel(), 40.0, 0.6).reshape(x.shape)
    assert distance[0, 0] > 0
    assert 500 < (distance < 0).sum() < np.pi * 42**2
    slope = np.hypot(*np.gradient(distance))
    near = np.abs(distance) < 3
    assert np.median(slope[near]) == pytest.approx(1, abs=0.02)
    assert slope.max() < 1.5


def test_areas_of_the_plain_shapes_are_those_of_geometry():
    x, y = np.meshgrid(*2 * [np.arange(-60, 60, dtype=np.float32) + 0.5])

    def area(name):
        return (shapes._distance(shapes.NAMES.index(name), x.ravel(), y.ravel(), 40.0, 0.5) < 0).sum()

    assert area("circle") == pytest.approx(np.pi * 40**2, rel=0.01)
    assert area("ring") == pytest.approx(np.pi * (40**2 - 20**2), rel=0.01)
    assert area("triangle") == pytest.approx(3 * np.sqrt(3) / 4 * 40**2, rel=0.01)
    assert area("rectangle") == pytest.approx(4 * 0.5 * 40**2 / 1.25, rel=0.02)
    assert area("cross") == pytest.approx((4 * 0.6 * 0.7 + 0.36) * 40**2, rel=0.01)


def patch(size, rows, columns):
    mask = np.zeros((size, size), bool)
    mask[rows, columns] = True
    shape = shapes._Shape(0, slice(0, size), slice(0, size), np.where(mask, -1.0, 1.0), int(mask.sum()))
    return shapes._Object([shape], False, mask)


def test_later_objects_hide_earlier_ones_and_nearly_hidden_ones_are_taken_out():
    bottom, middle, top = patch(20, slice(0, 10), slice(0, 10)), patch(20, slice(0, 5), slice(0, 10)), None
    assert [item.visible.sum() for item in shapes._occlude([bottom, middle])] == [50, 50]
    top = patch(20, slice(0, 8), slice(0, 10))  # leaves 20 of 100 pixels of the first, none of the second
    kept = shapes._occlude([bottom, middle, top])
    assert len(kept) == 1
    assert kept[0] is top
    assert top.visible.sum() == 80


def test_taking_out_one_object_uncovers_others():
    bottom = patch(20, slice(0, 13), slice(0, 10))  # shows 50 of its 130 pixels, 58 without the second
    middle = patch(20, slice(0, 8), slice(0, 10))
    top = patch(20, slice(0, 8), slice(0, 9))  # hides 72 of the 80 pixels of the second
    kept = shapes._occlude([bottom, middle, top])
    assert [item is other for item, other in zip(kept, [bottom, top], strict=True)] == [True, True]
    assert bottom.visible.sum() == 58


def test_masks_are_described_exactly_by_polygons_or_else_by_run_lengths():
    rng = np.random.default_rng(0)
    solid = np.zeros((20, 24), bool)
    solid[3:9, 2:10] = True
    solid[5:9, 7:10] = False
    split = solid.copy()
    split[12:15, 15:24] = True
    holed = solid.copy()
    holed[5, 4] = False
    noise = rng.random((20, 24)) < 0.5
    assert shapes._segmentation(solid, crowd=False) == [[2, 3, 2, 9, 7, 9, 7, 5, 10, 5, 10, 3]]
    assert len(shapes._segmentation(split, crowd=False)) == 2
    assert isinstance(shapes._segmentation(holed, crowd=False), dict)
    assert isinstance(shapes._segmentation(solid, crowd=True), dict)
    for mask in (solid, split, holed, noise):
        for crowd in (False, True):
            found = shapes._segmentation(mask, crowd)
            rle = coco_mask.merge(coco_mask.frPyObjects(found, 20, 24)) if isinstance(found, list) else found
            np.testing.assert_array_equal(coco_mask.decode(rle), mask)


def test_pixels_inside_a_mask_have_another_colour_than_those_around_it(root):
    index = load_coco(root, "train2017")
    contrasts = []
    for i in range(40):
        image, masks = index.read_image(i).astype(float), index.masks(i)
        for mask in masks.astype(bool):
            near = np.pad(mask, 4)
            near = np.any([np.roll(near, s, (0, 1)) for s in [(4, 0), (-4, 0), (0, 4), (0, -4)]], axis=0)[4:-4, 4:-4]
            contrasts.append(np.linalg.norm(image[mask].mean(axis=0) - image[near & ~mask].mean(axis=0)))
    assert np.quantile(contrasts, 0.1) > 50


def files_of(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_the_seed_decides_every_byte(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        shapes.write_dataset(tmp_path / name, num_train=3, num_val=2, image_size=64, seed=seed)
    a, b, c = (files_of(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert a != c


def test_training_and_validation_images_differ(root):
    assert (root / "train2017" / "000000000001.jpg").read_bytes() != (
        root / "val2017" / "000000000001.jpg"
    ).read_bytes()


def test_a_dataset_that_is_there_already_is_left_alone(tmp_path):
    recipe = {"num_train": 2, "num_val": 1, "image_size": 64, "seed": 0}
    shapes.write_dataset(tmp_path / "shapes", **recipe)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "shapes").rglob("*")}
    shapes.write_dataset(tmp_path / "shapes", **recipe)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "shapes").rglob("*")} == before
    with pytest.raises(UserError, match="delete it or name another folder"):
        shapes.write_dataset(tmp_path / "shapes", **recipe | {"seed": 1})


def test_other_files_are_never_overwritten_and_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="holds other files"):
        shapes.write_dataset(tmp_path / "mine", num_train=1, num_val=1, image_size=64)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    shapes.write_dataset(tmp_path / "empty", num_train=1, num_val=1, image_size=64)
    assert len(load_coco(tmp_path / "empty", "train2017")) == 1


def test_an_interrupted_call_leaves_nothing(tmp_path, monkeypatch):
    draw, calls = shapes.draw_image, []

    def interrupted(rng, size, categories):
        calls.append(size)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(rng, size, categories)

    monkeypatch.setattr(shapes, "draw_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shapes.write_dataset(tmp_path / "shapes", num_train=5, num_val=1, image_size=64)
    assert list(tmp_path.iterdir()) == []


def test_some_classes_with_any_ids_in_folders_of_any_name(tmp_path):
    categories = {"ring": 900, "circle": 7, "star": 12}
    shapes.write_dataset(
        tmp_path / "own", num_train=12, num_val=1, image_size=64, categories=categories, splits=("train", "val")
    )
    index = load_coco(tmp_path / "own", "train")
    assert index.categories.ids == (7, 12, 900)
    assert index.categories.names == ("circle", "star", "ring")
    content = json.loads((tmp_path / "own" / "annotations" / "instances_train.json").read_text())
    assert {annotation["category_id"] for annotation in content["annotations"]} == {7, 12, 900}


@pytest.mark.parametrize(("name", "filled"), [("ring", False), ("circle", True)])
def test_an_id_is_that_of_the_shape_that_was_drawn(name, filled):
    middles = []
    for seed in range(60):
        _, objects = shapes.draw_image(np.random.default_rng(seed), 64, {name: 900})
        assert {item["category_id"] for item in objects} <= {900}
        if len(objects) == 1 and not objects[0]["iscrowd"]:
            x, y, width, height = objects[0]["bbox"]
            if min(x, y, 64 - x - width, 64 - y - height) > 0:
                found = objects[0]["segmentation"]
                rle = coco_mask.merge(coco_mask.frPyObjects(found, 64, 64)) if isinstance(found, list) else found
                middles.append(coco_mask.decode(rle)[y + height // 2, x + width // 2])
    assert len(middles) > 2
    assert all(middle == filled for middle in middles)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_train": 0},
        {"num_val": 0},
        {"image_size": 16},
        {"seed": -1},
        {"categories": {"cat": 1}},
        {"categories": {}},
        {"categories": {"ring": 1, "star": 1}},
        {"splits": ("train", "train")},
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, wrong):
    with pytest.raises(UserError, match="cannot be made"):
        shapes.write_dataset(tmp_path / "shapes", **{"num_train": 1, "num_val": 1} | wrong)


def test_the_command_writes_a_dataset_and_tells_of_a_mistake_in_one_line(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "maskrcnn_jax.data.shapes", str(tmp_path / "shapes"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])

    assert run("--train=2", "--val=1", "--size=64", "--seed=3").returncode == 0
    assert json.loads((tmp_path / "shapes" / "shapes.json").read_text())["seed"] == 3
    done = run("--train=3", "--val=1", "--size=64", "--seed=3")
    assert done.returncode == 1
    assert "delete it" in done.stderr
    assert "Traceback" not in done.stderr
