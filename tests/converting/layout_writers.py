"""Writes a dataset in the layouts of other tools, from its annotations in COCO's format, as these tools do."""

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

SPLITS = ("train", "val")


def choose(coco_dir, split, names, num_images, polygons_only=True):
    """Returns the annotations of some classes and of the first images that have them."""
    content = json.loads((Path(coco_dir) / "annotations" / f"instances_{split}.json").read_text())
    categories = [category for category in content["categories"] if category["name"] in names]
    ids = {category["id"] for category in categories}
    annotations = [
        annotation
        for annotation in content["annotations"]
        if annotation["category_id"] in ids
        and not annotation["iscrowd"]
        and (isinstance(annotation["segmentation"], list) or not polygons_only)
    ]
    with_objects = {annotation["image_id"] for annotation in annotations}
    images = [image for image in content["images"] if image["id"] in with_objects][:num_images]
    chosen = {image["id"] for image in images}
    annotations = [annotation for annotation in annotations if annotation["image_id"] in chosen]
    return {"images": images, "annotations": annotations, "categories": categories}


class Part:
    """A split of a dataset in COCO's format: its annotations and the folder of its images."""

    def __init__(self, content, folder):
        self.content, self.folder = content, folder
        self.names = {category["id"]: category["name"] for category in content["categories"]}

    def __iter__(self):
        """Yields each image with its annotations."""
        for image in self.content["images"]:
            yield image, [a for a in self.content["annotations"] if a["image_id"] == image["id"]]

    def copy_images(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        for image in self.content["images"]:
            shutil.copy(self.folder / image["file_name"], folder)


def _write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def raster(annotation, height, width):
    """Returns the mask of an annotation, [height, width] bool."""
    parts = annotation["segmentation"]
    if isinstance(parts, dict):
        parts = [parts] if isinstance(parts["counts"], str) else [coco_mask.frPyObjects(parts, height, width)]
    else:
        parts = coco_mask.frPyObjects(parts, height, width)
    return coco_mask.decode(coco_mask.merge(parts)) > 0


def label_map(image, annotations, dtype=np.uint8):
    """Returns the objects drawn one over the other as 1, 2, ..., [height, width]."""
    labels = np.zeros((image["height"], image["width"]), dtype)
    for value, annotation in enumerate(annotations, start=1):
        labels[raster(annotation, *labels.shape)] = value
    return labels


# COCO's format in other layouts.


def coco(root, parts):
    for split, part in parts.items():
        _write_json(root / "annotations" / f"instances_{split}.json", part.content)
        part.copy_images(root / split)


def coco_in_images(root, parts):
    for split, part in parts.items():
        _write_json(root / "annotations" / f"instances_{split}.json", part.content)
        part.copy_images(root / "images" / split)


def roboflow(root, parts):
    for split, part in parts.items():
        folder = root / {"val": "valid"}.get(split, split)
        _write_json(folder / "_annotations.coco.json", part.content)
        part.copy_images(folder)


def one_json_each(root, parts):
    for split, part in parts.items():
        _write_json(root / f"{split}.json", part.content)
        part.copy_images(root / "photos")


def _renamed(part, name):
    images = [image | {"file_name": name(image["file_name"])} for image in part.content["images"]]
    return part.content | {"images": images}


def cvat(root, parts):
    _write_json(root / "annotations" / "instances_default.json", parts["train"].content)
    parts["train"].copy_images(root / "images")


def cvat_2(root, parts):
    _write_json(root / "annotations" / "instances_default.json", parts["train"].content)
    parts["train"].copy_images(root / "images" / "default")


def label_studio(root, parts):
    _write_json(root / "result.json", _renamed(parts["train"], "images/{}".format))
    parts["train"].copy_images(root / "images")


def labelme2coco(root, parts):
    _write_json(root / "annotations.json", _renamed(parts["train"], "JPEGImages/{}".format))
    parts["train"].copy_images(root / "JPEGImages")


def one_json(root, parts):
    _write_json(root / "my labels.json", parts["train"].content)
    parts["train"].copy_images(root / "photos")


def fiftyone(root, parts):
    _write_json(root / "labels.json", parts["train"].content)
    parts["train"].copy_images(root / "data")


def one_folder_each(root, parts):
    for split, part in parts.items():
        _write_json(root / split / "annotations.json", part.content)
        part.copy_images(root / split / "images")


def in_annotations(root, parts):
    for split, part in parts.items():
        _write_json(root / "annotations" / f"{split}.json", part.content)
        part.copy_images(root / "images")


def zipped(root, parts):
    roboflow(root / "archive" / "export 3", parts)


# Other formats. What they keep of an annotation differs: see the tests.


def yolo(root, parts, *, names_as_dict=False, beside=False):
    categories = next(iter(parts.values())).content["categories"]
    numbers = {category["id"]: i for i, category in enumerate(categories)}
    names = [category["name"] for category in categories]
    listed = "".join(f"\n  {i}: {name}" for i, name in enumerate(names)) if names_as_dict else json.dumps(names)
    lines = [f"nc: {len(names)}", f"names: {listed}"]
    for split, part in parts.items():
        # As Ultralytics has them, or as Roboflow, whose paths start one folder too high.
        images, given = (
            (root / split / "images", f"../{split}/images")
            if beside
            else (
                root / "images" / split,
                f"images/{split}",
            )
        )
        labels = root / split / "labels" if beside else root / "labels" / split
        lines.append(f"{split}: {given}")
        part.copy_images(images)
        labels.mkdir(parents=True)
        for image, annotations in part:
            size = np.array([image["width"], image["height"]])
            rows = []
            for annotation in annotations:
                for polygon in annotation["segmentation"]:
                    shares = (np.array(polygon).reshape(-1, 2) / size).ravel()
                    rows.append(" ".join([str(numbers[annotation["category_id"]]), *map("{:.6f}".format, shares)]))
            (labels / image["file_name"]).with_suffix(".txt").write_text("\n".join(rows))
    (root / "data.yaml").write_text("\n".join(lines) + "\n")


def yolo_of_roboflow(root, parts):
    yolo(root, parts, names_as_dict=True, beside=True)


def labelme(root, parts):
    for split, part in parts.items():
        part.copy_images(root / split)
        for image, annotations in part:
            shapes = []
            for group, annotation in enumerate(annotations):
                polygons = annotation["segmentation"]
                for polygon in polygons:
                    shapes.append(
                        {
                            "label": part.names[annotation["category_id"]],
                            "points": np.array(polygon).reshape(-1, 2).tolist(),
                            "group_id": group if len(polygons) > 1 else None,
                            "shape_type": "polygon",
                            "flags": {},
                        }
                    )
            content = {
                "version": "5.4.1",
                "flags": {},
                "shapes": shapes,
                "imagePath": image["file_name"],
                "imageData": None,
                "imageHeight": image["height"],
                "imageWidth": image["width"],
            }
            _write_json((root / split / image["file_name"]).with_suffix(".json"), content)


_NUM_COLOURS = 256


def _voc_palette():
    palette = np.zeros((_NUM_COLOURS, 3), np.uint8)
    for index in range(_NUM_COLOURS):
        for bit in range(8):
            palette[index] |= ((index >> (3 * bit + np.arange(3))) & 1).astype(np.uint8) << (7 - bit)
    return palette


def voc(root, parts, *, colours=False, xml=True):
    """Writes masks with VOC's palette, or in colours as CVAT does, with the names of classes in labelmap.txt."""
    palette = _voc_palette()
    names = list(next(iter(parts.values())).names.values())
    for folder in ("JPEGImages", "Annotations", "SegmentationObject", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    if colours:
        rows = ["# label:color_rgb:parts:actions", "background:0,0,0::"]
        rows += [f"{name}:{','.join(map(str, palette[i + 1]))}::" for i, name in enumerate(names)]
        (root / "labelmap.txt").write_text("\n".join(rows))
    for split, part in parts.items():
        part.copy_images(root / "JPEGImages")
        stems = [Path(image["file_name"]).stem for image in part.content["images"]]
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(stems) + "\n")
        for image, annotations in part:
            stem = Path(image["file_name"]).stem
            labels = label_map(image, annotations)
            numbers = [0, *(names.index(part.names[a["category_id"]]) + 1 for a in annotations)]
            for folder, values in (("SegmentationObject", labels), ("SegmentationClass", np.array(numbers)[labels])):
                if colours:
                    picture = Image.fromarray(palette[values])
                else:
                    picture = Image.fromarray(values.astype(np.uint8), "P")
                    picture.putpalette(palette.ravel().tolist())
                picture.save(root / folder / f"{stem}.png")
            if xml:
                _write_xml(root / "Annotations" / f"{stem}.xml", image, annotations, part.names)


def voc_in_colours(root, parts):
    voc(root, parts, colours=True, xml=False)


def voc_of_labelme(root, parts):
    voc(root, parts, xml=False)
    names = next(iter(parts.values())).names.values()
    (root / "class_names.txt").write_text("\n".join(["_background_", *names]))


def _write_xml(path, image, annotations, names):
    tree = ElementTree.Element("annotation")
    ElementTree.SubElement(tree, "filename").text = image["file_name"]
    size = ElementTree.SubElement(tree, "size")
    for tag in ("width", "height"):
        ElementTree.SubElement(size, tag).text = str(image[tag])
    for annotation in annotations:
        thing = ElementTree.SubElement(tree, "object")
        ElementTree.SubElement(thing, "name").text = names[annotation["category_id"]]
        box = ElementTree.SubElement(thing, "bndbox")
        x, y, width, height = annotation["bbox"]
        corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + width, "ymax": y + height}
        for tag, value in corners.items():
            ElementTree.SubElement(box, tag).text = str(round(value))
    path.write_bytes(ElementTree.tostring(tree))


