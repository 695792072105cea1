"""Files for other tools hold the masks that were found, and can be read back."""

import csv
import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from maskrcnn_jax.converting.labelme import read_labelme
from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.annotation_files import Annotations, label_images, to_geojson, to_labelme
from maskrcnn_jax.inference.media import predict_images, predict_video
from maskrcnn_jax.inference.polygons import join_holes, mask_to_polygons, simplify
from maskrcnn_jax.inference.tables import write_tables
from tests.inference.test_media import FakePredictor, write_image
from tests.inference.test_polygons import fill, is_inside, signed_area

SIZE = (80, 120)
CATEGORIES = Categories.create([7, 9], ["cup", "dog"])
NAMES = {7: "cup", 9: "dog"}


def result(mask, category=7, score=0.9, image_id=1):
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    x, y, width, height = coco_mask.toBbox(rle).tolist()
    segmentation = {"size": list(mask.shape), "counts": rle["counts"].decode()}
    return {
        "image_id": image_id,
        "category_id": category,
        "bbox": [x, y, width, height],
        "score": score,
        "segmentation": segmentation,
    }


@pytest.fixture
def masks():
    """A disc with two holes, two blobs that are one object, and a slanted ellipse over the disc."""
    drawn = np.zeros((3, *SIZE), np.uint8)
    cv2.circle(drawn[0], (40, 40), 30, 1, -1)
    cv2.circle(drawn[0], (30, 40), 5, 0, -1)
    cv2.circle(drawn[0], (52, 36), 7, 0, -1)
    cv2.circle(drawn[1], (90, 15), 9, 1, -1)
    cv2.circle(drawn[1], (100, 60), 12, 1, -1)
    cv2.ellipse(drawn[2], ((60, 40), (70, 24), 30), 1, -1)
    return drawn.astype(bool)


@pytest.fixture
def results(masks):
    return [result(masks[0]), result(masks[1], 9, 0.8), result(masks[2], 7, 0.7)]


def test_label_images_show_the_best_object_of_each_pixel(results, masks):
    instances, classes = label_images(results, SIZE)
    assert instances.dtype == classes.dtype == np.uint16
    np.testing.assert_array_equal(instances == 1, masks[0])
    np.testing.assert_array_equal(instances == 2, masks[1])
    np.testing.assert_array_equal(instances == 3, masks[2] & ~masks[0] & ~masks[1])
    np.testing.assert_array_equal(classes == 9, masks[1])
    np.testing.assert_array_equal(classes == 7, masks[0] | masks[2] & ~masks[1])


def test_geojson_holds_the_exact_masks(results, masks):
    features = json.loads(json.dumps(to_geojson(results, NAMES)))["features"]
    assert [feature["geometry"]["type"] for feature in features] == ["Polygon", "MultiPolygon", "Polygon"]
    assert features[1]["properties"]["classification"]["name"] == "dog"
    assert features[1]["properties"]["score"] == 0.8
    for feature, mask in zip(features, masks, strict=True):
        regions = feature["geometry"]["coordinates"]
        regions = regions if feature["geometry"]["type"] == "MultiPolygon" else [regions]
        rings = [[np.array(ring) for ring in region] for region in regions]
        for outline, *holes in rings:
            assert (outline[0] == outline[-1]).all()
            assert signed_area(outline) > 0 and all(signed_area(hole) < 0 for hole in holes)
        np.testing.assert_array_equal(fill([[ring[:-1] for ring in region] for region in rings], SIZE), mask)


def test_a_mask_without_a_pixel_has_no_polygon():
    empty = [result(np.zeros(SIZE, bool))]
    assert to_geojson(empty, NAMES)["features"][0]["geometry"] is None
    assert to_labelme(empty, NAMES, SIZE, "a.png")["shapes"] == []


def test_a_ring_with_cuts_to_its_holes_holds_the_same_pixels(masks):
    (rings,) = mask_to_polygons(masks[0])
    assert len(rings) == 3
    joint = join_holes(rings)
    assert len(joint) == sum(map(len, rings)) + 2 * 2
    # The cuts are slanted, and each is crossed twice.
    x1, y1 = joint.T
    x2, y2 = np.roll(joint, -1, axis=0).T
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    inside = np.zeros(SIZE, bool)
    for edge in zip(x1, y1, x2, y2, strict=True):
        if edge[1] != edge[3]:
            at = edge[0] + (y - edge[1]) / (edge[3] - edge[1]) * (edge[2] - edge[0])
            inside ^= ((edge[1] > y) != (edge[3] > y)) & (at > x)
    np.testing.assert_array_equal(inside, masks[0])


def test_simple_rings_have_few_points_and_small_ones_stay(masks):
    ((ring,),) = mask_to_polygons(masks[2])
    simple = simplify(ring, 0.75)
    assert len(simple) < len(ring) / 3
    assert abs(signed_area(simple) / signed_area(ring) - 1) < 0.05
    square = np.array([[0.0, 0], [0, 1], [1, 1], [1, 0]])
    np.testing.assert_array_equal(simplify(square, 5), square)
    assert is_inside(square, (2, 2)).sum() == 1


