"""All that is wrong or odd in a COCO-format dataset, collected: annotations, image files, and between splits."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from maskrcnn_jax.checking import annotations as check_annotations
from maskrcnn_jax.checking import images as check_images
from maskrcnn_jax.checking.annotations import Anchors, Finding
from maskrcnn_jax.checking.images import ImageFacts
from maskrcnn_jax.data import faults
from maskrcnn_jax.data.coco import CocoDataset
from maskrcnn_jax.data.dataset import read_dataset
from maskrcnn_jax.data.entries import short
from maskrcnn_jax.data.faults import Faults
from maskrcnn_jax.data.json_stream import stream_json
from maskrcnn_jax.errors import UserError

UNREADABLE = "a file that cannot be read as annotations"
NOT_LISTED = "image files that are not listed"
LEAK = "training images among those of the evaluation"
UNKNOWN_CATEGORY = "categories of the evaluation that are not learnt"

_IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_PROBLEMS = {
    faults.SHORT_POLYGON: "correct or remove these polygons",
    faults.FAR_POLYGON: "correct or remove these polygons",
    faults.ONLY_BOX: "add masks if there should be some; masks found there count for nothing in mask AP",
    faults.NO_BOX_NOR_MASK: "add what is missing, or remove these annotations",
    faults.NOT_FINITE: "correct these boxes, so that their objects are not background",
    faults.OTHER_SIZE: "write them again at the size of their image, (height, width)",
    faults.IGNORED: "add the categories if they are to be learnt",
    faults.FLAT_BOX: "correct these boxes, so that their objects are not background",
    faults.OUTSIDE_BOX: "correct these boxes, so that their objects are not background",
    faults.CLIPPED_BOX: "see whether they belong to this image",
}

Progress = Callable[[Iterable, int, str], Iterable]  # wraps what is iterated over, its length, what is done


@dataclass(frozen=True)
class Options:
    """How the dataset will be used."""

    anchors: Anchors | None = None
    channels: int = 3
    skip_broken: bool = False
    keep_unlisted: bool = False
    contiguous_labels: bool = False
    images: bool = True  # open the image files, too
    threads: int = 4


@dataclass(frozen=True, eq=False)
class Split:
    """One split, and what was found in it; rows of findings are places in the lists of its file."""

    name: str
    json_path: Path
    image_dir: Path
    data: CocoDataset | None  # None where the annotations cannot be read at all
    findings: list[Finding]
    pixels: dict[bytes, int] = field(default_factory=dict)  # hash of the pixels -> place of the image

    @property
    def num_errors(self) -> int:
        return sum(finding.is_error for finding in self.findings)


def check_split(
    name: str,
    json_path: Path,
    image_dir: Path,
    options: Options,
    *,
    evaluated: bool = False,
    progress: Progress = lambda items, total, what: items,
) -> Split:
    """Checks one annotation file and its images.

    Args:
        name: of the split, for sentences.
        json_path: the annotations.
        image_dir: the folder of the images.
        options: how they will be used.
        evaluated: it is a split to evaluate on.
        progress: shows how far reading the images is.
    """
    collected = Faults()
    try:
        data = read_dataset(
            json_path,
            image_dir,
            contiguous_labels=options.contiguous_labels,
            keep_unlisted=options.keep_unlisted,
            report=collected,
        ).without_flat()
    except UserError as e:
        last = Finding(UNREADABLE, True, str(e))
        findings = [*_from_faults(collected, options), last]
        return Split(name, json_path, image_dir, None, _with_examples(json_path, findings))
    found = _from_faults(collected, options) + _from_problems(data)
    found += [_placed(f, data) for f in check_annotations.check_index(data, options.anchors, evaluated=evaluated)]
    found += _unlisted_files(data, image_dir)
    pixels: dict[bytes, int] = {}
    if options.images:
        images = np.setdiff1d(np.arange(len(data)), data.missing)
        looked = check_images.look_at_images(data, images.tolist(), channels=options.channels, threads=options.threads)
        facts = list(progress(looked, len(images), f"images of {name}"))
        by_image = check_images.image_findings(data, images, facts, skip_broken=options.skip_broken)
        found += [_placed(f, data) for f in by_image]
        pixels = _places_by_pixels(data, images, facts)
    findings = _with_examples(json_path, _errors_first(_merged(found)))
    return Split(name, json_path, image_dir, data, findings, pixels)


def compare_splits(training: Split, evaluated: Split) -> tuple[Split, Split]:
    """Looks for what is wrong between two splits; returns them with the findings added."""
    if training.data is None or evaluated.data is None:
        return training, evaluated
    ours, theirs = [], []
    try:
        evaluated.data.categories.check_known(training.data.categories, evaluated.name)
    except UserError as e:
        theirs.append(Finding(UNKNOWN_CATEGORY, True, str(e)))
    learnt = check_annotations.objects_per_category(training.data)
    there = check_annotations.objects_per_category(evaluated.data)
    unlearnt = [name for name, count in there.items() if count and learnt.get(name) == 0]
    if unlearnt:
        sentence = f"{len(unlearnt)} categories have objects here but none to learn from: {', '.join(unlearnt[:10])}"
        theirs.append(Finding(UNKNOWN_CATEGORY, False, sentence))
    shared = {place: evaluated.pixels[key] for key, place in training.pixels.items() if key in evaluated.pixels}
    if shared:
        names = [_names_by_place(split.data) for split in (training, evaluated)]
        examples = [f"{names[0][a]} = {names[1][b]} of {evaluated.name}" for a, b in shared.items()]
        sentence = (
            f"{len(shared)} images of {training.name} have the pixels of images of {evaluated.name}, so that its AP "
            "measures what was learnt by heart; remove them from one of the two"
        )
        rows = np.array(list(shared), np.int64)
        ours.append(Finding(LEAK, True, sentence, "images", rows, examples[: check_annotations.NUM_EXAMPLES]))
    return (
        replace(training, findings=_errors_first(training.findings + ours)),
        replace(evaluated, findings=_errors_first(evaluated.findings + theirs)),
    )


def read_entries(json_path: Path, wanted: dict[str, set[int]]) -> dict[str, dict[int, object]]:
    """Reads some elements of lists of an annotation file as they are.

    Args:
        json_path: the file.
        wanted: name of a list -> places in it.

    Returns:
        Name of the list -> place -> element.
    """
    found: dict[str, dict[int, object]] = {section: {} for section in wanted}
    seen = dict.fromkeys(wanted, 0)

    def keep(section: str) -> Callable[[object], None]:
        def handle(entry: object) -> None:
            if seen[section] in wanted[section]:
                found[section][seen[section]] = entry
            seen[section] += 1

        return handle

    stream_json(json_path, {section: keep(section) for section in wanted})
    return found


def _from_faults(collected: Faults, options: Options) -> list[Finding]:
    """Turns what the reader stops at into errors, with its own sentences."""
    return [
        Finding(
            kind,
            kind != faults.MISSING_FILE or not options.skip_broken,
            fault.sentence,
            fault.section,
            np.array(collected.rows[kind], np.int64),
        )
        for kind, fault in collected.first.items()
    ]


def _from_problems(data: CocoDataset) -> list[Finding]:
    return [
        Finding(kind, False, f"{len(places)} {kind}; {_PROBLEMS[kind]}", "annotations", places)
        for kind, places in data.problem_places.items()
    ]


def _placed(finding: Finding, data: CocoDataset) -> Finding:
    """Turns rows of the index into places in the lists of the file."""
    if finding.section == "images":
        return replace(finding, rows=data.image_places[finding.rows])
    if finding.section == "annotations":
        return replace(finding, rows=data.places[finding.rows])
    return finding


def _merged(findings: list[Finding]) -> list[Finding]:
    """Joins findings of one kind, such as misfits of polygons and those of run lengths."""
    merged: dict[str, Finding] = {}
    for finding in findings:
        known = merged.get(finding.kind)
        if known:
            rows = np.unique(np.concatenate([known.rows, finding.rows]))
            finding = replace(
                known,
                sentence=f"{len(rows)} {known.sentence.partition(' ')[2]}",  # their sentences begin with the number
                rows=rows,
                examples=list(dict.fromkeys([*known.examples, *finding.examples]))[: check_annotations.NUM_EXAMPLES],
            )
        merged[finding.kind] = finding
    return list(merged.values())


def _errors_first(findings: list[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: not finding.is_error)


def _unlisted_files(data: CocoDataset, image_dir: Path) -> list[Finding]:
    listed = set(data.file_names.tolist())
    with os.scandir(image_dir) as entries:
        names = sorted(entry.name for entry in entries if Path(entry.name).suffix.lower() in _IMAGE_SUFFIXES)
    names = [name for name in names if name not in listed]
    if not names:
        return []
    sentence = f"{len(names)} image files in {image_dir} are not listed and will not be used"
    return [Finding(NOT_LISTED, False, sentence, examples=names[: check_annotations.NUM_EXAMPLES])]


def _places_by_pixels(data: CocoDataset, images: np.ndarray, facts: list[ImageFacts]) -> dict[bytes, int]:
    places = data.image_places[images].tolist()
    return {fact.pixels: place for place, fact in zip(places, facts, strict=True) if fact.pixels}


def _names_by_place(data: CocoDataset) -> dict[int, str]:
    return dict(zip(data.image_places.tolist(), data.file_names.tolist(), strict=True))


def _with_examples(json_path: Path, findings: list[Finding]) -> list[Finding]:
    """Names images and annotations in the findings that have no examples yet, by what the file says there."""
    bare = [f for f in findings if f.section in ("images", "annotations") and len(f.rows) and not f.examples]
    if not bare:
        return findings
    wanted: dict[str, set[int]] = {"images": set(), "annotations": set()}
    for finding in bare:
        wanted[finding.section] |= set(finding.rows[: check_annotations.NUM_EXAMPLES].tolist())
    try:
        entries = read_entries(json_path, wanted)
        names = image_names(json_path, [e.get("image_id") for e in entries["annotations"].values() if _is_entry(e)])
    except UserError:  # the file is cut short, which is one of the findings
        return findings

    def example(section: str, place: int) -> str:
        entry = entries[section].get(place)
        if not _is_entry(entry):
            return f"entry {place} of {section}"
        if section == "images":
            return short(entry.get("file_name", f"image {short(entry.get('id'))}"))
        image = short(entry.get("image_id"))
        named = names.get(image, f"image {image}")
        box = f", bbox {short(str(entry['bbox']))}" if _is_box(entry.get("bbox")) else ""
        return f"{short(named)}, annotation {short(entry.get('id'))}{box}"

    return [
        replace(f, examples=[example(f.section, place) for place in f.rows[: check_annotations.NUM_EXAMPLES].tolist()])
        if f in bare
        else f
        for f in findings
    ]


def image_names(json_path: Path, image_ids: list) -> dict[str, str]:
    """Reads the file names of images; by their id as text, as malformed entries may have ids of any type."""
    wanted = {short(image_id) for image_id in image_ids}
    names: dict[str, str] = {}

    def keep(entry: object) -> None:
        if _is_entry(entry) and short(entry.get("id")) in wanted:
            names.setdefault(short(entry.get("id")), entry.get("file_name", ""))

    stream_json(json_path, {"images": keep})
    return names


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict)


def _is_box(box: object) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float | str) for v in box)
