import pytest

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.errors import UserError

COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


def test_the_80_categories_of_coco_keep_their_ids_as_labels():
    categories = Categories.create(COCO_IDS[::-1], [f"c{i}" for i in COCO_IDS[::-1]])
    assert categories.num_classes == 91
    assert categories.labels == tuple(COCO_IDS)
    assert categories.name(90) == "c90"
    assert categories.category_id(90) == 90


def test_categories_survive_a_file(tmp_path):
    categories = Categories.create([4, 2], ["Käse", "猫"])
    categories.save(tmp_path / "categories.json")
    assert Categories.load(tmp_path / "categories.json") == categories


@pytest.mark.parametrize("content", [None, "[]", "{", '{"categories": [{"id": 1}], "num_classes": 2}'])
def test_a_file_that_holds_no_categories_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "categories.json").write_text(content)
    with pytest.raises(UserError, match="categories"):
        Categories.load(tmp_path / "categories.json")