def test_what_is_written_for_labelme_is_read_back_with_parts_holes_and_classes(tmp_path, results, masks):
    write_image(tmp_path / "photo.png", 50, SIZE)
    Annotations(polygons="labelme").write(tmp_path, "photo", results, CATEGORIES, SIZE, tmp_path / "photo.png")
    source = read_labelme(tmp_path / "labelme")
    assert source.categories == {1: "cup", 2: "dog"}
    (picture,) = source.splits["train"]()
    assert picture.size == SIZE and picture.name == "photo.png"
    assert [item.category for item in picture.objects] == [1, 2, 1]
    for item, mask in zip(picture.objects, masks, strict=True):
        polygons = item.segmentation
        found = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *SIZE))) > 0
        assert (found & mask).sum() / (found | mask).sum() > 0.95
    num_points = sum(len(shape["points"]) for shape in to_labelme(results, NAMES, SIZE, "x")["shapes"])
    assert num_points < sum(len(ring) for mask in masks for rings in mask_to_polygons(mask) for ring in rings) / 2


def test_tables_count_the_objects_of_each_class_and_image(tmp_path, results):
    images = [{"id": 1, "file_name": "a, b.png"}, {"id": 2, "file_name": "c.png"}]
    write_tables(tmp_path, images, results, CATEGORIES)
    counts = list(csv.reader((tmp_path / "counts.csv").read_text("utf-8-sig").splitlines()))
    assert counts == [
        ["image_id", "file_name", "cup", "dog", "all"],
        ["1", "a, b.png", "2", "1", "3"],
        ["2", "c.png", "0", "0", "0"],
    ]
    rows = list(csv.DictReader((tmp_path / "detections.csv").read_text("utf-8-sig").splitlines()))
    assert [row["category"] for row in rows] == ["cup", "dog", "cup"]
    assert rows[0]["file_name"] == "a, b.png" and rows[0]["score"] == "0.9000"
    assert [float(rows[0][name]) for name in ("x1", "y1", "x2", "y2")] == [10, 10, 71, 71]
    assert int(rows[0]["mask_pixels"]) == coco_mask.area(results[0]["segmentation"])


def test_tables_escape_what_is_not_utf_8_in_file_names(tmp_path, results):
    write_tables(tmp_path, [{"id": 1, "file_name": "caf\udce9.png"}], results, CATEGORIES)
    assert "caf\\udce9.png" in (tmp_path / "counts.csv").read_text("utf-8-sig")


def test_a_folder_of_images_gets_the_files_that_are_wanted(tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("a.jpg", "a.png", "b.png"):
        write_image(folder / name, 30)
    paths = sorted(folder.iterdir())
    predict_images(FakePredictor(), paths, output, min_score=0.2, annotations=Annotations(True, "geojson"))
    for kind in ("instances", "classes"):
        assert sorted(file.name for file in (output / kind).iterdir()) == ["a.png", "a.png.png", "b.png"]
    labels = cv2.imread(str(output / "instances" / "b.png"), cv2.IMREAD_UNCHANGED)
    assert labels.shape == (40, 50) and labels.dtype == np.uint16 and labels.max() == 1  # the dog is behind the cup
    classes = cv2.imread(str(output / "classes" / "b.png"), cv2.IMREAD_UNCHANGED)
    assert np.unique(classes).tolist() == [0, 7]
    features = json.loads((output / "geojson" / "b.geojson").read_text())["features"]
    assert [feature["properties"]["category_id"] for feature in features] == [7, 9]
    predict_images(FakePredictor(), paths[:1], output, min_score=0.2, annotations=Annotations(False, "labelme"))
    assert (output / "labelme" / "a.jpg").read_bytes() == (folder / "a.jpg").read_bytes()
    assert json.loads((output / "labelme" / "a.json").read_text())["imagePath"] == "a.jpg"


def test_files_that_cannot_be_written_are_refused_before_anything_is_detected(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="labelme annotates image files"):
        predict_video(FakePredictor(), tmp_path / "a.mp4", tmp_path / "out", annotations=Annotations(False, "labelme"))
    with pytest.raises(UserError, match="label images hold category ids from 1 to 65535"):
        Annotations(masks=True).check(tmp_path, Categories.create([0, 1], ["cup", "dog"]))


@pytest.mark.parametrize(
    ("wanted", "file"),
    [(Annotations(masks=True), "classes/a.png"), (Annotations(polygons="labelme"), "labelme/a.png")],
)
def test_a_file_that_the_disk_refuses_is_named(tmp_path, results, wanted, file):
    write_image(tmp_path / "a.png", 30, SIZE)
    (tmp_path / "out" / file).mkdir(parents=True)
    with pytest.raises(UserError, match=f"{file} cannot be written"):
        wanted.write(tmp_path / "out", "a", results, CATEGORIES, SIZE, tmp_path / "a.png")


def test_corrected_annotations_are_not_replaced(tmp_path):
    write_image(tmp_path / "a.png", 30)
    wanted = {"min_score": 0.2, "annotations": Annotations(False, "labelme")}
    predict_images(FakePredictor(), [tmp_path / "a.png"], tmp_path / "out", **wanted)
    (tmp_path / "out" / "labelme" / "a.json").write_text("corrected")
    with pytest.raises(UserError, match="labelme holds annotations, which may have been corrected; use another"):
        predict_images(FakePredictor(), [tmp_path / "a.png"], tmp_path / "out", **wanted)
    assert (tmp_path / "out" / "labelme" / "a.json").read_text() == "corrected"
