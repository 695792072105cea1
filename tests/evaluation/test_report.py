"""The page of an evaluation, used in a browser as a reader does."""

import contextlib
import copy
import json
import re

import cv2
import numpy as np
import pytest
from pycocotools.cocoeval import COCOeval

from maskrcnn_jax.data.shapes import write_dataset
from maskrcnn_jax.evaluation import report_data
from maskrcnn_jax.evaluation.coco_metrics import evaluate, load_annotations, load_results
from maskrcnn_jax.evaluation.report import write_report
from maskrcnn_jax.evaluation.report_data import Run

CARDS = "#pictures figure"
HOSTILE = '</script><script>document.title="owned"</script>"\'& \u05e9\u05dc\u05d5\u05dd \U0001f600 \udcff.jpg'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, num_train=1, num_val=30, image_size=64, seed=3)
    return folder


@pytest.fixture
def truth(folder):
    return load_annotations(folder / "annotations" / "instances_val2017.json")


def perfect(truth):
    """Results that are the annotations."""
    return [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9}
        | {"segmentation": truth.annToRLE(a)}
        for a in truth.anns.values()
    ]


def wrong(truth, seed=0):
    """Results with errors of all kinds, and scores of two decimals, with ties."""
    rng = np.random.default_rng(seed)
    results = []
    for result in perfect(truth):
        for _ in range(rng.integers(0, 3)):
            box = np.array(result["bbox"]) + rng.normal(0, 0.1 * result["bbox"][2], 4)
            category = int(rng.choice(list(truth.cats))) if rng.random() < 0.3 else result["category_id"]
            changes = {"bbox": np.abs(box).tolist(), "category_id": category, "score": rng.integers(10, 100) / 100}
            results.append(result | changes)
    return results


def report(path, truth, *results, folder=None, training=None, **options):
    """Write a page about one or two runs."""
    runs = [Run(f"run{i}", found, evaluate(truth, found)) for i, found in enumerate(results)]

    def read(image_id):
        return folder and cv2.imread(str(folder / "val2017" / truth.imgs[image_id]["file_name"]))

    images = folder and folder / "val2017"
    options = {"title": "a <run>", "read": read, "image_dir": images} | options
    write_report(path, truth, runs, training=training, **options)
    return path


def rows_of(browser, selector):
    """Return the cells of a table as text."""
    return browser.look(
        f"[...document.querySelectorAll('{selector} tbody tr')].map(r => [...r.cells].map(c => c.innerText.trim()))"
    )


def num_cards(browser):
    return browser.look(f"document.querySelectorAll('{CARDS}').length")


def test_the_numbers_are_those_of_the_evaluation(truth, tmp_path):
    page = report(tmp_path / "page.html", truth, perfect(truth)).read_text()
    assert "Box AP 1.000, mask AP 1.000" in page
    assert "a &lt;run&gt;" in page
    assert '<section id="training">' not in page, "there was none"
    empty = report(tmp_path / "empty.html", truth, []).read_text()
    assert "Box AP 0.000, mask AP 0.000" in empty


def test_the_page_has_the_recall_of_a_model_that_makes_more_detections(truth, tmp_path):
    runs = [Run("run", perfect(truth), evaluate(truth, perfect(truth), max_detections=300))]
    path = tmp_path / "report.html"
    write_report(path, truth, runs, title="", read=lambda image_id: None, max_detections=300)
    assert re.findall(r">(AR\d+)<", path.read_text()) == ["AR1", "AR10", "AR100", "AR300"]


@pytest.mark.parametrize("some", [True, False])
def test_a_browser_shows_the_whole_page(browser, truth, folder, tmp_path, some):
    training = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "loss": 2.0, "loss_mask": 1.0}, {"step": 2, "bbox_AP": 0.1, "segm_AP": 0.2}]
    training.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "lo')
    path = report(
        tmp_path / "page.html",
        truth,
        wrong(truth) if some else [],
        folder=folder,
        training=training,
        summary=[("date", "today")],
    )
    assert not re.search(r'(src|href)="(?!data:|#)', path.read_text()), "the page asks for another file"
    for width in (1200, 400):
        browser.open(path, width=width, dark=width == 400)
        browser.look("Promise.all([...document.images].map(image => image.decode()))")
        assert browser.look("document.documentElement.scrollWidth <= innerWidth"), "wider than the window"
    headings = browser.look("[...document.querySelectorAll('h2')].map(h => h.textContent)")
    assert headings[:2] == ["Run", "Average precision"] and headings[-2:] == ["Training", "Terms"]
    assert num_cards(browser) == 24
    assert browser.text("#place") == "page 1 of 2"
    assert browser.look("document.querySelectorAll('figure > svg').length") == 4, "plots"


