"""Write a dataset of another format or layout in COCO's layout.

    maskrcnn-jax convert SOURCE OUT [--copy] [--class_name=nucleus]

SOURCE is the folder of a dataset: YOLO segmentation (data.yaml, labels/*.txt), labelme (a JSON an image), Pascal VOC
(Annotations/*.xml, SegmentationObject/*.png), images with instance masks (images/, masks/), or COCO's format as
Roboflow, CVAT, Label Studio and labelme2coco export it. OUT gets the annotations and links to the images.
"""

import argparse


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("source", metavar="SOURCE", help="folder of the dataset; its layout is found")
    parser.add_argument("out", metavar="OUT", help="folder to write, new or empty")
    parser.add_argument("--copy", action="store_true", help="copy the images instead of linking them")
    parser.add_argument(
        "--class_name",
        default="object",
        metavar="NAME",
        help="class of the objects in instance masks; %(default)s. Folders in masks/ name several classes",
    )


def main(options: argparse.Namespace) -> None:
    """Convert the dataset."""
    from maskrcnn_jax.converting.convert import convert

    for split, (images, annotations) in convert(
        options.source, options.out, copy=options.copy, class_name=options.class_name
    ).items():
        print(f"{split}: {images} images, {annotations} annotations")
    print(f"{options.out} written; check it with maskrcnn-jax check {options.out}")
