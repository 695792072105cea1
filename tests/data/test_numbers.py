"""Numbers that tools write as text or with a fraction of zero are the same dataset, for training and evaluation."""

import copy
import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from maskrcnn_jax.checking.dataset import check_split
from maskrcnn_jax.checking.mend import mend
from maskrcnn_jax.config import load_config, to_options
from maskrcnn_jax.data.dataset import load_coco
from maskrcnn_jax.data.numbers import number, plain
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.evaluation.coco_metrics import evaluate, ground_truth, load_annotations
from maskrcnn_jax.evaluation.detections_file import read_results

SQUARE = [2, 3, 10, 3, 10, 9, 2, 9]
COUNTS = [43, 6, 14, 6, 14, 6, 511]  # fill the image


def content():
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 3, 8, 6], "segmentation": [SQUARE], "area": 48},
        {"id": 2, "image_id": 2, "category_id": 2, "bbox": [2, 3, 3, 6], "iscrowd": 1, "area": 18}
        | {"segmentation": {"size": [20, 30], "counts": COUNTS}},
        {"id": 3, "image_id": 2, "category_id": 1, "bbox": [2.5, 3, 8, 6], "segmentation": [SQUARE], "iscrowd": 0},
    ]
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 20, "width": 30} for i in (1, 2)]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "7"}]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def change(value, convert, name=""):
    """Return a JSON value with every number in it converted, file and class names aside."""
    if isinstance(value, dict):
        return {key: change(item, convert, key) for key, item in value.items()}
    if isinstance(value, list):
        return [change(item, convert, name) for item in value]
    return value if isinstance(value, str) else convert(value)


def points_as_dicts(document):
    for annotation in document["annotations"]:
        if isinstance(annotation["segmentation"], list):
            points = [{"x": x, "y": y} for x, y in zip(SQUARE[::2], SQUARE[1::2], strict=True)]
            annotation["segmentation"] = points if annotation["id"] == 1 else [points]
    return document


FORMS = {
    "fractions of zero": lambda document: change(document, float),
    "text": lambda document: change(document, str),
    "text with fractions": lambda document: change(document, lambda value: f"{float(value):.2f}"),
    "points as dicts": points_as_dicts,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_file_is_read_and_evaluated_as_if_its_numbers_were_written_as_coco_does(dataset, form):
    root = dataset.write([(20, 30)] * 2, **content())
    expected, truth = load_coco(root, "train2017"), load_annotations(dataset.json_path)
    dataset.json_path.write_text(json.dumps(form(content())))
    found = load_coco(root, "train2017")
    for name, values in vars(expected).items():
        if isinstance(values, np.ndarray):
            np.testing.assert_array_equal(getattr(found, name), values, err_msg=name)
        else:
            assert getattr(found, name) == values, name
    assert ground_truth(found).dataset == truth.dataset
    # The first evaluation after a training used to crash.
    (result, *_) = [a | {"score": 1.0} for a in truth.anns.values()]
    assert evaluate(dataset.json_path, [result])["segm_per_category"]["cat"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("section", "field", "value", "named"),
    [
        ("annotations", "image_id", "img_1", "`$.image_id`"),
        ("annotations", "image_id", 1.5, "`$.image_id`"),
        ("annotations", "category_id", "1,0", "`$.category_id`"),
        ("annotations", "bbox", ["2px", 3, 8, 6], "`$.bbox[0]`"),
        ("annotations", "iscrowd", "no", "`$.iscrowd`"),
        ("annotations", "iscrowd", "2", "iscrowd is 2"),
        ("annotations", "segmentation", {"size": [20.5, 30], "counts": COUNTS}, "`$.segmentation.size[0]`"),
        ("annotations", "segmentation", {"size": [20, 30], "counts": [43.5, 556.5]}, "`$.segmentation.counts[0]`"),
        ("annotations", "segmentation", [["a", 3, 10, 3, 10, 9]], "`$.segmentation[0][0]`"),
        ("annotations", "id", "9007199254740993.5", "`$.id`"),
        ("images", "height", "20 px", "`$.height`"),
        ("images", "width", 30.25, "`$.width`"),
    ],
)
def test_what_is_no_exact_number_is_refused_by_entry_and_field(dataset, section, field, value, named):
    document = content()
    document[section][0][field] = value
    root = dataset.write([(20, 30)] * 2, **document)
    with pytest.raises(UserError) as error:
        load_coco(root, "train2017")
    told = str(error.value)
    assert f"{section.removesuffix('s')} {document[section][0]['id']} in {dataset.json_path} is malformed" in told
    assert named in told


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *(
            ("7", 7),
            (" -3 ", -3),
            ("7.50", 7.5),
            ("1e2", 100),
            (7.0, 7),
            (2.0**53, 2.0**53),
            ("9" * 19, int("9" * 19)),
        ),
        *((value, value) for value in ("", "x", "nan", "inf", "1_000", "7,5", "0x7", "9" * 20, 7.5, True, None)),
    ],
)
def test_only_exact_numbers_are_converted(value, expected):
    assert number(value) == expected
    assert type(number(value)) is type(expected)


def test_run_lengths_as_compressed_text_stay_text():
    counts = coco_mask.encode(np.ones((3, 4), np.uint8, order="F"))["counts"].decode()
    assert counts == "0<"
    for text in (counts, "12", "1e3"):
        entry = {"segmentation": {"size": ["3", 4.0], "counts": text}}
        assert plain(entry) == {"segmentation": {"size": [3, 4], "counts": text}}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_cleaned_copy_keeps_the_entries_and_writes_their_numbers_as_coco_does(dataset, tmp_path, form):
    document = content()
    document["annotations"][2]["id"] = 1  # an error, so that there is something to mend
    root = dataset.write([(20, 30)] * 2, **form(copy.deepcopy(document)))
    split = check_split(
        "val", dataset.json_path, root / "train2017", to_options(load_config("shapes")), evaluated=True
    )
    mend(split, tmp_path / "mended.json")
    document["annotations"][2]["id"] = 3
    assert json.loads((tmp_path / "mended.json").read_text()) == document


@pytest.mark.parametrize("convert", [float, str])
def test_results_are_read_as_if_their_numbers_were_written_as_coco_does(dataset, tmp_path, convert):
    dataset.write([(20, 30)] * 2, **content())
    truth = load_annotations(dataset.json_path)
    rle = coco_mask.frPyObjects({"size": [20, 30], "counts": COUNTS}, 20, 30)
    result = {"image_id": 2, "category_id": 1, "bbox": [2, 3, 3, 6], "score": 1}
    expected = [result | {"segmentation": rle}]
    for segmentation in ({"size": [20, 30], "counts": COUNTS}, rle | {"counts": rle["counts"].decode()}):
        path = tmp_path / "results.json"
        # With the mark that some editors put first.
        path.write_text(json.dumps(change([result | {"segmentation": segmentation}], convert)), encoding="utf-8-sig")
        assert read_results(path, truth.imgs, truth.cats) == expected
