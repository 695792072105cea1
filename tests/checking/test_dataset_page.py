"""The page of a dataset check, used in a browser as a reader does."""

import json
from collections import Counter

import cv2
import numpy as np
import pytest

from maskrcnn_jax.checking import dataset_images
from maskrcnn_jax.checking.dataset import check_dataset
from maskrcnn_jax.checking.dataset_page import write_report
from maskrcnn_jax.config import load_config, to_options
from maskrcnn_jax.data.findings import Kind
from maskrcnn_jax.data.shapes import write_dataset
from tests.checking.dataset_faults import box_without_width, damage, file_missing, image_cut_short

OPTIONS = to_options(load_config("shapes"))
CARDS = "#pictures figure"
HOSTILE = '</script><script>document.title="owned"</script> \u05e9\u05dc\u05d5\u05dd \U0001f600'


@pytest.fixture
def root(tmp_path):
    write_dataset(tmp_path / "shapes", num_train=40, num_val=6, image_size=96, seed=2)
    return tmp_path / "shapes"


def edit(root, change):
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def write(root, **how):
    path = root.parent / "page.html"
    write_report(path, check_dataset(root, OPTIONS, **how))
    return path


def count(browser):
    """Return how many images are chosen."""
    text = browser.text("#count")
    return 0 if text.startswith("No image") else int(text.split(" of ")[0])


def names(browser):
    return browser.look(f"[...document.querySelectorAll('{CARDS} bdi')].map(n => n.textContent)")


def test_images_are_found_by_split_class_size_and_name(browser, root):
    browser.open(write(root))
    content = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    assert browser.text("#count") == "46 of 46 images"
    browser.choose("#filters [name=split]", "1")
    assert count(browser) == 6
    browser.choose("#filters [name=split]", "0")
    assert count(browser) == 40
    for position, category in enumerate(content["categories"]):
        browser.choose("#filters [name=class]", str(position))
        having = {a["image_id"] for a in content["annotations"] if a["category_id"] == category["id"]}
        assert count(browser) == len(having), category
    browser.choose("#filters [name=class]", "")
    browser.choose("#filters [name=size]", "1")
    assert count(browser) == len({a["image_id"] for a in content["annotations"] if 32**2 <= a["area"] < 96**2})
    browser.click("#filters [type=reset]")
    browser.click("#filters [name=name]")
    browser.type("000012")
    assert names(browser) == ["000000000012.jpg"]


def test_images_are_found_by_their_findings(browser, root):
    damaged = {fault: damage(root, fault, seed) for seed, fault in enumerate((file_missing, image_cut_short))}
    splits = check_dataset(root, OPTIONS)
    write_report(root.parent / "page.html", splits)
    browser.open(root.parent / "page.html")
    for fault, kind in ((file_missing, Kind.MISSING_FILE), (image_cut_short, Kind.BROKEN)):
        browser.choose("#filters [name=finding]", f"kind:{kind}")
        assert [name in damaged[fault] for name in names(browser)] == [True]
    browser.choose("#filters [name=finding]", "any")
    with_findings = count(browser)
    browser.choose("#filters [name=finding]", "none")
    assert with_findings >= 2 and count(browser) == 46 - with_findings
    options = browser.look("[...document.querySelectorAll('[name=finding] option')].map(o => o.textContent)")
    assert f"Error: {Kind.BROKEN} (1)" in options


def test_a_finding_marks_its_annotation(browser, root):
    def pass_the_border(content):
        content["annotations"][0]["bbox"][2] += 300

    edit(root, pass_the_border)
    browser.open(write(root))
    browser.choose("#filters [name=finding]", f"kind:{Kind.CLIPPED_BOX}")
    assert browser.look(f"document.querySelectorAll('{CARDS} .wrong').length") == 1
    browser.click(f"{CARDS} button")
    rows = browser.look(
        "[...document.querySelectorAll('#details tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
    )
    content = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    assert [row[0] for row in rows if Kind.CLIPPED_BOX in row[-1]] == [str(content["annotations"][0]["id"])]


