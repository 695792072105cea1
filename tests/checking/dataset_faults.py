"""Ways to damage a clean dataset of shapes, one thing at a time, and what the checker must call it.

Every function changes ``content`` (the decoded annotations of the training split) or files in ``root``, and returns
the text that names the place in the findings: the image, where there is one.
"""

import json

import cv2
import numpy as np
from PIL import Image

from maskrcnn_jax.data.findings import Kind


def _pick(content, rng):
    """Returns an annotation with polygons, and the file name of its image."""
    chosen = [a for a in content["annotations"] if isinstance(a.get("segmentation"), list)]
    annotation = chosen[int(rng.integers(len(chosen)))]
    return annotation, f"{annotation['image_id']:012d}.jpg"


def box_without_width(content, root, rng):
    annotation, name = _pick(content, rng)
    annotation["bbox"][2] = 0
    return name


def box_outside(content, root, rng):
    annotation, name = _pick(content, rng)
    annotation["bbox"][:2] = [500, 20]
    return name


def box_not_a_number(content, root, rng):
    annotation, name = _pick(content, rng)
    annotation["bbox"][int(rng.integers(4))] = float(rng.choice([np.nan, np.inf, -np.inf]))
    return name


def box_over_the_border(content, root, rng):
    annotation, name = _pick(content, rng)
    annotation["bbox"] = [20, 20, 400, 30]
    return name


def box_of_another_object(content, root, rng):
    annotation, name = _pick(content, rng)
    x, y, width, height = annotation["bbox"]
    annotation["bbox"] = [(x + 48) % 90, (y + 48) % 90, 5, 5]
    return name


def boxes_as_corners(content, root, rng):
    for annotation in content["annotations"]:
        if len(annotation["bbox"]) == 4:  # another fault may have emptied it
            x, y, width, height = annotation["bbox"]
            annotation["bbox"] = [x, y, x + width, y + height]
    return ""


def boxes_as_corners_without_masks(content, root, rng):
    for annotation in content["annotations"]:
        annotation["segmentation"] = []
    return boxes_as_corners(content, root, rng)


def boxes_as_shares(content, root, rng):
    for annotation in content["annotations"]:
        annotation["bbox"] = [value / 96 for value in annotation["bbox"]]
    return ""


def polygons_as_shares(content, root, rng):
    for annotation in content["annotations"]:
        if isinstance(annotation["segmentation"], list):
            annotation["segmentation"] = [[value / 96 for value in p] for p in annotation["segmentation"]]
    return ""


def polygon_of_two_points(content, root, rng):
    annotation, name = _pick(content, rng)
    annotation["segmentation"].append([3, 4, 5, 6])
    return name


def polygon_far_away(content, root, rng):
    annotation, name = _pick(content, rng)
    annotation["segmentation"].append([1e9, 3, 4, 1e12, 6, 7])
    return name


def polygon_outside(content, root, rng):
    annotation, name = _pick(content, rng)
    annotation["segmentation"] = [[value + 200 for value in p] for p in annotation["segmentation"]]
    return name


def polygon_without_a_pixel(content, root, rng):
    annotation, name = _pick(content, rng)
    x, y, width, height = annotation["bbox"]
    annotation["segmentation"] = [[x + 0.1, y + 0.1, x + 0.2, y + 0.1, x + 0.1, y + 0.2]]
    annotation["bbox"] = [x, y, 0.25, 0.25]
    return name


def polygon_not_in_a_list(content, root, rng):
    annotation, name = _pick(content, rng)
    annotation["segmentation"] = annotation["segmentation"][0]
    return name


def polygon_of_points(content, root, rng):
    annotation, name = _pick(content, rng)
    annotation["segmentation"] = [np.reshape(p, (-1, 2)).tolist() for p in annotation["segmentation"]]
    return name


def points_instead_of_polygons(content, root, rng):
    annotation, name = _pick(content, rng)
    annotation["segmentation"] = np.reshape(annotation["segmentation"][0], (-1, 2)).tolist()
    return name


def neither_box_nor_mask(content, root, rng):
    annotation, name = _pick(content, rng)
    annotation["bbox"], annotation["segmentation"] = [], []
    return name


def mask_missing(content, root, rng):
    annotation, name = _pick(content, rng)
    del annotation["segmentation"]
    return name


