"""Writes an annotation file of COCO's size and measures how long opening it takes; test_coco.py runs it.

python tests/data/large_index.py write DIR
python tests/data/large_index.py measure DIR      # prints one JSON object
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

NUM_IMAGES, NUM_ANNOTATIONS, MEAN_COORDINATES = 118_287, 860_001, 45


def write(root: Path) -> None:
    """Writes train2017/ with one empty file per image and the annotations, polygons about as long as COCO's."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    (root / "train2017").mkdir()
    for i in range(NUM_IMAGES):
        (root / "train2017" / f"{i:012d}.jpg").touch()
    lengths = 6 + 2 * rng.poisson((MEAN_COORDINATES - 6) / 2, NUM_ANNOTATIONS)
    image_ids = rng.integers(NUM_IMAGES, size=NUM_ANNOTATIONS)
    corners = rng.uniform(0, 400, (NUM_ANNOTATIONS, 2)).round(2)
    sides = rng.uniform(10, 80, (NUM_ANNOTATIONS, 2)).round(2)
    # A pool of ready texts: formatting 39 million numbers one by one would take minutes.
    pool = [f"{value:.2f}" for value in rng.uniform(0, 480, 100_000)]
    starts = rng.integers(len(pool) - int(lengths.max()), size=NUM_ANNOTATIONS)
    with open(root / "annotations" / "instances_train2017.json", "w") as file:
        image = {"license": 3, "coco_url": "http://images.example.org/train2017/000000391895.jpg", "height": 480}
        image |= {
            "width": 640,
            "date_captured": "2013-11-14 11:18:45",
            "flickr_url": "http://farm9.example.org/8186.jpg",
        }
        images = [image | {"file_name": f"{i:012d}.jpg", "id": i} for i in range(NUM_IMAGES)]
        file.write(f'{{"info": {{}}, "licenses": [], "images": {json.dumps(images)}, "annotations": [')
        for k in range(NUM_ANNOTATIONS):
            polygon = ", ".join(pool[starts[k] : starts[k] + lengths[k]])
            (x, y), (w, h) = corners[k], sides[k]
            file.write(
                f'{", " if k else ""}{{"segmentation": [[{polygon}]], "area": {w * h:.4f}, "iscrowd": 0, '
                f'"image_id": {image_ids[k]}, "bbox": [{x}, {y}, {w}, {h}], "category_id": {1 + k % 11}, "id": {k}}}'
            )
        categories = [{"id": i + 1, "name": str(i)} for i in range(11)]
        file.write(f'], "categories": {json.dumps(categories)}}}')


def measure(root: Path) -> None:
    """Prints the seconds of processor time, the peak memory of the process, the sizes of the dataset and findings."""
    from maskrcnn_jax.data.dataset import load_coco

    start = time.process_time()
    dataset = load_coco(root, "train2017")
    seconds = time.process_time() - start
    # Not getrusage's ru_maxrss: Linux lets a process inherit that of the one that started it.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    peak = int(line.split()[1]) * 1024
    from maskrcnn_jax.checking.anchors import Anchors
    from maskrcnn_jax.checking.annotations import check_index
    from maskrcnn_jax.options import Options

    start = time.process_time()
    found = check_index(dataset, Anchors.from_options(Options()))
    check_seconds = time.process_time() - start
    measured = {"seconds": seconds, "check_seconds": check_seconds, "peak_bytes": peak}
    measured |= {"images": len(dataset), "objects": len(dataset.labels)}
    print(json.dumps(measured | {"findings": [finding.kind for finding in found]}))


if __name__ == "__main__":
    {"write": write, "measure": measure}[sys.argv[1]](Path(sys.argv[2]))
