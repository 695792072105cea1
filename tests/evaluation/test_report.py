"""The page of an evaluation, opened in a browser."""

import copy
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from maskrcnn_jax.data.shapes import write_dataset
from maskrcnn_jax.evaluation.coco_metrics import evaluate, load_annotations
from maskrcnn_jax.evaluation.report import write_report
from tests.children import PATIENCE

# Appended to a copy of the page: reports what a reader would see.
CHECK = """<script>
addEventListener("load", () => {
  const broken = [...document.images].filter(image => !image.complete || !image.naturalWidth).length;
  const wide = document.documentElement.scrollWidth > innerWidth;
  document.title = JSON.stringify({images: document.images.length, plots: document.querySelectorAll("svg").length,
    broken, wide, headings: [...document.querySelectorAll("h2")].map(h => h.textContent)});
});
</script></body>"""


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, num_train=1, num_val=6, image_size=64, seed=3)
    path = folder / "annotations" / "instances_val2017.json"
    return load_annotations(path)


def perfect(truth):
    """Results that are the annotations."""
    return [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9}
        | {"segmentation": truth.annToRLE(a)}
        for a in truth.anns.values()
    ]


def report(path, truth, results, training=None):
    def draw(image_id):
        return np.full((40, 90, 3), 200, np.uint8)

    write_report(path, truth, results, evaluate(truth, results), title="a <run>", draw=draw, training=training)
    return path.read_text()


def test_the_page_has_the_recall_of_a_model_that_makes_more_detections(truth, tmp_path):
    metrics = evaluate(truth, perfect(truth), max_detections=300)
    write_report(
        tmp_path / "report.html",
        truth,
        perfect(truth),
        metrics,
        title="",
        draw=lambda image_id: None,
        max_detections=300,
    )
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r">(AR\d+)<", page) == ["AR1", "AR10", "AR100", "AR300"]


@pytest.mark.parametrize("some", [True, False])
def test_a_browser_shows_the_whole_page(truth, tmp_path, some):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("Chromium is not installed")
    training = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "loss": 2.0, "loss_mask": 1.0}, {"step": 2, "bbox_AP": 0.1, "segm_AP": 0.2}]
    training.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "lo')
    results = perfect(truth)
    results[0]["score"] = 0.2  # a miss, so that there is a worst image
    page = report(tmp_path / "page.html", truth, results if some else [], training)
    assert not re.search(r'(src|href)="(?!data:|#)', page), "the page asks for another file"
    (tmp_path / "checked.html").write_text(page.replace("</body>", CHECK))
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=400,800", "--dump-dom"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "checked.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE).stdout
    seen = json.loads(re.search(r"<title>(.*?)</title>", shown)[1].replace("&lt;", "<").replace("&gt;", ">"))
    headings = seen.pop("headings")
    assert len(headings) == 7 and headings[0] == "Average precision" and headings[-1] == "Training"
    assert seen == {"images": 6, "plots": 4, "broken": 0, "wide": False}


def test_the_numbers_are_those_of_the_evaluation(truth, tmp_path):
    page = report(tmp_path / "page.html", truth, perfect(truth))
    assert "Box AP 1.000, mask AP 1.000" in page
    assert "a &lt;run&gt;" in page
    assert "Training" not in page, "there was none"
    empty = report(tmp_path / "empty.html", truth, [])
    assert "Box AP 0.000, mask AP 0.000" in empty


def test_a_dataset_without_masks_lacks_masks_and_not_objects(truth, tmp_path):
    truth, results = copy.deepcopy(truth), perfect(truth)
    for annotation in truth.anns.values():
        annotation.pop("segmentation")
    page = report(tmp_path / "page.html", truth, results)
    assert "Box AP 1.000. There is no mask AP" in page
    assert "The objects have no annotated masks." in page
    assert '<td>AP</td><td class="number">1.000</td><td class="number">no masks</td>' in page
    assert '<td>APl</td><td class="number">no objects</td><td class="number">no objects</td>' in page


def test_a_dataset_without_objects_has_a_page(truth, tmp_path):
    truth = copy.deepcopy(truth)
    truth.dataset["annotations"] = []
    truth.createIndex()
    page = report(tmp_path / "page.html", truth, [])
    assert "There is no AP" in page and "No objects are annotated." in page


def test_many_categories_are_listed_by_their_confusions(truth, tmp_path):
    truth.dataset["categories"] += [{"id": 100 + i, "name": f"other{i}"} for i in range(40)]
    truth.createIndex()
    results = perfect(truth)
    for result in results[:2]:
        result["category_id"] = 100
    page = report(tmp_path / "page.html", truth, results)
    assert "predicted as" in page and "<td>other0</td>" in page