@pytest.mark.parametrize("score", [0.5, 0.7, 0.1])
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_precision_and_recall_at_a_score_are_those_of_the_detections_above_it(
    browser, truth, folder, tmp_path, score, kind
):
    results = wrong(truth)
    browser.open(report(tmp_path / "page.html", truth, results, folder=folder))
    browser.click(f"#kinds [value={kind}]")
    browser.choose("#score", str(score))
    assert browser.text("#score-value") == f"{score:.2f}"
    kept = [result for result in results if result["score"] >= score]
    with contextlib.redirect_stdout(None):
        evaluation = COCOeval(truth, load_results(truth, kept), kind)
        evaluation.evaluate()
        evaluation.accumulate()
    recalls = evaluation.eval["recall"][0, :, 0, -1]
    objects = np.array([len(truth.getAnnIds(catIds=[i], iscrowd=False)) for i in evaluation.params.catIds])
    cells = [cell for cell in evaluation.evalImgs if cell and cell["aRng"] == [0, 1e10]]
    counts = {
        i: [np.sum(~cell["dtIgnore"][0].astype(bool)) for cell in cells if cell["category_id"] == i]
        for i in truth.cats
    }
    found = np.array([int(sum(counts[i])) for i in evaluation.params.catIds])  # without those in crowds
    hits = np.round(recalls * objects)
    shown = {row[0]: row[1:] for row in rows_of(browser, "#rates")}
    recall, precision = hits.sum() / objects.sum(), hits.sum() / found.sum()
    f1 = 2 * recall * precision / (recall + precision)
    assert shown["all"][0] == str(objects.sum())
    assert [float(text) for text in shown["all"][1:]] == pytest.approx([precision, recall, f1], abs=6e-4)
    assert browser.text("#headline").endswith(f"F1 {shown['all'][3]}")
    for i, category_id in enumerate(evaluation.params.catIds):
        precision, recall = shown[truth.cats[category_id]["name"]][1:3]
        assert float(recall) == pytest.approx(recalls[i], abs=6e-4)
        assert (precision == "-") if not found[i] else float(precision) == pytest.approx(hits[i] / found[i], abs=6e-4)


def test_a_click_leads_to_the_score_with_the_best_f1(browser, truth, tmp_path):
    browser.open(report(tmp_path / "page.html", truth, wrong(truth)))
    rates = []
    for score in range(10, 100):
        browser.look(f"slider.value = {score / 100}; showRates(chosenScore())")
        rates.append(float(browser.text("#headline").rsplit(" ", 1)[1]))
    assert f"Best F1 {max(rates):.3f} at" in browser.text("#best-scores")
    browser.click("#best-scores button")
    assert browser.text("#headline").endswith(f"F1 {max(rates):.3f}")


@pytest.fixture
def counted(folder, truth, tmp_path):
    """The page of results whose errors are known: all is right but for five objects of the first images."""
    results = perfect(truth)
    first = [r["image_id"] for r in results].index
    ids = list(truth.imgs)
    of_image = [results[first(image_id)] for image_id in ids[:5]]
    other = next(i for i in truth.cats if i != of_image[0]["category_id"])
    of_image[0]["category_id"] = other
    of_image[1]["score"] = 0.2
    of_image[2]["bbox"] = [of_image[2]["bbox"][0], *np.multiply(of_image[2]["bbox"][1:], [1, 0.3, 1]).tolist()]
    results.append(of_image[3] | {"score": 0.8})
    of_image[4]["segmentation"] = {"size": [64, 64], "counts": b"PP4"}  # an empty mask
    return report(tmp_path / "page.html", truth, results, folder=folder), of_image, ids


def test_filters_find_the_images_with_an_error(browser, counted, truth):
    path, of_image, ids = counted
    browser.open(path)
    names = [truth.imgs[i]["file_name"] for i in ids]
    expected = {"wrong class": [0], "missed": [1, 2], "poor box": [2], "duplicate": [3], "poor mask": [4]}
    expected |= {"any": [0, 1, 2, 3, 4], "background": []}
    for kind, images in expected.items():
        browser.choose("#filters [name=kind]", kind)
        shown = browser.look(f"[...document.querySelectorAll('{CARDS} bdi')].map(n => n.textContent)")
        assert sorted(shown) == [names[i] for i in images], kind
    browser.choose("#score", "0.15")
    browser.choose("#filters [name=kind]", "missed")
    assert num_cards(browser) == 1, "the unsure one is found now"
    browser.click("#filters [type=reset]")
    assert browser.text("#count") == "30 of 30 images"
    browser.click("#filters [name=name]")
    browser.type(names[7].upper())
    assert browser.text("#count") == "1 of 30 images"
    browser.type("no such name")
    assert browser.text("#count").startswith("No image fits")


