"""The metrics are pycocotools' own, and what is written can be checked with pycocotools alone."""

import json
import sys

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskrcnn_jax.data.dataset import load_coco, read_dataset
from maskrcnn_jax.data.findings import Kind
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.evaluation.coco_metrics import (
    STATISTICS,
    evaluate,
    format_table,
    ground_truth,
    load_annotations,
    write_files,
)

HEIGHT, WIDTH = 60, 80


def rectangle_rle(x, y, width, height):
    image = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    image[y : y + height, x : x + width] = 1
    rle = coco_mask.encode(image)
    return {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}


def annotation(number, image_id, category_id, box):
    x, y, width, height = box
    polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
    common = {"id": number, "image_id": image_id, "category_id": category_id, "iscrowd": 0}
    return common | {"bbox": list(box), "area": float(width * height), "segmentation": [polygon]}


def result(image_id, category_id, box, score):
    rle = rectangle_rle(*box)
    bbox = [float(value) for value in box]
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score, "segmentation": rle}


@pytest.fixture(params=["faster_coco_eval", "pycocotools"], autouse=True)
def library(request, monkeypatch):
    """Each test runs with both libraries that can compute the numbers."""
    if request.param == "pycocotools":
        monkeypatch.setitem(sys.modules, "faster_coco_eval", None)  # as if it were not installed
    else:
        pytest.importorskip(request.param)
    return request.param


