"""Run a model that maskrcnn-jax export wrote. Needs what follows and nothing else; copy this file beside it.

pip install jax flatbuffers numpy opencv-python-headless
python run_exported.py MODEL IMAGE [IMAGE ...]      # prints a line of JSON for each image
"""

import argparse
import json

import cv2
import jax
import jax.export
import numpy as np


class ExportedModel:
    """Finds objects in images; programs are compiled when the first image of their size comes.

    Images of one padded size are worked on together; on CPUs each alone, which is faster there.
    """

    def __init__(self, path, together=None):
        file = np.load(path)  # which refuses pickles, so that nothing in the file runs but its programs
        self.about = json.loads(file["model.json"])
        self.categories = {row["label"]: row for row in self.about["categories"]}
        self._weights = [jax.device_put(file[f"weights/{i}"]) for i in range(self.about["num_weights"])]
        self._together = jax.default_backend() != "cpu" if together is None else together
        prefix = "" if self._together else "1x"
        self._programs = {
            (height, width): _program(file[f"{prefix}{height}x{width}.stablehlo"])
            for height, width in self.about["sizes"]
        }

    def detect(self, images, min_score=0.5):
        """Find the objects in images [h, w, 3] uint8, in RGB.

        Objects with a lower score are left out. Returns a dict for each image: boxes [K, 4] x1, y1, x2, y2 in its
        pixels, scores [K], labels [K] and masks [K, 28, 28], best first.
        """
        prepared = [self._prepare(image) for image in images]
        results = [None] * len(images)
        batches = [[i] for i in range(len(images))]
        if self._together:
            sizes = [padded.shape[:2] for padded, _ in prepared]
            batches = [[i for i, other in enumerate(sizes) if other == size] for size in set(sizes)]
        for rows in batches:
            found = self._programs[prepared[rows[0]][0].shape[:2]](
                self._weights,
                np.stack([prepared[i][0] for i in rows]),
                np.array([prepared[i][1] for i in rows], np.int32),
                np.array([images[i].shape[:2] for i in rows], np.int32),
            )
            found = {name: np.asarray(values) for name, values in found.items()}
            for row, i in enumerate(rows):
                # A model may have labels that stand for no category.
                keep = found["valid"][row] & np.isin(found["labels"][row], list(self.categories))
                keep &= found["scores"][row] >= min_score
                results[i] = {name: values[row][keep] for name, values in found.items() if name != "valid"}
        return results

    def _prepare(self, image):
        """Resize an image and pad it; returns it and its size inside the padding."""
        about = self.about
        height, width = image.shape[:2]
        scale = min(about["short_side"] / min(height, width), about["long_side"] / max(height, width))
        rounding = 0.5 if about["resize"] == "pillow" else 0
        height, width = size = [max(int(side * scale + rounding), 1) for side in (height, width)]
        if about["resize"] == "pillow":
            from PIL import Image

            resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        else:
            resized = cv2.resize(image.astype(about["dtype"]), (width, height), interpolation=cv2.INTER_LINEAR)
        fitting = [(h, w) for h, w in about["sizes"] if h >= height and w >= width]
        if not fitting:
            raise ValueError(f"an image of {height}x{width} after resizing fits none of {about['sizes']}; export more")
        padded = np.zeros((*fitting[0], image.shape[2]), about["dtype"])
        padded[:height, :width] = resized
        return padded, size

    def paste(self, mask, box, image_size):
        """Return a mask [28, 28] in its image, [h, w] bool."""
        ends = np.array(box, np.float32).reshape(2, 2).T  # (x1, x2), (y1, y2)
        if not self.about["aligned_masks"]:
            # torchvision widens masks by a cell all around and their boxes with them, to whole pixels.
            half = (ends[:, 1] - ends[:, 0]) * np.float32(0.5) * np.float32((len(mask) + 2) / len(mask))
            centre = (ends[:, 1] + ends[:, 0]) * np.float32(0.5)
            ends = np.stack([np.trunc(centre - half), np.trunc(centre + half) + 1], axis=1)
            mask = np.pad(mask, 1)
        weights = []
        for (low, high), length in zip(ends, image_size[::-1], strict=True):
            cells = (np.arange(length) + 0.5 - low) / max(high - low, 1e-6) * len(mask) - 0.5
            weights.append(np.maximum(1 - np.abs(cells[:, None] - np.arange(len(mask))), 0))
        return weights[1] @ mask @ weights[0].T >= 0.5


def _program(serialized):
    return jax.jit(jax.export.deserialize(bytearray(serialized)).call)


def main():
    parser = argparse.ArgumentParser(description="Prints what an exported model finds, a line of JSON for each image.")
    parser.add_argument("model", help="file that maskrcnn-jax export wrote")
    parser.add_argument("images", nargs="+", help="files that OpenCV reads")
    parser.add_argument("--min_score", type=float, default=0.5, help="leave out objects below this")
    args = parser.parse_args()
    try:
        model = ExportedModel(args.model)
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"{args.model} cannot be read as an exported model: {error}") from None
    for name in args.images:
        image = cv2.imread(name)
        if image is None:
            raise SystemExit(f"{name} cannot be read as an image")
        image = np.ascontiguousarray(image[..., ::-1])
        (found,) = model.detect([image], args.min_score)
        rows = []
        for i, label in enumerate(found["labels"].tolist()):
            box, category = found["boxes"][i], model.categories[label]
            rows.append(
                {
                    "name": category["name"],
                    "category_id": category["id"],
                    "score": round(float(found["scores"][i]), 4),
                    "box": np.round(box.astype(float), 2).tolist(),
                    "mask_pixels": int(model.paste(found["masks"][i], box, image.shape[:2]).sum()),
                }
            )
        print(json.dumps({"image": name, "objects": rows}))


if __name__ == "__main__":
    main()
