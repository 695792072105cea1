"""Detections as annotations: label images, GeoJSON and labelme's JSON, so that other tools can show and correct them.

GeoJSON has the exact polygons of ``polygons.py``, in pixels from the upper left corner of the image, as QuPath reads
them. labelme's polygons have few points, because they are there to be dragged; ``maskrcnn-jax convert`` makes a
dataset of what was corrected. Without JAX.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.data.run_lengths import decode_crop
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.polygons import join_holes, mask_to_polygons, simplify
from maskrcnn_jax.paths import read_bytes
from maskrcnn_jax.writing import make_folder, replace_file, write_json

_MOST = (1 << 16) - 1  # of a PNG with 16 bits
_TOLERANCE = 0.75  # pixels by which labelme's polygons may miss the border of a mask; stairs of pixels become lines


class Annotations(NamedTuple):
    """Which files are wanted beside the pictures and tables."""

    masks: bool = False  # label images
    polygons: str = ""  # "geojson", "labelme" or neither

    def folders(self, output: Path) -> list[Path]:
        """Return the folders in the output folder that are written to."""
        kinds = [*(("instances", "classes") if self.masks else ()), *filter(None, [self.polygons])]
        return [output / kind for kind in kinds]

    def check(self, output: Path, categories: Categories, *, of_video: bool = False) -> None:
        """Raise UserError if these files cannot be written into a folder, or would replace what was corrected."""
        if self.masks and not (min(categories.ids) > 0 and max(categories.ids) <= _MOST):
            raise UserError(
                f"label images hold category ids from 1 to {_MOST}, but the model has {min(categories.ids)} to "
                f"{max(categories.ids)}; write polygons instead"
            )
        if self.polygons == "labelme" and of_video:
            raise UserError("labelme annotates image files and no videos; use geojson, or give the frames as images")
        if self.polygons == "labelme" and any((output / "labelme").glob("*.json")):
            raise UserError(
                f"{output / 'labelme'} holds annotations, which may have been corrected; use another output folder, "
                "or remove them"
            )

    def write(
        self,
        output: Path,
        name: str,
        results: Sequence[dict],
        categories: Categories,
        size: tuple[int, int],
        image: Path | None = None,
    ) -> None:
        """Write the files of one image.

        Args:
            output: folder; each kind of file has a folder of its own in it.
            name: of the files, without an ending.
            results: COCO results, best first.
            categories: of the model.
            size: (height, width) of the image.
            image: its file; labelme's files come with a copy.
        """
        names = dict(zip(categories.ids, categories.names, strict=True))
        if self.masks:
            for kind, labels in zip(("instances", "classes"), label_images(results, size), strict=True):
                make_folder(output / kind)
                replace_file(output / kind / f"{name}.png", cv2.imencode(".png", labels)[1].tobytes())
        if self.polygons == "geojson":
            make_folder(output / "geojson")
            write_json(output / "geojson" / f"{name}.geojson", to_geojson(results, names))
        if self.polygons == "labelme" and image is not None:
            make_folder(output / "labelme")
            replace_file(output / "labelme" / image.name, read_bytes(image))
            write_json(output / "labelme" / f"{name}.json", to_labelme(results, names, size, image.name), indent=1)


def label_images(results: Sequence[dict], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draw the masks of an image as numbers.

    Args:
        results: COCO results, best first.
        size: (height, width) of the image.

    Returns:
        instances: [h, w] uint16, the place of a detection in the results, counted from 1; 0 where there is none. Of
            overlapping ones, the best is seen.
        classes: [h, w] uint16, category ids likewise.
    """
    if len(results) > _MOST:
        raise UserError(f"a label image holds {_MOST} objects, but there are {len(results)}; raise the minimum score")
    instances, classes = np.zeros(size, np.uint16), np.zeros(size, np.uint16)
    for place in range(len(results), 0, -1):
        crop = decode_crop(results[place - 1]["segmentation"])
        height, width = crop.mask.shape
        window = np.s_[crop.y : crop.y + height, crop.x : crop.x + width]
        instances[window][crop.mask > 0] = place
        classes[window][crop.mask > 0] = results[place - 1]["category_id"]
    return instances, classes


def to_geojson(results: Sequence[dict], names: dict[int, str]) -> dict:
    """Return the masks of an image as GeoJSON; those without a pixel have no geometry.

    Args:
        results: COCO results.
        names: of the categories, by id.

    Returns:
        A FeatureCollection with a Polygon or MultiPolygon for each object, in pixels; ``properties`` have what QuPath
        reads, the category id and the score.
    """
    features = []
    for result in results:
        regions = _regions(result)
        rings = [[_closed(ring) for ring in region] for region in regions]
        geometry: dict[str, Any] = {"type": "MultiPolygon", "coordinates": rings}
        if len(rings) == 1:
            geometry = {"type": "Polygon", "coordinates": rings[0]}
        properties = {
            "objectType": "annotation",
            "classification": {"name": names[result["category_id"]]},
            "category_id": result["category_id"],
            "score": result["score"],
        }
        features.append({"type": "Feature", "geometry": geometry if rings else None, "properties": properties})
    return {"type": "FeatureCollection", "features": features}


def _closed(ring: np.ndarray) -> list[list[float]]:
    """Return a ring as GeoJSON has it: the first point again at the end, outlines anticlockwise where y points up."""
    ring = ring[::-1]
    return [*ring.tolist(), ring[0].tolist()]


def to_labelme(results: Sequence[dict], names: dict[int, str], size: tuple[int, int], image_name: str) -> dict:
    """Return the masks of an image as labelme's JSON; those without a pixel are left out.

    A region with holes is one polygon, with cuts of no width to its holes. The regions of an object share a group_id.

    Args:
        results: COCO results.
        names: of the categories, by id.
        size: (height, width) of the image.
        image_name: of its file, beside the JSON.
    """
    shapes = []
    for place, result in enumerate(results, start=1):
        polygons = list(_outlines(result))
        for points in polygons:
            shapes.append(
                {
                    "label": names[result["category_id"]],
                    "points": points.tolist(),
                    "group_id": place if len(polygons) > 1 else None,
                    "description": f"score {result['score']:.2f}",
                    "shape_type": "polygon",
                    "flags": {},
                }
            )
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": os.fspath(image_name),
        "imageData": None,
        "imageHeight": int(size[0]),
        "imageWidth": int(size[1]),
    }


def _outlines(result: dict) -> Iterator[np.ndarray]:
    for rings in _regions(result):
        yield join_holes([simplify(ring, _TOLERANCE) for ring in rings])


def _regions(result: dict) -> list[list[np.ndarray]]:
    return mask_to_polygons(decode_crop(result["segmentation"]))