def masks_by_class(root, parts, *, bits=8, colours=False, suffix=".png"):
    """Writes instance masks with a folder for each class."""
    rng = np.random.default_rng(0)
    for split, part in parts.items():
        part.copy_images(root / split / "images")
        for image, annotations in part:
            stem = Path(image["file_name"]).stem
            for category, name in part.names.items():
                folder = root / split / "masks" / name
                folder.mkdir(parents=True, exist_ok=True)
                own = [annotation for annotation in annotations if annotation["category_id"] == category]
                labels = label_map(image, own, np.uint8 if bits == 8 else np.uint16)
                if bits == 16:
                    labels = labels * np.uint16(300)
                if colours:
                    labels = np.concatenate([[[0, 0, 0]], rng.integers(1, 256, (255, 3))])[labels].astype(np.uint8)
                cv2.imwrite(str(folder / f"{stem}{suffix}"), labels)


def masks_16_bit(root, parts):
    masks_by_class(root, parts, bits=16, suffix=".tif")


def masks_in_colours(root, parts):
    masks_by_class(root, parts, colours=True)


TWO_SPLITS = (coco, coco_in_images, roboflow, one_json_each, one_folder_each, in_annotations, zipped)
ONE_SPLIT = (cvat, cvat_2, label_studio, labelme2coco, one_json, fiftyone)
POLYGONS = (yolo, yolo_of_roboflow, labelme)
RASTERS = (voc, voc_in_colours, voc_of_labelme, masks_by_class, masks_16_bit, masks_in_colours)
