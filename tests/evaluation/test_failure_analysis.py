"""AP by groups: overall and by size it is pycocotools' number; occlusion and crowding by hand."""

import json
import subprocess
import sys

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from maskrcnn_jax.evaluation import failure_analysis as errors
from maskrcnn_jax.evaluation.coco_metrics import evaluate, load_annotations
from maskrcnn_jax.evaluation.failure_analysis import Errors, differences, draw_images, intervals, occlusion

SIDE = 200


def square(box):
    x, y, width, height = map(int, box)
    mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    rle = coco_mask.encode(mask)
    return {"size": [SIDE, SIDE], "counts": rle["counts"].decode()}


def write_truth(path, boxes_of_images, categories=(3, 8)):
    """Write annotations of images given as lists of (category, box)."""
    annotations = [
        {"image_id": i, "category_id": category, "bbox": list(box), "iscrowd": 0, "area": float(box[2] * box[3])}
        | {"segmentation": square(box)}
        for i, boxes in enumerate(boxes_of_images, 1)
        for category, box in boxes
    ]
    content = {
        "images": [
            {"id": i + 1, "file_name": f"{i + 1}.jpg", "height": SIDE, "width": SIDE}
            for i in range(len(boxes_of_images))
        ],
        "annotations": [a | {"id": n} for n, a in enumerate(annotations, 1)],
        "categories": [{"id": c, "name": f"thing {c}"} for c in categories],
    }
    path.write_text(json.dumps(content))
    return path


def result(image_id, category, box, score):
    common = {"image_id": image_id, "category_id": category, "bbox": [float(v) for v in box], "score": score}
    return common | {"segmentation": square(box)}


@pytest.fixture
def many(tmp_path):
    """Objects of all sizes in 12 images, found inexactly, some missed, some invented."""
    rng = np.random.default_rng(0)
    truth, results = [], []
    for image_id in range(1, 13):
        boxes = []
        for _ in range(rng.integers(1, 14)):
            width, height = rng.integers(8, 110, 2)
            box = (*(int(v) for v in rng.integers(0, 90, 2)), int(width), int(height))
            boxes.append((int(rng.choice([3, 8])), box))
            if rng.random() < 0.8:
                moved = tuple(int(v) for v in np.maximum(np.array(box) + rng.integers(-4, 5, 4), [0, 0, 4, 4]))
                results.append(result(image_id, boxes[-1][0], moved, float(rng.random())))
            if rng.random() < 0.3:
                corner = (int(v) for v in rng.integers(0, 150, 2))
                results.append(result(image_id, int(rng.choice([3, 8])), (*corner, 30, 40), float(rng.random())))
        truth.append(boxes)
    return load_annotations(write_truth(tmp_path / "truth.json", truth)), results


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_overall_and_by_size_it_is_pycocotools_number(many, kind):
    truth, results = many
    metrics = evaluate(truth, results)
    found = intervals(Errors(truth, results, kind), draw_images(12, 20))
    for group, name in (("all", "AP"), ("small", "APs"), ("medium", "APm"), ("large", "APl")):
        assert 0.05 < metrics[f"{kind}_{name}"] < 0.95, "the case is trivial"
        assert found[group].value == pytest.approx(metrics[f"{kind}_{name}"], abs=1e-12), group
        assert found[group].low < found[group].value < found[group].high


