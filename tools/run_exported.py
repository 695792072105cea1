"""Run a model that maskrcnn-jax export wrote. Needs what follows and nothing else; copy this file beside it.

pip install numpy opencv-python-headless openvino         # an .onnx file; or onnxruntime instead of openvino
pip install numpy opencv-python-headless jax flatbuffers  # an .mrcnn file
pip install pillow                                        # besides, if data.resize of the model is pillow
python run_exported.py MODEL IMAGE [IMAGE ...]            # prints a line of JSON for each image

--masks=rle gives masks as COCO's run lengths, --masks=polygons as outlines; --pictures=DIR draws them.
"""

import argparse
import importlib
import importlib.util
import json
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np

RUNTIMES = ("openvino", "onnxruntime")
OUTPUTS = ("boxes", "scores", "labels", "masks", "valid")
COLOURS = ((230, 60, 60), (60, 140, 240), (60, 190, 90), (240, 170, 40), (170, 90, 220), (60, 200, 200))  # RGB


def open_stablehlo(path, together=None):
    """Return what a file of StableHLO programs says about itself, and a function that runs them.

    Images are worked on together; on CPUs one by one, unless asked otherwise, because the programs for one image are
    faster there.
    """
    import jax
    import jax.export

    if not zipfile.is_zipfile(path):
        raise ValueError("it is no zip archive, as .mrcnn files are; the name of an ONNX file ends in .onnx")
    file = np.load(path)  # which refuses pickles, so that nothing in the file runs but its programs
    about = json.loads(file["model.json"])
    weights = [jax.device_put(file[f"weights/{i}"]) for i in range(about["num_weights"])]
    together = jax.default_backend() != "cpu" if together is None else together
    programs = {}
    for height, width in about["sizes"]:
        program = file[f"{'' if together else '1x'}{height}x{width}.stablehlo"]
        programs[height, width] = jax.jit(jax.export.deserialize(bytearray(program)).call)

    def run(*inputs):
        program = programs[inputs[0].shape[1:3]]
        if together:
            return program(weights, *inputs)
        found = [program(weights, *(array[i : i + 1] for array in inputs)) for i in range(len(inputs[0]))]
        return {name: np.concatenate([one[name] for one in found]) for name in OUTPUTS}

    return about, run


def open_openvino(path):
    """Return what an ONNX file says about itself, and a function that runs it in OpenVINO."""
    sys.modules.setdefault("openvino_telemetry", None)  # which would send statistics about the use of OpenVINO
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    request = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()

    def run(images, sizes, original_sizes):
        request.infer({"images": images, "sizes": sizes, "original_sizes": original_sizes})
        return {name: np.array(request.get_tensor(name).data) for name in OUTPUTS}

    return json.loads(model.get_rt_info(["framework", "model.json"]).astype(str)), run


def open_onnxruntime(path):
    """Return what an ONNX file says about itself, and a function that runs it in ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images, sizes, original_sizes):
        inputs = {"images": images, "sizes": sizes, "original_sizes": original_sizes}
        return dict(zip(OUTPUTS, session.run(OUTPUTS, inputs), strict=True))

    return json.loads(session.get_modelmeta().custom_metadata_map["model.json"]), run


class ExportedModel:
    """Finds objects in images."""

    def __init__(self, path, runtime=None):
        """Load a file; ``runtime``, openvino or onnxruntime, is for .onnx: the first that is installed by default."""
        runtime = runtime or next((name for name in RUNTIMES if importlib.util.find_spec(name)), RUNTIMES[0])
        openers = {"openvino": open_openvino, "onnxruntime": open_onnxruntime}
        is_onnx = str(path).lower().endswith(".onnx")
        self.about, self._run = (openers[runtime] if is_onnx else open_stablehlo)(str(path))
        if self.about["resize"] == "pillow":
            importlib.import_module("PIL.Image")  # fails now, and not at the first image
        self.categories = {row["label"]: row for row in self.about["categories"]}

    def detect(self, images, min_score=0.5):
        """Find the objects in images [h, w, I] uint8, RGB first; I is ``about["channels"]``, usually 3.

        Objects with a lower score are left out. Returns a dict for each image: boxes [K, 4] x1, y1, x2, y2 in its
        pixels, scores [K], labels [K] and masks [K, 28, 28], best first. Raises ValueError for an image that the model
        does not take.
        """
        prepared = [self._prepare(image) for image in images]
        results = [None] * len(images)
        for size in {padded.shape[:2] for padded, _ in prepared}:
            rows = [i for i, (padded, _) in enumerate(prepared) if padded.shape[:2] == size]
            found = self._run(
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
        if image.ndim != 3 or image.shape[2] != about["channels"] or image.dtype != np.uint8:
            raise ValueError(f"an image {image.dtype} {image.shape} is none of {about['channels']} channels in 8 bits")
        height, width = image.shape[:2]
        scale = min(about["short_side"] / min(height, width), about["long_side"] / max(height, width))
        rounding = 0.5 if about["resize"] == "pillow" else 0
        height, width = size = [max(int(side * scale + rounding), 1) for side in (height, width)]
        if about["resize"] == "pillow":
            from PIL import Image

            # Not all at once: a fourth channel would count as opacity, by which Pillow weighs the others.
            parts = [image[..., :3], *np.moveaxis(image[..., 3:], -1, 0)]
            parts = [Image.fromarray(part).resize((width, height), Image.Resampling.BILINEAR) for part in parts]
            resized = np.dstack(parts)
        else:
            resized = cv2.resize(image.astype(about["dtype"]), (width, height), interpolation=cv2.INTER_LINEAR)
        fitting = [(h, w) for h, w in about["sizes"] if h >= height and w >= width]
        if not fitting and about.get("any_size"):
            fitting = [(-(-height // 32) * 32, -(-width // 32) * 32)]
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


def run_lengths(mask):
    """Return a mask [h, w] bool as COCO's run lengths, column by column, beginning with those of False."""
    pixels = np.concatenate([[False], mask.ravel(order="F"), [False]])
    changes = np.flatnonzero(pixels[1:] != pixels[:-1])
    ends = [*changes.tolist(), mask.size] if len(changes) == 0 or changes[-1] != mask.size else changes.tolist()
    return {"size": list(mask.shape), "counts": np.diff([0, *ends]).tolist()}