def test_filters_by_class_and_size_count_objects_and_detections(browser, counted, truth):
    path, of_image, ids = counted
    browser.open(path)
    position = list(truth.cats).index(of_image[0]["category_id"])
    annotations = list(truth.anns.values())
    images = {a["image_id"] for a in annotations if a["category_id"] == of_image[0]["category_id"]} | {ids[0]}
    browser.choose("#filters [name=class]", str(position))
    assert browser.text("#count") == f"{len(images)} of 30 images"
    browser.choose("#filters [name=class]", "")
    browser.choose("#filters [name=size]", "1")
    area = {i: [a["area"] for a in annotations if a["image_id"] == i] for i in ids}
    boxes = {i: [a["bbox"][2] * a["bbox"][3] for a in annotations if a["image_id"] == i] for i in ids}
    medium = [i for i in ids if max(area[i] + boxes[i], default=0) >= 32**2]
    assert 0 < len(medium) < 30
    assert browser.text("#count") == f"{len(medium)} of 30 images"


def test_a_click_on_the_confusion_matrix_shows_the_images(browser, counted, truth):
    path, of_image, ids = counted
    browser.open(path)
    matrix = rows_of(browser, "#matrices")
    names = [category["name"] for category in truth.cats.values()]
    (there,) = [a for a in truth.anns.values() if a["image_id"] == ids[0] and a["bbox"] == of_image[0]["bbox"]]
    row = names.index(truth.cats[there["category_id"]]["name"])
    column = names.index(truth.cats[of_image[0]["category_id"]]["name"])
    assert matrix[row][1 + column] == "1"
    assert sum(int(matrix[i][1 + i]) for i in range(len(names))) == len(truth.getAnnIds(iscrowd=False)) - 3, (
        "wrong class, two missed"
    )
    assert sum(int(cells[-1]) for cells in matrix[: len(names)]) == 2, "missed"
    browser.click(f"#matrices tbody tr:nth-child({row + 1}) td:nth-child({column + 2})")
    assert browser.look(f"[...document.querySelectorAll('{CARDS} bdi')].map(n => n.textContent)") == [
        truth.imgs[ids[0]]["file_name"]
    ]
    browser.click("#pair")
    assert browser.text("#count") == "30 of 30 images"


def test_ground_truth_and_predictions_are_switched_on_and_off(browser, truth, folder, tmp_path):
    browser.open(report(tmp_path / "page.html", truth, perfect(truth), folder=folder))

    def drawn():
        return [browser.look(f"document.querySelectorAll('{CARDS} .{k}').length") > 0 for k in ("truth", "found")]

    assert drawn() == [True, True]
    browser.click("#filters [name=truth]")
    assert drawn() == [False, True]
    browser.click("#filters [name=found]")
    assert drawn() == [False, False]
    browser.click("#filters [name=truth]")
    assert drawn() == [True, False]
    assert browser.look(f"document.querySelectorAll('{CARDS} path').length") > 0
    browser.click("#filters [name=masks]")
    assert browser.look(f"document.querySelectorAll('{CARDS} path').length") == 0
    browser.click("#filters [name=found]")
    browser.click("#filters [name=beside]")
    assert browser.look(f"document.querySelectorAll('{CARDS}:first-child .picture').length") == 2


def test_an_image_is_enlarged_and_the_keys_lead_to_the_next(browser, truth, folder, tmp_path):
    browser.open(report(tmp_path / "page.html", truth, perfect(truth), folder=folder))
    browser.choose("#filters [name=order]", "file")
    browser.click(f"{CARDS} button", 1)
    names = [image["file_name"] for image in truth.imgs.values()]
    assert browser.text("#image-name") == names[1]
    first = truth.imgToAnns[list(truth.imgs)[1]]
    assert len(rows_of(browser, "#details")) == 2 * len(first), "objects and detections"
    assert browser.look("document.querySelectorAll('#panels text').length") == 2 * len(first)
    assert browser.look("document.querySelector('#panels img').decode().then(() => true)")
    browser.press("ArrowRight")
    assert browser.text("#image-name") == names[2]
    browser.click("#previous-image")
    assert browser.text("#image-name") == names[1]
    browser.click("#close")
    assert not browser.look("document.getElementById('large').open")
    browser.click("#next-page")
    assert browser.text("#place") == "page 2 of 2" and num_cards(browser) == 6