def run_lengths_of_another_size(content, root, rng):
    annotation, name = _pick(content, rng)
    annotation["segmentation"] = {"size": [48, 48], "counts": [48 * 48]}
    return name


def run_lengths_too_short(content, root, rng):
    annotation, name = _pick(content, rng)
    annotation["segmentation"] = {"size": [96, 96], "counts": [10, 50]}
    return name


def run_lengths_cut_within_a_number(content, root, rng):
    annotation, name = _pick(content, rng)
    annotation["segmentation"] = {"size": [96, 96], "counts": "0P"}
    return name


def numbers_as_text(content, root, rng):
    annotation, name = _pick(content, rng)
    annotation["bbox"] = [f"{value} px" for value in annotation["bbox"]]
    return name


def category_missing(content, root, rng):
    annotation, name = _pick(content, rng)
    del annotation["category_id"]
    return name


def crowd_as_text(content, root, rng):
    annotation, name = _pick(content, rng)
    annotation["iscrowd"] = "no"
    return name


def width_missing(content, root, rng):
    image = content["images"][int(rng.integers(len(content["images"])))]
    del image["width"]
    return image["file_name"]


def giant_size(content, root, rng):
    image = content["images"][int(rng.integers(len(content["images"])))]
    image["width"] = image["height"] = 10**8
    return image["file_name"]


def image_id_twice(content, root, rng):
    first, second = rng.choice(len(content["images"]), 2, replace=False).tolist()
    first, second = sorted((first, second))
    content["images"][second]["id"] = content["images"][first]["id"]
    return content["images"][second]["file_name"]


def file_listed_twice(content, root, rng):
    annotation, name = _pick(content, rng)
    content["images"].append({"id": 10_000, "file_name": name, "height": 96, "width": 96})
    annotation["image_id"] = 10_000
    return name


def same_pixels(content, root, rng):
    first = content["images"][int(rng.integers(len(content["images"])))]["file_name"]
    (root / "train2017" / "copy.jpg").write_bytes((root / "train2017" / first).read_bytes())
    content["images"].append({"id": 10_000, "file_name": "copy.jpg", "height": 96, "width": 96})
    return f"copy.jpg = {first}"


def unlisted_image(content, root, rng):
    annotation, _ = _pick(content, rng)
    annotation["image_id"] = 424242
    return "image 424242"


def category_zero(content, root, rng):
    annotation, name = _pick(content, rng)
    annotation["category_id"] = 0
    return name


def categories_off_by_one(content, root, rng):
    for annotation in content["annotations"]:
        annotation["category_id"] -= 1
    return ""


def category_id_twice(content, root, rng):
    content["categories"].append({"id": 1, "name": "again"})
    return ""


def category_without_a_name(content, root, rng):
    content["categories"].append({"id": 77})
    return "category 77"


def category_name_twice(content, root, rng):
    content["categories"].append({"id": 77, "name": content["categories"][0]["name"]})
    return content["categories"][0]["name"]


def same_annotation(content, root, rng):
    annotation, name = _pick(content, rng)
    content["annotations"].append(annotation | {"id": 10_000})
    return name


def annotation_id_twice(content, root, rng):
    annotation, name = _pick(content, rng)
    other = next(a for a in content["annotations"] if a["id"] != annotation["id"])
    annotation["id"] = other["id"]
    return ""


def image_cut_short(content, root, rng):
    path = root / "train2017" / f"{int(rng.integers(1, 11)):012d}.jpg"
    path.write_bytes(path.read_bytes()[:-100])
    return path.name


def image_of_another_size(content, root, rng):
    path = root / "train2017" / f"{int(rng.integers(1, 11)):012d}.jpg"
    cv2.imwrite(str(path), np.zeros((50, 40, 3), np.uint8))
    return path.name


def pixel_bomb(content, root, rng):
    path = root / "train2017" / f"{int(rng.integers(1, 11)):012d}.jpg"
    Image.new("1", (6_000, 6_000)).save(path, format="png")
    return path.name


def file_missing(content, root, rng):
    path = root / "train2017" / f"{int(rng.integers(1, 11)):012d}.jpg"
    path.unlink()
    return path.name


def file_in_other_case(content, root, rng):
    image = content["images"][int(rng.integers(len(content["images"])))]
    image["file_name"] = "train2017/" + image["file_name"].upper()
    return image["file_name"]