def polygons(mask):
    """Return the outlines of a mask [h, w] bool as COCO's lists x, y, x, y, ...; holes are filled."""
    # OpenCV's contours go through the centres of pixels. Those of a mask of twice the size tell the edges.
    doubled = mask.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [((contour + 1) // 2).ravel().tolist() for contour in contours]


MASKS = {"rle": run_lengths, "polygons": polygons}


def draw(image, rows, masks):
    """Draw masks [K, h, w] bool, boxes, names and scores over an image [h, w, I], RGB first."""
    drawn = image[..., :3].copy()
    for i, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        drawn[mask] = (drawn[mask] * 0.5 + np.array(colour) * 0.5).astype(np.uint8)
        x1, y1, x2, y2 = (round(x) for x in row["box"])
        cv2.rectangle(drawn, (x1, y1), (x2, y2), colour, 2)
        caption = f"{row['name']} {row['score']:.2f}".encode(errors="backslashreplace").decode()  # others end OpenCV
        cv2.putText(drawn, caption, (x1, max(y1 - 4, 12)), cv2.FONT_HERSHEY_SIMPLEX, 0.5, colour, 1, cv2.LINE_AA)
    return drawn


def describe(model, found, image_size, form):
    """Return the rows of JSON of what was found in an image, and the masks [K, h, w] bool."""
    rows, masks = [], []
    for box, score, label, mask in zip(
        *(found[name] for name in ("boxes", "scores", "labels", "masks")),
        strict=True,
    ):
        category = model.categories[int(label)]
        masks.append(model.paste(mask, box, image_size))
        row = {
            "name": category["name"],
            "category_id": category["id"],
            "score": round(float(score), 4),
            "box": np.round(box.astype(float), 2).tolist(),
            "mask_pixels": int(masks[-1].sum()),
        }
        rows.append(row | ({"segmentation": MASKS[form](masks[-1])} if form else {}))
    return rows, masks


def read(name, channels):
    """Read an image file as [h, w, channels] uint8, RGB first; of 16 bits the upper 8."""
    image = cv2.imread(name, cv2.IMREAD_COLOR if channels == 3 else cv2.IMREAD_UNCHANGED)
    if image is None:
        raise SystemExit(f"{name} cannot be read as an image")
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    image = np.atleast_3d(image)[..., :channels]
    return np.concatenate([image[..., 2::-1], image[..., 3:]], axis=2)


def picture_paths(folder, names):
    """Return a file for the picture of each image; no two are the same, and none is one of the images."""
    paths = [Path(folder) / f"{Path(name).stem}.png" for name in names]
    taken = {Path(name).resolve() for name in names}
    for path in paths:
        if path.resolve() in taken:
            raise SystemExit(f"{path} would be overwritten; use another folder, or images of other names")
        taken.add(path.resolve())
    return paths


def main():
    parser = argparse.ArgumentParser(description="Prints what an exported model finds, a line of JSON for each image.")
    parser.add_argument("model", help="file that maskrcnn-jax export wrote")
    parser.add_argument("images", nargs="+", help="files that OpenCV reads")
    parser.add_argument("--min_score", type=float, default=0.5, help="leave out objects below this")
    parser.add_argument("--masks", choices=MASKS, help="print the masks too, in this form")
    parser.add_argument("--pictures", metavar="DIR", help="folder for pictures with the masks")
    parser.add_argument("--runtime", choices=RUNTIMES, help="for .onnx files; openvino if installed")
    args = parser.parse_args()
    pictures = picture_paths(args.pictures, args.images) if args.pictures else []
    if not Path(args.model).is_file():
        raise SystemExit(f"there is no file {args.model}")
    try:
        model = ExportedModel(args.model, args.runtime)
    except ImportError as error:
        raise SystemExit(f"{error}; install it, as {Path(__file__).name} says at its beginning") from None
    except Exception as error:  # libraries raise many types for damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise SystemExit(f"{args.model} cannot be read as an exported model: {reason}") from None
    for i, name in enumerate(args.images):
        image = read(name, model.about["channels"])
        try:
            (found,) = model.detect([image], args.min_score)
        except ValueError as error:
            raise SystemExit(f"{name} cannot be detected in: {error}") from None
        rows, masks = describe(model, found, image.shape[:2], args.masks)
        if args.pictures:
            path = pictures[i]
            path.parent.mkdir(parents=True, exist_ok=True)
            if not cv2.imwrite(str(path), draw(image, rows, masks)[..., ::-1]):
                raise SystemExit(f"{path} cannot be written")
        print(json.dumps({"image": name, "objects": rows}))


if __name__ == "__main__":
    main()