def test_two_runs_stand_beside_each_other(browser, truth, folder, tmp_path):
    better, worse = perfect(truth), wrong(truth)
    path = report(tmp_path / "page.html", truth, better, worse, folder=folder)
    browser.open(path)
    metrics = [evaluate(truth, results) for results in (better, worse)]
    assert rows_of(browser, "#statistics")[0] == [
        "AP",
        *(f"{m[f'{k}_AP']:.3f}" for m in metrics for k in ("bbox", "segm")),
    ]
    assert browser.look(f"document.querySelectorAll('{CARDS}:first-child .picture').length") == 2
    assert len(browser.look("[...document.querySelectorAll('#matrices h3')]")) == 2
    assert browser.text("#headline").startswith("run0: precision 1.000, recall 1.000, F1 1.000; run1: ")
    browser.choose("#filters [name=kind]", "any")
    browser.choose("#filters [name=run]", "0")
    assert browser.text("#count").startswith("No image fits")
    browser.choose("#filters [name=run]", "1")
    assert num_cards(browser) > 5
    browser.choose("#filters [name=order]", "first")
    first, last = (browser.text(f"{CARDS}:{place}-child figcaption") for place in ("first", "last"))
    assert first.count("run1") == last.count("run1") == 1
    browser.click(f"{CARDS} button")
    assert browser.look("[...document.querySelectorAll('#panels figcaption')].map(n => n.textContent)") == [
        "run0",
        "run1",
    ]
    browser.open(path, width=400)
    assert browser.look("document.documentElement.scrollWidth <= innerWidth")


def test_names_are_shown_as_they_are_and_never_run(browser, truth, tmp_path):
    image = next(iter(truth.imgs.values()))
    category = next(iter(truth.cats.values()))
    image["file_name"] = category["name"] = HOSTILE
    results = wrong(truth)
    browser.open(report(tmp_path / "page.html", truth, results, image_dir=tmp_path, title=HOSTILE))
    assert browser.look("page.images.names[0]") == HOSTILE
    assert browser.look("document.title") != "owned"
    browser.choose("#filters [name=name]", "</SCRIPT>")
    assert num_cards(browser) == 1
    browser.click(f"{CARDS} button")
    assert browser.text("#image-name").startswith("</script><script>")