@pytest.fixture
def dataset(tmp_path):
    """Two images with a cup and a dog, a third without any object; ids beyond 32 bits."""
    big = 2**40
    content = {
        "images": [{"id": big + i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in range(3)],
        "categories": [{"id": 7, "name": "cup"}, {"id": 20, "name": "dog"}, {"id": 21, "name": "owl"}],
        "annotations": [annotation(1, big, 7, (10, 10, 20, 20)), annotation(2, big + 1, 20, (30, 5, 40, 50))],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    return path, big


def pycocotools_stats(annotation_file, detections_file, kind):
    coco = COCO(str(annotation_file))
    evaluation = COCOeval(coco, coco.loadRes(str(detections_file)), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats.tolist()


def ground_truth_as_results(coco):
    """Every object as a detection of score 1; crowds are no detections."""
    results = []
    for number, entry in coco.anns.items():
        if entry["iscrowd"]:
            continue
        rle = coco.annToRLE(entry)
        rle = {"size": rle["size"], "counts": rle["counts"].decode()}
        fields = {key: entry[key] for key in ("image_id", "category_id", "bbox")}
        results.append(fields | {"score": 1.0 - 1e-6 * (number % 97), "segmentation": rle})
    return results


def test_exact_detections_score_one_and_categories_without_objects_minus_one(dataset):
    path, big = dataset
    metrics = evaluate(path, [result(big, 7, (10, 10, 20, 20), 0.9), result(big + 1, 20, (30, 5, 40, 50), 0.8)])
    assert metrics["bbox_AP"] == metrics["segm_AP"] == pytest.approx(1.0)
    assert metrics["bbox_per_category"] == pytest.approx({"cup": 1.0, "dog": 1.0, "owl": -1.0})
    assert metrics["segm_per_category"] == pytest.approx({"cup": 1.0, "dog": 1.0, "owl": -1.0})
    assert metrics["bbox_APl"] == -1.0  # no object is larger than 96 x 96


def test_one_of_two_objects_found_gives_half(dataset):
    path, big = dataset
    metrics = evaluate(path, [result(big, 7, (10, 10, 20, 20), 0.9)])
    assert metrics["bbox_AP"] == metrics["segm_AP"] == pytest.approx(0.5)
    assert metrics["bbox_per_category"] == pytest.approx({"cup": 1.0, "dog": 0.0, "owl": -1.0})


def test_no_results_give_zero_where_there_are_objects(dataset):
    path, _ = dataset
    metrics = evaluate(path, [])
    assert metrics["bbox_AP"] == metrics["segm_AP"] == metrics["bbox_AR100"] == 0.0
    assert metrics["segm_APl"] == -1.0
    assert format_table(metrics).endswith("box AP 0.000  mask AP 0.000")


def test_only_the_named_images_count(dataset):
    path, big = dataset
    results = [result(big, 7, (10, 10, 20, 20), 0.9)]
    assert evaluate(path, results, image_ids=[big])["bbox_AP"] == pytest.approx(1.0)
    assert evaluate(path, results, image_ids=np.array([big + 1]))["bbox_AP"] == 0.0


def test_all_keys_are_there_as_plain_numbers_and_nothing_is_printed(dataset, capsys):
    path, big = dataset
    results = [result(big, 7, (10, 12, 20, 20), 0.9)]
    before = json.dumps(results)
    metrics = evaluate(path, results)
    assert capsys.readouterr().out == ""
    assert json.dumps(results) == before
    wanted = {f"{kind}_{name}" for kind in ("bbox", "segm") for name in (*STATISTICS, "per_category")}
    assert set(metrics) == wanted
    assert json.loads(json.dumps(metrics)) == metrics


def test_the_metrics_are_what_pycocotools_gives_for_the_written_file(dataset, tmp_path):
    path, big = dataset
    rng = np.random.default_rng(0)
    results = []
    for _ in range(60):
        x, y = int(rng.integers(0, 50)), int(rng.integers(0, 40))
        box = (x, y, int(rng.integers(1, WIDTH - x)), int(rng.integers(1, HEIGHT - y)))
        score = float(np.float32(rng.random()))
        results.append(result(big + int(rng.integers(3)), int(rng.choice([7, 20, 21])), box, score))
    # An early false alarm and a late find, so that the limits of 1, 10 and 100 detections give different numbers.
    results.append(result(big, 7, (60, 40, 9, 9), 1.0))
    results.append(result(big, 7, (11, 10, 20, 20), float(np.float32(0.3))))
    metrics = evaluate(path, results)
    write_files(tmp_path / "run", metrics, results)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
    assert 0 < metrics["bbox_AP"] < 1
    for kind in ("bbox", "segm"):
        stats = pycocotools_stats(path, tmp_path / "run" / "detections.json", kind)
        assert [metrics[f"{kind}_{name}"] for name in STATISTICS] == stats
        # The AP is the mean over the categories that have objects.
        per_category = [value for value in metrics[f"{kind}_per_category"].values() if value >= 0]
        assert metrics[f"{kind}_AP"] == pytest.approx(np.mean(per_category))
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["detections.json", "metrics.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    write_files(tmp_path, {"bbox_AP": 0.5}, [])
    with pytest.raises(TypeError):
        write_files(tmp_path, {"bbox_AP": object()}, [])
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"bbox_AP": 0.5}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["detections.json", "metrics.json"]


def test_categories_of_one_name_are_told_apart_by_their_ids(dataset):
    path, big = dataset
    content = json.loads(path.read_text())
    content["categories"][1]["name"] = "cup"
    path.write_text(json.dumps(content))
    table = evaluate(path, [result(big, 7, (10, 10, 20, 20), 0.9)])["bbox_per_category"]
    assert table == pytest.approx({"cup (7)": 1.0, "cup (20)": 0.0, "owl": -1.0})


def test_annotations_without_area_box_and_crowd_flag_are_filled_in(dataset):
    path, big = dataset
    content = json.loads(path.read_text())
    for entry in content["annotations"]:
        del entry["iscrowd"], entry["bbox"]
        entry |= {"area": None, "id": 0}  # numbers by which COCOeval would find nothing
    path.write_text(json.dumps(content))
    assert load_annotations(path).anns[1]["area"] == 400.0
    assert load_annotations(path).anns[1]["bbox"] == [10, 10, 20, 20]
    assert evaluate(path, [result(big, 7, (10, 10, 20, 20), 0.9)])["bbox_AP"] == pytest.approx(0.5)


def test_the_table_names_every_number_and_ends_in_one_line(dataset):
    path, big = dataset
    metrics = evaluate(path, [result(big, 7, (10, 10, 20, 20), 0.9)])
    lines = format_table(metrics).splitlines()
    assert lines[-1] == "box AP 0.500  mask AP 0.500"
    assert [line.split()[0] for line in lines[1:13]] == list(STATISTICS)
    assert "cup".ljust(8) + "   1.000    1.000" in lines
    assert "APl".ljust(8) + "    none    none" in lines, "there are no large objects"


@pytest.fixture
def crowded(tmp_path):
    """An image with 128 objects of one category and 2 of another, and results that find each exactly."""
    boxes = [(3 * (i % 26), 3 * (i // 26), 2, 2) for i in range(128)] + [(0, 40, 30, 18), (40, 40, 30, 18)]
    owners = [7] * 128 + [20] * 2
    content = {
        "images": [{"id": 1, "file_name": "1.png", "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 7, "name": "cell"}, {"id": 20, "name": "dish"}],
        "annotations": [annotation(i, 1, k, b) for i, (k, b) in enumerate(zip(owners, boxes, strict=True), 1)],
    }
    path = tmp_path / "crowded.json"
    path.write_text(json.dumps(content))
    scores = 1 - np.arange(130) / 1000
    results = [result(1, k, b, float(s)) for k, b, s in zip(owners, boxes, scores, strict=True)]
    return path, results


def test_a_model_that_makes_more_detections_is_measured_with_as_many(crowded):
    path, results = crowded
    metrics = evaluate(path, results, max_detections=130)
    for kind in ("bbox", "segm"):
        for name in ("AP", "AP50", "AP75", "APs", "AR130", "ARs"):
            assert metrics[f"{kind}_{name}"] == pytest.approx(1.0), name
        assert metrics[f"{kind}_per_category"] == pytest.approx({"cell": 1.0, "dish": 1.0})
        for limit in (1, 10, 100):  # of each category, as COCO's
            expected = (limit / 128 + min(limit, 2) / 2) / 2
            assert metrics[f"{kind}_AR{limit}"] == pytest.approx(expected), limit
    lines = format_table(metrics).splitlines()
    names = [line.split()[0] for line in lines[1:14]]
    assert names == [*STATISTICS[:9], "AR130", *STATISTICS[9:]]


@pytest.mark.parametrize("limit", [1, 30, 100])
def test_up_to_a_hundred_detections_the_numbers_are_cocos(crowded, tmp_path, limit):
    path, results = crowded
    metrics = evaluate(path, results, max_detections=limit)
    write_files(tmp_path, metrics, results)
    for kind in ("bbox", "segm"):
        stats = pycocotools_stats(path, tmp_path / "detections.json", kind)
        assert [metrics[f"{kind}_{name}"] for name in STATISTICS] == stats
    assert len(metrics) == 2 * len(STATISTICS) + 2


@pytest.mark.parametrize(("limit", "warned"), [(100, True), (129, True), (130, False), (400, False)])
def test_images_with_more_objects_than_detections_are_warned_of(crowded, caplog, limit, warned):
    path, results = crowded
    evaluate(path, results[:2], max_detections=limit)
    assert [r.getMessage() for r in caplog.records] == [Kind.MANY_OBJECTS.tell(1, limit=limit, most=130)] * warned


def test_images_that_are_not_evaluated_and_crowds_are_not_warned_of(crowded, caplog):
    path, _ = crowded
    content = json.loads(path.read_text())
    content["images"].append(content["images"][0] | {"id": 2})
    path.write_text(json.dumps(content))
    evaluate(path, [], image_ids=[2])
    path.write_text(json.dumps(content | {"annotations": [a | {"iscrowd": 1} for a in content["annotations"]]}))
    evaluate(path, [])
    assert not caplog.records


def test_results_of_unknown_images_and_missing_files_are_the_users_to_mend(dataset, tmp_path):
    path, _ = dataset
    with pytest.raises(UserError, match="not in the annotation file, image 5"):
        evaluate(path, [result(5, 7, (10, 10, 20, 20), 0.9)])
    with pytest.raises(UserError, match="absent.json: No such file"):
        evaluate(tmp_path / "absent.json", [])
    for content in ("{", "[]", "{}", '{"images": [], "categories": [], "annotations": []}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UserError, match="bad.json"):
            evaluate(tmp_path / "bad.json", [])


def test_reading_a_part_gives_the_numbers_of_restricting_the_whole(coco_dir):
    path = coco_dir / "annotations" / "instances_val2017.json"
    whole = load_annotations(path)
    dataset = load_coco(coco_dir, "val2017", keep_flat=True)
    part = ground_truth(dataset, range(20, 50))
    ids = dataset.image_ids[20:50].tolist()
    assert list(part.imgs) == ids
    assert {a["image_id"] for a in part.anns.values()} <= set(ids)
    results = ground_truth_as_results(part)[::2]
    assert results
    assert evaluate(part, results, image_ids=ids) == evaluate(whole, results, image_ids=ids)


def test_the_ground_truth_of_a_dataset_has_the_numbers_of_the_file(coco_dir):
    """To the last bit: boxes neither clipped nor rounded to float32, areas, masks, crowds."""
    reference = COCO(str(coco_dir / "annotations" / "instances_val2017.json"))
    found = ground_truth(load_coco(coco_dir, "val2017", keep_flat=True))
    assert list(found.imgs) == list(reference.imgs)
    for image_id, image in found.imgs.items():
        assert image == {key: reference.imgs[image_id][key] for key in image}
        pairs = list(zip(found.imgToAnns[image_id], reference.imgToAnns[image_id], strict=True))
        for ours, theirs in pairs:
            for key in ("image_id", "category_id", "iscrowd", "bbox", "area"):
                assert ours[key] == theirs[key], key
            assert ours["segmentation"] == reference.annToRLE(theirs)
    assert len(found.anns) == len(reference.anns) and 0 not in found.anns


def test_boxes_that_training_clips_or_drops_are_evaluated_as_the_file_has_them(dataset):
    path, big = dataset
    content = json.loads(path.read_text())
    kinds = {"over the border": (-5, 10, 30.7, 20), "outside": (100, 100, 9, 9), "flat": (3, 3, 0, 5)}
    content["annotations"] += [annotation(i, big + 2, 21, box) for i, box in enumerate(kinds.values(), 3)]
    path.write_text(json.dumps(content))
    images = path.parent / "val2017"
    images.mkdir()
    found = read_dataset(path, images, skip_broken=True)
    assert [a["bbox"] for a in ground_truth(found, [2]).anns.values()] == [list(box) for box in kinds.values()]
    learnt = found.without_flat()
    np.testing.assert_array_equal(learnt.annotations(2).boxes, np.float32([[0, 10, 25.7, 30]]))


def test_ground_truth_of_coco_as_detections_scores_one(coco_dir):
    coco = load_annotations(coco_dir / "annotations" / "instances_val2017.json")
    ids = sorted(coco.imgs)[:100]
    results = [entry for entry in ground_truth_as_results(coco) if entry["image_id"] in set(ids)]
    metrics = evaluate(coco, results, image_ids=ids)
    assert metrics["bbox_AP"] == pytest.approx(1.0)
    assert metrics["segm_AP"] == pytest.approx(1.0)


def test_where_only_the_box_is_known_found_masks_count_for_nothing(dataset):
    """Box AP has the object as any other; mask AP is that of a file without it and without what was found there."""
    path, big = dataset
    content = json.loads(path.read_text())
    known, only_box = content["annotations"]
    content["annotations"] = [known, {k: v for k, v in only_box.items() if k not in ("segmentation", "area")}]
    content["annotations"].append({"id": 3, "image_id": big, "category_id": 7, "segmentation": [[1, 2, 3, 4]]})
    path.write_text(json.dumps(content))
    wrong_mask = result(big + 1, 20, (31, 6, 30, 20), 0.9) | {"bbox": [30.0, 5.0, 40.0, 50.0]}
    right = result(big, 7, (10, 10, 20, 20), 0.8)
    metrics = evaluate(path, [right, wrong_mask])
    assert metrics["bbox_per_category"] == pytest.approx({"cup": 1.0, "dog": 1.0, "owl": -1.0})
    assert metrics["segm_per_category"] == pytest.approx({"cup": 1.0, "dog": -1.0, "owl": -1.0})
    assert metrics["segm_AP"] == pytest.approx(1.0)
    # A mask elsewhere in that image is wrong all the same.
    content["annotations"].append(annotation(4, big, 20, (60, 30, 10, 20)))
    path.write_text(json.dumps(content))
    found = result(big, 20, (60, 30, 10, 20), 0.5)
    assert evaluate(path, [right, wrong_mask, found])["segm_per_category"]["dog"] == pytest.approx(1.0)
    elsewhere = result(big + 1, 20, (2, 2, 8, 8), 0.9)
    assert evaluate(path, [right, elsewhere, found])["segm_per_category"]["dog"] == pytest.approx(0.5)