def file_in_other_form(content, root, rng):
    image = content["images"][int(rng.integers(len(content["images"])))]
    path = root / "train2017" / image["file_name"]
    path.rename(path.with_stem(f"e\u0301 {path.stem}"))
    image["file_name"] = f"\u00e9%20{image['file_name']}"
    return image["file_name"]


def of_several_pages(content, root, rng):
    path = root / "train2017" / f"{int(rng.integers(1, 11)):012d}.jpg"
    with Image.open(path) as page:
        page.load()
    page.save(path, format="TIFF", save_all=True, append_images=[page.rotate(90)])
    return path.name


def training_image_in_val(content, root, rng):
    name = f"{int(rng.integers(1, 11)):012d}.jpg"
    (root / "val2017" / "000000000001.jpg").write_bytes((root / "train2017" / name).read_bytes())
    return name


def category_only_in_val(content, root, rng):
    path = root / "annotations" / "instances_val2017.json"
    val = json.loads(path.read_text())
    val["categories"][0]["name"] = "disc"
    path.write_text(json.dumps(val))
    return "disc"


def _resave(root, rng, change, **options):
    path = root / "train2017" / f"{int(rng.integers(1, 11)):012d}.jpg"
    with Image.open(path) as image:
        changed = change(image.convert("RGB"))
    changed.save(path, **options)
    return path.name


def stored_turned(content, root, rng):
    exif = Image.Exif()
    exif[0x0112] = 6
    return _resave(root, rng, lambda image: image, exif=exif)


def in_cmyk(content, root, rng):
    return _resave(root, rng, lambda image: image.convert("CMYK"))


def in_grey(content, root, rng):
    return _resave(root, rng, lambda image: image.convert("L"))


def with_alpha(content, root, rng):
    path = root / "train2017" / f"{int(rng.integers(1, 11)):012d}.jpg"
    path.write_bytes(cv2.imencode(".png", rng.integers(256, size=(96, 96, 4), dtype=np.uint8))[1].tobytes())
    return path.name


def of_16_bits(content, root, rng):
    path = root / "train2017" / f"{int(rng.integers(1, 11)):012d}.jpg"
    path.write_bytes(cv2.imencode(".png", rng.integers(2**16, size=(96, 96, 3), dtype=np.uint16))[1].tobytes())
    return path.name


def tiny_objects(content, root, rng):
    name = ""
    for annotation in content["annotations"][:5]:
        x, y, _, _ = annotation["bbox"]
        annotation["bbox"] = [x, y, 3, 3]
        annotation["segmentation"] = [[x, y, x + 3, y, x + 3, y + 3, x, y + 3]]
        name = name or f"{annotation['image_id']:012d}.jpg"
    return name


def thin_objects(content, root, rng):
    for annotation in content["annotations"][:5]:
        annotation["bbox"] = [0, 5, 96, 6]
        annotation["segmentation"] = [[0, 5, 96, 5, 96, 11, 0, 11]]
    return f"{content['annotations'][0]['image_id']:012d}.jpg"


def one_object_of_a_class(content, root, rng):
    content["categories"].append({"id": 77, "name": "spiral"})
    content["annotations"][0]["category_id"] = 77
    return "spiral (1)"


def all_crowds(content, root, rng):
    for annotation in content["annotations"][:-8]:
        annotation["iscrowd"] = 1
    return f"{content['annotations'][0]['image_id']:012d}.jpg"


def only_crowds(content, root, rng):
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    return f"{content['annotations'][0]['image_id']:012d}.jpg"


def area_of_minus_one(content, root, rng):
    annotation, name = _pick(content, rng)
    annotation["area"] = -1
    return name


def many_objects(content, root, rng):
    annotation, name = _pick(content, rng)
    for i in range(31):  # more than model.box_detections_per_img of the config "shapes"
        box = {"bbox": [9, 9, 40 + i / 100, 40], "segmentation": [[9, 9, 49, 9, 49, 49, 9, 49]]}
        content["annotations"].append(annotation | box | {"id": 10_000 + i})
    return name