def test_an_image_is_enlarged_with_its_annotations(browser, root):
    browser.open(write(root), width=400, dark=True)
    assert browser.look("document.documentElement.scrollWidth <= innerWidth"), "wider than the window"
    browser.choose("#filters [name=order]", "objects")
    content = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    most = max(Counter(a["image_id"] for a in content["annotations"]).values())
    browser.click(f"{CARDS} button")
    assert browser.look("document.querySelectorAll('#panels rect').length") >= most
    assert browser.look("document.querySelectorAll('#panels path').length") >= most
    first = browser.text("#image-name")
    browser.press("ArrowRight")
    assert browser.text("#image-name") != first
    browser.click("#close")
    browser.click("#filters [name=boxes]")
    assert browser.look(f"document.querySelectorAll('{CARDS} rect').length") == 0, "the masks are drawn"


def test_names_are_shown_as_they_are_and_never_run(browser, root):
    def rename(content):
        content["images"][0]["file_name"] = content["categories"][0]["name"] = HOSTILE

    edit(root, rename)
    browser.open(write(root))
    assert browser.look("document.title") == "Dataset check"
    browser.click("#filters [name=name]")
    browser.type("</SCRIPT>")
    assert names(browser) == [HOSTILE]
    browser.look(
        "new Promise(d => { const w = () => document.querySelector('.unreadable') ? d() : setTimeout(w, 20); w() })"
    )


def test_masks_are_drawn_whatever_their_form(browser, root):
    def encode(content):
        for annotation in content["annotations"][:2]:
            annotation["segmentation"] = [[10, 10, 60, 10, 60, 60, 10, 60]]
            annotation["bbox"] = [10, 10, 50, 50]
        del content["annotations"][2]["segmentation"]

    edit(root, encode)
    browser.open(write(root))
    assert browser.look("outlinePath(objects.outlines, 0)") == "M10 10 60 10 60 60 10 60Z"
    assert browser.look("outlinePath(objects.outlines, 2)") == ""
    assert browser.look("outlinePath(objects.outlines, 3)").startswith("M"), "run lengths"


def test_of_many_images_those_with_findings_are_shown(browser, root, monkeypatch):
    monkeypatch.setattr(dataset_images, "MAX_IMAGES", 12)
    name = damage(root, image_cut_short)
    path = write(root)
    browser.open(path)
    assert "12 of 46 images" in path.read_text()
    assert count(browser) == 12
    browser.choose("#filters [name=finding]", f"kind:{Kind.BROKEN}")
    assert [shown in name for shown in names(browser)] == [True]


def test_a_large_split_has_the_places_that_a_small_one_leaves(browser, root, monkeypatch):
    monkeypatch.setattr(dataset_images, "MAX_IMAGES", 30)
    path = write(root)
    browser.open(path)
    assert "30 of 46 images" in path.read_text()
    browser.choose("#filters [name=split]", "1")
    assert count(browser) == 6


@pytest.mark.parametrize("change", [{"annotations": []}, {"images": [], "annotations": []}, {"categories": []}])
def test_a_dataset_that_lacks_something_has_a_page(browser, root, change):
    edit(root, lambda content: content.update(change))
    browser.open(write(root))
    assert browser.look("document.querySelector('h1').textContent") == "Dataset check"


def test_a_single_image_has_a_page(browser, tmp_path):
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), np.zeros((50, 3000, 3), np.uint8))
    content = {"images": [{"id": 1, "file_name": "a.png", "width": 3000, "height": 50}], "annotations": []}
    (tmp_path / "a.json").write_text(json.dumps(content | {"categories": [{"id": 1, "name": "x"}]}))
    splits = check_dataset(tmp_path / "a.json", OPTIONS, image_dir=tmp_path / "images")
    write_report(tmp_path / "page.html", splits)
    browser.open(tmp_path / "page.html")
    assert names(browser) == ["a.png"]
    browser.click(f"{CARDS} button")
    assert browser.text("#image-facts").startswith("3000 x 50 pixels")


def test_dropped_annotations_do_not_hide_their_image(browser, root):
    damage(root, box_without_width)
    browser.open(write(root))
    assert count(browser) == 46
