"""Image files are found under names that are written in another form than in the annotations."""

import unicodedata

import pytest

from maskrcnn_jax.data.dataset import load_coco
from maskrcnn_jax.data.findings import Kind
from maskrcnn_jax.errors import UserError

COMPOSED = "caf\u00e9 \uac00"
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)
URL = "caf%C3%A9%20%EA%B0%80"


def listed_as(dataset, name, *on_disk):
    """Write a dataset with an image that the annotations call ``name``, and copies of it on disk."""
    root = dataset.write([(20, 30)], images=[{"id": 1, "file_name": name, "height": 20, "width": 30}])
    content = dataset.image_path("1.jpg").read_bytes()
    for other in on_disk:
        path = dataset.image_path(other)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


@pytest.mark.parametrize("folder", ["", "{}/"])
@pytest.mark.parametrize("on_disk", [COMPOSED, DECOMPOSED, URL])
@pytest.mark.parametrize("name", [COMPOSED, DECOMPOSED, URL])
def test_a_file_is_found_whatever_the_form_of_its_name(dataset, name, on_disk, folder, caplog):
    name, on_disk = (f"{folder.format(form)}{form}.jpg" for form in (name, on_disk))
    index = load_coco(listed_as(dataset, name, on_disk), "train2017")
    assert index.read_image(0).shape == (20, 30, 3)
    assert index.file_names.tolist() == [on_disk]
    assert index.problems == ({} if name == on_disk else {Kind.OTHER_FORM: 1})
    assert (Kind.OTHER_FORM in caplog.text) == (name != on_disk)


def test_folders_may_be_divided_as_windows_does(dataset):
    assert load_coco(listed_as(dataset, "a\\b c\\d.jpg", "a/b c/d.jpg"), "train2017").file_names == ["a/b c/d.jpg"]


def test_a_name_that_is_there_is_taken_and_one_that_may_mean_two_files_is_not(dataset):
    names = [f"{form}.jpg" for form in (COMPOSED, DECOMPOSED)]
    index = load_coco(listed_as(dataset, names[0], *names), "train2017")
    assert index.file_names.tolist() == names[:1] and not index.problems
    with pytest.raises(UserError, match="is missing from"):
        load_coco(listed_as(dataset, f"{URL}.jpg", *names), "train2017")
    with pytest.raises(UserError, match="is missing from"):
        load_coco(listed_as(dataset, "a%20c.jpg", "a b.jpg"), "train2017")