def objects_missing(content, root, rng):
    last = content["annotations"][-1]["image_id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] > last - 15]
    return f"{1:012d}.jpg"


def class_without_objects(content, root, rng):
    content["categories"].append({"id": 77, "name": "spiral"})
    return "spiral"


def file_not_listed(content, root, rng):
    cv2.imwrite(str(root / "train2017" / "stray.png"), np.zeros((9, 9), np.uint8))
    return "stray.png"


FAULTS = {
    box_without_width: Kind.FLAT_BOX,
    box_outside: Kind.OUTSIDE_BOX,
    box_not_a_number: Kind.NOT_FINITE,
    box_over_the_border: Kind.CLIPPED_BOX,
    box_of_another_object: Kind.MISFIT,
    boxes_as_corners: Kind.CORNERS,
    boxes_as_corners_without_masks: Kind.CORNERS,
    boxes_as_shares: Kind.NORMALISED_BOXES,
    polygons_as_shares: Kind.NORMALISED_POLYGONS,
    polygon_of_two_points: Kind.SHORT_POLYGON,
    polygon_far_away: Kind.FAR_POLYGON,
    polygon_outside: Kind.EMPTY_MASK,
    polygon_without_a_pixel: Kind.EMPTY_MASK,
    polygon_not_in_a_list: Kind.NESTING,
    polygon_of_points: Kind.NESTING,
    points_instead_of_polygons: Kind.NESTING,
    neither_box_nor_mask: Kind.NO_BOX_NOR_MASK,
    mask_missing: Kind.ONLY_BOX,
    run_lengths_of_another_size: Kind.OTHER_SIZE,
    run_lengths_too_short: Kind.UNFILLED,
    run_lengths_cut_within_a_number: Kind.MALFORMED_ANNOTATION,
    numbers_as_text: Kind.MALFORMED_ANNOTATION,
    category_missing: Kind.MALFORMED_ANNOTATION,
    crowd_as_text: Kind.MALFORMED_ANNOTATION,
    width_missing: Kind.MALFORMED_IMAGE,
    giant_size: Kind.MALFORMED_IMAGE,
    image_id_twice: Kind.IMAGE_IDS_TWICE,
    file_listed_twice: Kind.SAME_FILE,
    same_pixels: Kind.SAME_PIXELS,
    unlisted_image: Kind.UNLISTED_IMAGE,
    category_zero: Kind.UNLISTED_CATEGORY,
    categories_off_by_one: Kind.OFF_BY_ONE,
    category_id_twice: Kind.CATEGORY_IDS_TWICE,
    category_without_a_name: Kind.MALFORMED_CATEGORY,
    category_name_twice: Kind.SAME_NAME,
    same_annotation: Kind.SAME_ANNOTATION,
    annotation_id_twice: Kind.SAME_ID,
    image_cut_short: Kind.BROKEN,
    image_of_another_size: Kind.BROKEN,
    pixel_bomb: Kind.BROKEN,
    file_missing: Kind.MISSING_FILE,
    file_in_other_case: Kind.MISSING_FILE,
    file_in_other_form: Kind.OTHER_FORM,
    of_several_pages: Kind.FRAMES,
    training_image_in_val: Kind.LEAK,
    category_only_in_val: Kind.UNKNOWN_CATEGORY,
    stored_turned: Kind.TURNED,
    in_cmyk: Kind.CMYK,
    in_grey: Kind.GREY,
    of_16_bits: Kind.DEEP,
    with_alpha: Kind.ALPHA,
    tiny_objects: Kind.SMALL,
    thin_objects: Kind.LARGE,
    one_object_of_a_class: Kind.RARE_CATEGORY,
    all_crowds: Kind.CROWDS,
    only_crowds: Kind.ONLY_CROWDS,
    area_of_minus_one: Kind.WRONG_AREA,
    many_objects: Kind.MANY_OBJECTS,
    objects_missing: Kind.EMPTY,
    class_without_objects: Kind.UNUSED_CATEGORY,
    file_not_listed: Kind.NOT_LISTED,
}
# Of which the reader makes something usable, with masks all the same: what a training may meet in one dataset.
READ_ANYWAY = (
    box_without_width,
    box_outside,
    box_not_a_number,
    box_over_the_border,
    box_of_another_object,
    polygon_of_two_points,
    polygon_far_away,
    polygon_outside,
    neither_box_nor_mask,
    same_annotation,
)


def damage(root, fault, seed=0):
    """Damages the training split of the dataset in ``root``; returns what the function returns."""
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    name = fault(content, root, np.random.default_rng(seed))
    path.write_text(json.dumps(content))
    return name