def test_an_image_that_cannot_be_read_is_shown_as_such(browser, truth, folder, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    ids = list(truth.imgs)
    truth.imgs[ids[0]]["file_name"] = "broken.jpg"
    truth.imgs[ids[1]]["file_name"] = "missing.jpg"
    path = report(tmp_path / "page.html", truth, [], read=lambda image_id: None, image_dir=tmp_path)
    browser.open(path)
    browser.choose("#filters [name=order]", "file")
    unreadable = "[...document.querySelectorAll('.picture.unreadable')].length"
    browser.look(
        f"new Promise(done => {{ const wait = () => {unreadable} === 24 ? done() : setTimeout(wait, 20); wait() }})"
    )
    assert browser.look(f"document.querySelectorAll('{CARDS} .truth').length") > 0, "the objects are drawn"


def test_images_without_thumbnails_are_linked(browser, truth, folder, tmp_path):
    path = report(tmp_path / "sub.html", truth, [], folder=folder, read=lambda image_id: None)
    assert "data:image" not in path.read_text()
    browser.open(path)
    browser.look("Promise.all([...document.images].map(image => image.decode()))")
    assert browser.look("document.images.length") == 24


def test_a_dataset_without_masks_lacks_masks_and_not_objects(browser, truth, tmp_path):
    results = perfect(truth)
    for annotation in truth.anns.values():
        annotation.pop("segmentation")
    path = report(tmp_path / "page.html", truth, results)
    page = path.read_text()
    assert "Box AP 1.000. There is no mask AP" in page
    assert "The objects have no annotated masks." in page
    browser.open(path)
    statistics = {row[0]: row[1:] for row in rows_of(browser, "#statistics")}
    assert statistics["AP"] == ["1.000", "no masks"] and statistics["APl"] == ["no objects", "no objects"]
    assert browser.text("#headline") == "precision 1.000, recall 1.000, F1 1.000", "of boxes"


def test_a_dataset_without_objects_has_a_page(browser, truth, tmp_path):
    truth.dataset["annotations"] = []
    truth.createIndex()
    path = report(tmp_path / "page.html", truth, [])
    assert "There is no AP" in path.read_text() and "No objects are annotated." in path.read_text()
    browser.open(path)
    assert browser.text("#headline") == "precision -, recall -, F1 -"
    assert num_cards(browser) == 24


def test_crowds_are_neither_missed_nor_found(browser, truth, tmp_path):
    for annotation in truth.anns.values():
        annotation["iscrowd"] = 1
    truth = copy.deepcopy(truth)
    browser.open(report(tmp_path / "page.html", truth, perfect(truth)))
    browser.choose("#filters [name=kind]", "any")
    assert browser.text("#count").startswith("No image fits")


def test_of_many_detections_the_surest_are_on_the_page(browser, truth, tmp_path, monkeypatch):
    results = wrong(truth)
    path = report(tmp_path / "all.html", truth, results)
    browser.open(path)
    browser.choose("#score", "0.6")
    expected = browser.text("#headline"), rows_of(browser, "#rates"), rows_of(browser, "#matrices")
    shown = [result["score"] for result in results if result["score"] >= 0.4]
    monkeypatch.setattr(report_data, "MAX_SHOWN", len(shown))
    browser.open(report(tmp_path / "some.html", truth, results))
    assert browser.look("page.runs[0].scores.length") == report_data.MAX_SHOWN
    lowest = f"{min(shown) + 0.01:.2f}"
    assert browser.look("slider.min") == lowest and f"those below {lowest} are left out" in browser.text("#at-score")
    assert browser.text("#score-value") == "0.50"
    browser.choose("#score", "0.6")
    assert (browser.text("#headline"), rows_of(browser, "#rates"), rows_of(browser, "#matrices")) == expected


def test_many_categories_have_a_matrix_of_small_cells(browser, truth, tmp_path):
    truth.dataset["categories"] += [{"id": 100 + i, "name": f"other{i}"} for i in range(72)]
    truth.createIndex()
    results = perfect(truth)
    for result in results[:2]:
        result["category_id"] = 100
    browser.open(report(tmp_path / "page.html", truth, results))
    assert browser.look("document.querySelectorAll('#matrices table.small tbody tr').length") == 81
    assert browser.look("document.documentElement.scrollWidth <= innerWidth")
    assert [row[1] for row in rows_of(browser, "#matrices div:last-child")] == ["other0"] * 2
    browser.click("#matrices div:last-child [data-pair]")
    assert num_cards(browser) in (1, 2)


def test_of_very_many_categories_the_matrix_has_those_with_the_most_errors(browser, truth, tmp_path):
    truth.dataset["categories"] += [{"id": 100 + i, "name": f"other{i}"} for i in range(150)]
    truth.createIndex()
    results = perfect(truth)
    for result in results[:3]:
        result["category_id"] = 100 + 149
    browser.open(report(tmp_path / "page.html", truth, results))
    names = [row[0] for row in rows_of(browser, "#matrices table.small")]
    assert len(names) == 101 and names[-2:] == ["other149", "false positives"]
    assert "The 100 classes with the most errors" in browser.text("#matrices")
    shown = browser.look("[...document.querySelectorAll('#matrices table.small [data-pair]')].map(c => c.title)")
    confused = [int(text.rsplit(" ", 1)[1]) for text in shown if "predicted other149" in text]
    assert sum(confused) == 3
    browser.click("#matrices table.small tbody tr:nth-child(1) [data-pair]")
    assert browser.text("#pair").startswith("ground truth")


def test_long_names_leave_room_for_the_numbers_beside_them(browser, truth, folder, tmp_path):
    for category in truth.cats.values():
        category["name"] = "long " * 40 + category["name"]
    for width in (1200, 400):
        browser.open(report(tmp_path / "page.html", truth, wrong(truth), folder=folder), width=width)
        numbers = "document.querySelector('#rates tbody tr:last-child td:nth-child(2)').getBoundingClientRect().right"
        assert browser.look(numbers) < width
        assert browser.look("document.querySelector('#rates .class').title") == next(iter(truth.cats.values()))["name"]
    plots = browser.look("[...document.querySelectorAll('#precision-recall svg')].map(n => n.viewBox.baseVal.width)")
    assert max(plots) < 600, "the legend is wider than the plot"
    browser.click(f"{CARDS} button")
    assert max(browser.look("[...document.querySelectorAll('#panels text')].map(n => n.textContent.length)")) < 32


@pytest.mark.parametrize("key", ["Enter", " "])
def test_the_keys_of_buttons_work_in_the_confusion_matrix(browser, counted, key):
    browser.open(counted[0])
    browser.look("document.querySelector('#matrices [data-pair]').focus()")
    browser.press(key)
    assert not browser.look("document.getElementById('pair').hidden")
