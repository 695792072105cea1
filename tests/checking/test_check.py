"""The checker on damaged datasets: what it finds, what training does with them, and what the mended file is worth."""

import argparse
import copy
import dataclasses
import json
import math
import shutil

import cv2
import numpy as np
import pytest

from maskrcnn_jax.checking.anchors import Anchors
from maskrcnn_jax.checking.annotations import check_index, stop_or_warn
from maskrcnn_jax.checking.dataset import check_dataset, check_split
from maskrcnn_jax.checking.dataset_page import write_report
from maskrcnn_jax.checking.mend import fix_dataset, mend
from maskrcnn_jax.checking.training_sheet import write_sheet
from maskrcnn_jax.commands import check as command
from maskrcnn_jax.config import load_config, to_options
from maskrcnn_jax.data.dataset import load_coco, locate
from maskrcnn_jax.data.findings import Kind, Mend
from maskrcnn_jax.data.shapes import write_dataset
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.options import DataOptions, Options
from tests.checking.dataset_faults import (
    FAULTS,
    box_without_width,
    boxes_as_corners,
    category_zero,
    damage,
    file_in_other_case,
    file_missing,
    file_not_listed,
    image_cut_short,
    only_crowds,
)
from tests.data.loading import load

OPTIONS = to_options(load_config("shapes"))


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    root = tmp_path_factory.mktemp("clean") / "shapes"
    write_dataset(root, num_train=40, num_val=6, image_size=96, seed=2)
    return root


@pytest.fixture
def root(clean, tmp_path):
    return shutil.copytree(clean, tmp_path / "shapes")


def check(root):
    return check_dataset(root, OPTIONS)


def train_on_data(root):
    """Does with the data what a training of an epoch does with it."""
    index = load_coco(root, "train2017")
    stop_or_warn(check_index(index, Anchors.from_options(OPTIONS)), "train2017")
    load_coco(root, "val2017").categories.check_known(index.categories, "val2017")
    loader = load(index, batch_size=4, short_side=96, long_side=96, train=True, annotations=True, threads=1)
    for batch in loader:
        assert batch.valid.all()
        boxes = batch.gt.boxes[batch.gt.valid]
        assert np.isfinite(boxes).all()
        assert ((boxes >= 0) & (boxes <= 96)).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (batch.gt.labels[batch.gt.valid] >= 1).all()
        assert np.unpackbits(batch.gt.masks).max(initial=0) <= 1


def test_a_clean_dataset_gives_no_finding(clean):
    assert [f.sentence for split in check(clean) for f in split.findings] == []
    train_on_data(clean)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_found_and_named_and_training_works_or_says_the_same(root, fault, tmp_path):
    name = damage(root, fault)
    splits = check(root)
    findings = [finding for split in splits for finding in split.findings]
    (found,) = [finding for finding in findings if finding.kind == FAULTS[fault]]
    assert name in " ".join([found.sentence, *found.examples])
    try:
        train_on_data(root)
    except UserError as e:
        sentences = [
            text for finding in findings for text in (finding.sentence, *finding.examples) if finding.is_error
        ]
        assert str(e) in sentences
    if splits[0].num_errors:
        mended = tmp_path / "mended.json"
        assert mend(splits[0], mended)
        mended.replace(splits[0].json_path)
        assert [finding.sentence for finding in check(root)[0].findings if finding.is_error] == []
        train_on_data(root)


@pytest.mark.parametrize("seed", range(12))
def test_of_several_faults_the_reader_stops_at_one_that_the_checker_knows(root, seed):
    rng = np.random.default_rng(seed)
    for fault in rng.choice(list(FAULTS), 3, replace=False):
        damage(root, fault, seed)
    sentences = {finding.sentence for split in check(root) for finding in split.findings}
    try:
        load_coco(root, "train2017")
    except UserError as e:
        assert str(e) in sentences


WILD = [
    *(None, True, -1, 0, 10**9, 2**31, 2**63, 10**400, 1e308, -1e308, math.nan, math.inf),
    *("", "x", "\ud800\x1b[2J", "x" * 5000, "../../../../../../dev/zero", "/dev/zero", "/etc", "."),
    *([], [[]], [[[]]], [None], ["a", "b", "c", "d", "e", "f"], [1e9] * 8, {}),
    {"size": [48, 48], "counts": "PPPPPPP"},
    {"size": [48, 48], "counts": "\x00"},
    {"size": [48, 48], "counts": [10**9, 7]},
    {"size": [10**9, 10**9], "counts": [10**18]},
    {"size": 3, "counts": None},
]