def test_the_groups_count_as_many_detections_as_the_model_makes(tmp_path):
    boxes = [(3, (8 * (i % 20), 8 * (i // 20), 6, 6)) for i in range(150)]
    truth = load_annotations(write_truth(tmp_path / "truth.json", [boxes]))
    results = [result(1, category, box, 1 - i / 1000) for i, (category, box) in enumerate(boxes)]
    for limit in (100, 150):
        metrics = evaluate(truth, results, max_detections=limit)
        found = Errors(truth, results, "bbox", limit)
        for group, name in (("all", "AP"), ("more objects", "AP"), ("small", "APs")):
            value, _ = found.average_precision(group, np.zeros((0, 1)))
            assert value == pytest.approx(metrics[f"bbox_{name}"]), group
    assert value == pytest.approx(1)


def test_objects_of_which_only_the_box_is_known_count_for_crowding_but_not_for_masks(tmp_path):
    boxes = [(3, (50 * i, 10, 30, 30)) for i in range(4)]
    path = write_truth(tmp_path / "truth.json", [boxes])
    content = json.loads(path.read_text())
    for annotation in content["annotations"][:3]:
        del annotation["segmentation"]
    path.write_text(json.dumps(content))
    truth, results = load_annotations(path), [result(1, category, box, 0.9) for category, box in boxes]
    for kind, number in (("bbox", 4), ("segm", 1)):
        found = Errors(truth, results, kind)
        assert found.number_of_objects("all") == found.number_of_objects("4 to 10 objects") == number
        assert found.average_precision("all", np.ones((0, 1)))[0] == pytest.approx(1)


def test_overall_it_is_pycocotools_number_on_real_annotations(coco_dir):
    """With crowds, and images without objects; what is found is the truth, moved a little."""
    truth = load_annotations(coco_dir / "annotations" / "instances_val2017.json")
    rng = np.random.default_rng(1)
    results = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "score": float(rng.random())}
        | {"bbox": (np.array(a["bbox"]) * rng.uniform(0.9, 1.1, 4)).tolist()}
        for a in truth.anns.values()
    ]
    for found, annotation in zip(results, truth.anns.values(), strict=True):
        rle = truth.annToRLE(annotation)
        found["segmentation"] = rle | {"counts": rle["counts"].decode()}
    expected = evaluate(truth, results)["bbox_AP"]
    found = Errors(truth, results, "bbox")
    value, drawn = found.average_precision("all", draw_images(len(truth.imgs), 3))
    assert value == pytest.approx(expected, abs=1e-12)
    assert len(set(drawn)) == 3
    assert sum(found.number_of_objects(g) for g in errors.OCCLUSIONS) == found.number_of_objects("all")


def test_an_image_that_is_drawn_twice_counts_as_two(tmp_path, many):
    truth, results = many
    weights = np.zeros(12)
    weights[[0, 4, 5]] = 2, 1, 3
    drawn = errors.average_precision(Errors(truth, results, "bbox").groups["all"], weights)
    boxes, copies = [], []
    for row in (0, 0, 4, 5, 5, 5):
        of_image = truth.imgToAnns[row + 1]
        boxes.append([(a["category_id"], tuple(a["bbox"])) for a in of_image])
        copies += [r | {"image_id": len(boxes)} for r in results if r["image_id"] == row + 1]
    repeated = load_annotations(write_truth(tmp_path / "repeated.json", boxes))
    assert drawn == pytest.approx(evaluate(repeated, copies)["bbox_AP"], abs=1e-12)


def test_occlusion_is_the_share_of_the_box_that_another_covers():
    boxes = [(0, 0, 10, 10), (5, 0, 10, 10), (0, 0, 20, 20), (100, 100, 10, 10)]
    assert occlusion([{"bbox": box} for box in boxes]).tolist() == [1.0, 1.0, 0.25, 0.0]
    assert occlusion([]).shape == (0,)


def test_a_group_ignores_the_objects_of_the_others(tmp_path):
    """A free object is found, a covered one is not; a third detection finds nothing and counts in every group."""
    image = [(3, (10, 10, 40, 40)), (3, (100, 100, 50, 50)), (8, (100, 100, 60, 40))]
    truth = load_annotations(write_truth(tmp_path / "truth.json", [image]))
    results = [result(1, 3, (10, 10, 40, 40), 0.9), result(1, 8, (0, 150, 20, 20), 0.8)]
    found = Errors(truth, results, "bbox")
    numbers = {name: found.number_of_objects(name) for name in (*errors.OCCLUSIONS, *errors.CROWDING)}
    assert list(numbers.values()) == [1, 0, 2, 3, 0, 0]
    table = intervals(found, draw_images(1, 5))
    assert table["free"].value == pytest.approx(1.0)
    assert table["partly covered"].value == -1
    assert table["mostly covered"].value == 0
    # Of the first category half of the objects is found: precision 1 up to a recall of 0.5.
    assert table["all"].value == pytest.approx((51 / 101 + 0) / 2)


def test_a_model_equals_itself_and_a_worse_one_is_worse(many):
    truth, results = many
    ours = Errors(truth, results, "segm")
    draws = draw_images(12, 100)
    same, chance = differences(ours, Errors(truth, results, "segm"), draws)["all"]
    assert same == (0.0, 0.0, 0.0)
    assert chance == 1.0
    worse = [r for i, r in enumerate(results) if i % 3]
    apart, chance = differences(ours, Errors(truth, worse, "segm"), draws)["all"]
    assert 0 < apart.low < apart.value < apart.high
    assert chance <= 0.02


def test_the_command_prints_every_group_and_writes_json(tmp_path, many):
    _, results = many
    (tmp_path / "found.json").write_text(json.dumps(results))
    (tmp_path / "other.json").write_text(json.dumps(results[::2]))
    command = [
        sys.executable,
        "-m",
        "maskrcnn_jax.evaluation.failure_analysis",
        tmp_path / "truth.json",
        tmp_path / "found.json",
    ]
    options = ["--draws=5", f"--against={tmp_path / 'other.json'}", f"--json={tmp_path / 'out.json'}"]
    options.append("--max_detections=1")
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mostly covered") == 2
    assert "p = " in done.stdout
    assert "of which the best 1 count; set --max_detections=" in done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["segm"]["all"]["AP"]["value"] > 0
    (tmp_path / "found.json").write_text("{}")
    done = subprocess.run([*command[:-1], tmp_path / "missing.json"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "holds no COCO results" in done.stderr