@pytest.mark.slow
def test_whatever_stands_in_the_annotations_the_checker_ends_with_findings(tmp_path):
    """The reader loads the file or stops with a sentence of the checker; the mended file has no errors."""
    root = tmp_path / "tiny"
    write_dataset(root, num_train=4, num_val=1, image_size=48, seed=0)
    path = root / "annotations" / "instances_train2017.json"
    clean = json.loads(path.read_text())
    rng = np.random.default_rng(0)
    num_refused = 0
    for _ in range(250):
        content = copy.deepcopy(clean)
        for _ in range(rng.integers(1, 4)):
            section = content[["images", "annotations", "categories"][rng.integers(3)]]
            entry = section[rng.integers(len(section))] if section and rng.random() < 0.95 else None
            value = copy.deepcopy(WILD[rng.integers(len(WILD))])
            if not isinstance(entry, dict) or not entry:
                section.append(value)
                continue
            key = list(entry)[rng.integers(len(entry))]
            if rng.random() < 0.1:
                del entry[key]
            elif isinstance(entry[key], list) and entry[key] and rng.random() < 0.5:
                entry[key][rng.integers(len(entry[key]))] = value
            else:
                entry[key] = value
        path.write_text(json.dumps(content))
        split = check_split("train2017", path, root / "train2017", OPTIONS, open_images=False)
        try:
            index = load_coco(root, "train2017")
            assert all(np.isfinite(index.boxes[row]).all() for row in range(len(index.boxes)))
        except UserError as e:
            num_refused += 1
            assert str(e) in [finding.sentence for finding in split.findings if finding.is_error]
        write_report(tmp_path / "report.html", [split])
        mended = tmp_path / "mended.json"
        try:
            split, _ = fix_dataset([split], mended, OPTIONS, open_images=False)
        except UserError as e:
            assert "cannot be mended" in str(e) or "would be left" in str(e)
            continue
        assert [finding.sentence for finding in split.findings if finding.is_error] == []
    assert 50 < num_refused < 230


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"images": ' + "[" * 100_000, '{"images": [' + "9" * 10_000 + "]}", '{"a": ' + '{"a": ' * 50_000],
)
def test_json_that_is_deep_or_has_endless_numbers_is_one_finding(clean, tmp_path, text):
    path = tmp_path / "deep.json"
    path.write_text(text)
    (found,) = check_split("deep", path, clean / "train2017", OPTIONS).findings
    assert "is not valid JSON" in found.sentence


@pytest.mark.parametrize("depth", [50, 300, 600, 900])
def test_lists_as_deep_as_they_can_be_read_are_mended_or_refused(root, tmp_path, depth):
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["segmentation"] = "DEEP"
    path.write_text(json.dumps(content).replace('"DEEP"', "[" * depth + "1, 2, 30, 4, 5, 60" + "]" * depth))
    split = check_split("train2017", path, root / "train2017", OPTIONS)
    assert split.num_errors == 1
    write_report(tmp_path / "report.html", [split])
    try:
        mend(split, tmp_path / "mended.json")
    except UserError as e:
        assert "cannot be mended" in str(e)
        assert depth > 100
        return
    again = check_split("train2017", tmp_path / "mended.json", root / "train2017", OPTIONS)
    assert again.num_errors == 0


def test_a_dataset_without_a_split_for_evaluation_is_checked_with_a_warning(root):
    shutil.rmtree(root / "val2017")
    (root / "annotations" / "instances_val2017.json").unlink()
    (split,) = check_dataset(root, OPTIONS)
    assert [finding.kind for finding in split.findings] == [Kind.NO_EVALUATION]
    assert not split.num_errors


def test_an_annotation_file_is_checked_with_its_folder_of_images(root):
    path, images = locate(root, "train2017")
    (split,) = check_dataset(path, OPTIONS, image_dir=images)
    assert split.name == "instances_train2017"
    assert not split.findings
    with pytest.raises(UserError, match="no folder of images was given"):
        check_dataset(path, OPTIONS)
    with pytest.raises(UserError, match="'gone' is not a folder"):
        check_dataset(path, OPTIONS, image_dir="gone")
    with pytest.raises(UserError, match="is not an annotation file"):
        check_dataset(images.parent, OPTIONS, image_dir=images)


@pytest.mark.parametrize("as_file", [True, False])
def test_annotation_ids_are_numbered_from_1_in_a_cleaned_copy(root, tmp_path, as_file):
    path, images = locate(root, "train2017")
    content = json.loads(path.read_text())
    for i, annotation in enumerate(content["annotations"]):
        annotation["id"] = i
    content["annotations"][5]["category_id"] = 99  # an error besides
    path.write_text(json.dumps(content))
    splits = check_dataset(path, OPTIONS, image_dir=images) if as_file else check(root)
    assert (Kind.ZERO_ID in [f.kind for f in splits[0].findings]) == as_file
    cleaned, changes = fix_dataset(splits, tmp_path / "cleaned.json", OPTIONS)
    ids = sorted(cleaned.data.annotation_ids.tolist())
    assert ids == [i for i in range(1, len(content["annotations"]) + 1) if i != 5]
    assert len(changes[Mend.NEW_ID]) == 1


def test_files_that_another_split_of_the_folder_lists_are_not_unlisted(root, tmp_path):
    val = root / "val2017"
    for path in val.iterdir():
        path.rename(root / "train2017" / f"val_{path.name}")
    val.rmdir()
    val.symlink_to(root / "train2017")
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["file_name"] = f"val_{image['file_name']}"
    path.write_text(json.dumps(content))
    splits = check(root)
    assert [f.sentence for split in splits for f in split.findings] == []
    damage(root, file_not_listed)
    damage(root, category_zero)
    splits = check(root)
    for split in (*splits, fix_dataset(splits, tmp_path / "cleaned.json", OPTIONS)[0]):
        (found,) = [f for f in split.findings if f.kind == Kind.NOT_LISTED]
        assert found.examples == ["stray.png"]


def test_unlisted_files_are_found_where_images_are_held_out(root):
    damage(root, file_not_listed)
    held_out = Options(data=DataOptions(val_share=0.25))
    (split,) = check_dataset(root, held_out)
    assert Kind.NOT_LISTED in [f.kind for f in split.findings]
    shutil.rmtree(root / "val2017")
    (root / "val2017").symlink_to(root / "train2017")
    (split,) = check_dataset(root, held_out)
    assert Kind.NOT_LISTED not in [f.kind for f in split.findings], "the other split may list it"


def test_an_id_of_0_of_an_annotation_with_a_flat_box_is_replaced_by_a_free_one(root, tmp_path):
    path, _ = locate(root, "train2017")
    content = json.loads(path.read_text())
    first, *others = content["annotations"]
    first |= {"id": 0, "bbox": [*first["bbox"][:2], 0, 0]}  # its mask has the box
    path.write_text(json.dumps(content))
    cleaned, _ = fix_dataset(check(root), tmp_path / "cleaned.json", OPTIONS)
    ids = cleaned.data.annotation_ids.tolist()
    assert sorted(ids) == sorted([max(other["id"] for other in others) + 1, *(other["id"] for other in others)])


def test_masks_that_are_all_crowds_are_turned_into_objects(root, tmp_path):
    """As CVAT exports masks that were painted."""
    damage(root, only_crowds)
    splits = check(root)
    (found,) = [f for f in splits[0].findings if f.is_error]
    assert found.kind == Kind.ONLY_CROWDS
    assert "--fix" in found.sentence
    with pytest.raises(UserError) as error:
        train_on_data(root)
    assert str(error.value) == found.sentence
    cleaned, changes = fix_dataset(splits, tmp_path / "cleaned.json", OPTIONS)
    assert not cleaned.findings
    assert cleaned.data.num_objects.sum() == len(changes[Mend.NOT_CROWD]) == len(found.rows)


def test_a_cleaned_copy_is_checked_and_never_overwrites_annotations(root, tmp_path):
    name = damage(root, category_zero)
    splits = check(root)
    with pytest.raises(UserError, match="would overwrite"):
        fix_dataset(splits, splits[1].json_path, OPTIONS)
    cleaned, changes = fix_dataset(splits, tmp_path / "cleaned.json", OPTIONS)
    assert cleaned.json_path == tmp_path / "cleaned.json"
    assert not cleaned.findings
    ((change, names),) = changes.items()
    assert change == f"annotations dropped: {Kind.UNLISTED_CATEGORY}"
    assert len(names) == 1 and names[0].startswith(name)


def test_missing_files_are_no_error_where_they_are_skipped(root):
    name = damage(root, file_missing)
    options = dataclasses.replace(OPTIONS, data=dataclasses.replace(OPTIONS.data, skip_broken=True))
    (found,) = check_split("train2017", *locate(root, "train2017"), options).findings
    assert not found.is_error
    assert name in found.examples


def test_findings_name_places_in_the_file_whatever_was_skipped_before(root):
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["images"][:0] = [{}, 3]
    content["annotations"][:0] = [None, {"id": 1}, []]
    content["images"].append(content["images"][5] | {"id": 10_000})
    content["annotations"].append(content["annotations"][7] | {"id": 10_000})
    path.write_text(json.dumps(content))
    rows = {finding.kind: finding.rows.tolist() for finding in check(root)[0].findings}
    assert rows[Kind.SAME_FILE] == [len(content["images"]) - 1]
    assert rows[Kind.SAME_ANNOTATION] == [len(content["annotations"]) - 1]
    assert rows[Kind.MALFORMED_IMAGE] == [0, 1]
    assert rows[Kind.MALFORMED_ANNOTATION] == [0, 1, 2]


def test_mending_changes_what_was_found_and_nothing_else(root, tmp_path):
    damage(root, boxes_as_corners)
    damage(root, file_in_other_case)
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][3] |= {"note": {"by": "somebody"}, "bbox": content["annotations"][3]["bbox"]}
    content["images"][0]["flickr_url"] = "http://example.org/ü"
    content["something"] = [1, {"deep": None}]
    path.write_text(json.dumps(content))
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    done = mend(check(root)[0], tmp_path / "mended.json")
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before
    assert set(done) == {Mend.CORNERS_TO_SIZES, Mend.FIND_FILE}
    mended = json.loads((tmp_path / "mended.json").read_text())
    for annotation in content["annotations"]:
        x1, y1, x2, y2 = annotation["bbox"]
        annotation["bbox"] = [x1, y1, x2 - x1, y2 - y1]
    for image in content["images"]:
        image["file_name"] = image["file_name"].removeprefix("train2017/").lower()
    assert mended == content
    assert list(mended) == list(content)


def run_command(*arguments, **data):
    """Run the check command for the shapes config with options of the data, and return its exit status."""
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    options = parser.parse_args(list(map(str, arguments)))
    options.config = load_config("shapes")
    options.config.data.update(data)
    try:
        command.main(options)
    except SystemExit as stopped:
        return stopped.code
    return 0


def test_the_command_lists_findings_and_writes_a_page_and_a_cleaned_copy(root, tmp_path, capsys):
    names = [
        damage(root, fault, seed) for seed, fault in enumerate((box_without_width, category_zero, image_cut_short))
    ]
    report, cleaned = tmp_path / "check.html", tmp_path / "cleaned.json"
    assert run_command(root, f"--report={report}", f"--fix={cleaned}") == 1
    printed, page = capsys.readouterr().out, report.read_text()
    assert "2 errors and 1 warning in 2 splits." in printed
    assert printed.count(Kind.NOT_LISTED.tell(1, folder=root / "train2017")) == 1, "of the cleaned copy"
    assert printed.rstrip().endswith("0 errors and 1 warning in 1 split.")
    assert page.count("<img ") == 2, "the third cannot be read"
    for name in names:
        assert name in printed
        assert name in page
    (root / "annotations" / "instances_train2017.json").write_bytes(cleaned.read_bytes())
    assert run_command(root) == 0
    assert "0 errors and 1 warning in 2 splits." in capsys.readouterr().out, "the image that was dropped is not listed"


def test_a_page_shows_images_that_are_a_few_pixels_thin(tmp_path):
    root = tmp_path / "thin"
    write_dataset(root, num_train=2, num_val=1, image_size=96, seed=0)
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    for image, (height, width) in zip(content["images"], [(2, 2400), (2400, 1)], strict=True):
        cv2.imwrite(str(root / "train2017" / image["file_name"]), np.zeros((height, width, 3), np.uint8))
        image |= {"height": height, "width": width}
    for annotation in content["annotations"]:
        annotation |= {"bbox": [0, 0, 300, 300], "segmentation": [[0, 0, 300, 0, 300, 300, 0, 300]]}
    path.write_text(json.dumps(content))
    splits = check(root)
    assert {Kind.CLIPPED_BOX} <= {finding.kind for finding in splits[0].findings}
    write_report(tmp_path / "page.html", splits)
    assert (tmp_path / "page.html").read_text().count("data:image/jpeg") >= 2


def test_a_sheet_shows_images_as_training_sees_them(root, tmp_path):
    sheet = tmp_path / "sheet.png"
    assert run_command(root, f"--augmented={sheet}") == 0
    picture = cv2.imread(str(sheet))
    assert picture.shape[0] > 3 * 480 and picture.shape[1] > 4 * 480
    sheet.unlink()
    assert run_command(root, f"--augmented={sheet}", val_share=0.4) == 0
    assert sheet.exists(), "before a training has drawn which images are held out"
    options = dataclasses.replace(OPTIONS, batch_size=12)
    data = dataclasses.replace(options.data, coco_dir=str(root), hflip=0.0, ignore_regions=True)
    shown = []
    for factor in (0.5, 1.0):
        jittered = dataclasses.replace(data, crop_size=96, scale_jitter=(factor, factor))
        write_sheet(sheet, dataclasses.replace(options, data=jittered))
        shown.append(cv2.imread(str(sheet)))
    padding = [(abs(picture.astype(int) - [104, 116, 124]).max(axis=2) == 0).mean() for picture in shown]
    assert 0.6 < padding[0] < 0.8, "three quarters of each image"
    assert padding[1] < 0.02


def test_a_sheet_of_a_file_alone_is_refused(root, tmp_path):
    path = root / "annotations" / "instances_train2017.json"
    with pytest.raises(UserError, match="--augmented needs the folder of a dataset"):
        run_command(path, f"--images={root / 'train2017'}", f"--augmented={tmp_path / 'sheet.png'}")
