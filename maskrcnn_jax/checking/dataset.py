"""Check a dataset in COCO's format: annotations, image files, and what two splits have in common."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn_jax.checking.anchors import Anchors
from maskrcnn_jax.checking.annotations import check_index, objects_per_category
from maskrcnn_jax.checking.examples import NUM_EXAMPLES, listed, name_examples
from maskrcnn_jax.checking.images import ImageFacts, check_images, read_images
from maskrcnn_jax.data.coco import CocoDataset, annotations_name
from maskrcnn_jax.data.dataset import locate, read_dataset, without_excluded
from maskrcnn_jax.data.findings import ANNOTATIONS, IMAGES, Collector, Finding, Kind
from maskrcnn_jax.data.images import IMAGE_SUFFIXES
from maskrcnn_jax.data.layouts import find_layout, match_split
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.options import Options
from maskrcnn_jax.paths import as_path, file_names

Progress = Callable[[Iterable, int, str], Iterable]  # wraps an iterable, given its length and a description


def no_progress(items: Iterable, total: int, description: str) -> Iterable:
    """Return the items."""
    return items


@dataclass(frozen=True, eq=False)
class Split:
    """A checked split; rows of findings are places in the lists of its annotation file."""

    name: str
    json_path: Path
    image_dir: Path
    data: CocoDataset | None  # None if the annotations cannot be read at all
    findings: list[Finding]  # errors first
    pixels: dict[bytes, int] = field(default_factory=dict)  # hash of an image's pixels -> place of the image

    @property
    def num_errors(self) -> int:
        """Number of findings that are errors."""
        return sum(finding.is_error for finding in self.findings)


def check_dataset(
    dataset: str | os.PathLike,
    options: Options,
    *,
    image_dir: str | os.PathLike | None = None,
    open_images: bool = True,
    progress: Progress = no_progress,
) -> list[Split]:
    """Check a dataset for training and evaluation, or a single annotation file.

    Args:
        dataset: folder in a layout of COCO's format, or an annotation file.
        options: of the training that it is for.
        image_dir: folder of the images of an annotation file.
        open_images: also read the images; otherwise only look whether their files exist.
        progress: wraps the iteration over the images.

    Returns:
        The training split and the evaluation split if there is one, or the split of the file.

    Raises:
        UserError: there is no such dataset, or a folder of images beside one.
    """
    how: dict[str, Any] = {"open_images": open_images, "progress": progress}
    if as_path(dataset).is_file():
        if not image_dir or not as_path(image_dir).is_dir():
            given = f"{os.fspath(image_dir)!r} is not a folder" if image_dir else "no folder of images was given"
            raise UserError(f"{dataset} is an annotation file, but {given}; set images to the folder of its images")
        path = as_path(dataset)
        return with_unlisted_files([check_split(path.stem, path, as_path(image_dir), options, evaluated=None, **how)])
    if image_dir:
        raise UserError(
            f"images {os.fspath(image_dir)!r} were given, but {dataset} is not an annotation file; leave them out, or "
            "give the file"
        )
    name = options.data.train_split
    training = check_split(name, *locate(dataset, name), options, **how)
    layout = find_layout(as_path(dataset))
    if options.data.val_share or options.data.split_file:  # evaluated on some of these images
        # Images that only another split lists are not unlisted.
        others = [files for files in layout.splits.values() if files.json_path != training.json_path] if layout else []
        is_shared = training.image_dir.resolve() in [files.image_dir.resolve() for files in others]
        return [training] if is_shared else with_unlisted_files([training])
    name = options.data.eval_split
    is_there = layout is not None and match_split(name, list(layout.splits)) is not None
    if not is_there and not any((as_path(dataset) / part).exists() for part in (name, annotations_name(name))):
        missing = Kind.NO_EVALUATION.finding(folder=dataset, split=name)
        return with_unlisted_files([replace(training, findings=[*training.findings, missing])])
    evaluated = check_split(name, *locate(dataset, name), options, evaluated=True, **how)
    return with_unlisted_files(compare_splits(training, evaluated))


def check_split(
    name: str,
    json_path: Path,
    image_dir: Path,
    options: Options,
    *,
    evaluated: bool | None = False,
    open_images: bool = True,
    progress: Progress = no_progress,
) -> Split:
    """Check one annotation file and its images.

    Args:
        name: of the split.
        json_path: the annotations.
        image_dir: the folder of the images.
        options: of the training that they are for.
        evaluated: whether the split is used for evaluation; None if that is not known.
        open_images: also read the images; otherwise only look whether their files exist.
        progress: wraps the iteration over the images.
    """
    collector = Collector()
    try:
        data = read_dataset(
            json_path,
            image_dir,
            contiguous_labels=options.data.contiguous_labels,
            keep_unlisted=options.data.ignore_regions,
            report=collector,
        )
        data = without_excluded(data, options.data).without_flat()
    except UserError as error:
        findings = [*_judge(collector.findings(), options), Kind.UNREADABLE.finding(error=error)]
        return Split(name, json_path, image_dir, None, name_examples(json_path, findings))
    found = _judge(collector.findings(), options)
    found += [kind.finding(places) for kind, places in data.problem_places.items()]
    most = options.model.box_detections_per_img
    by_row = check_index(data, Anchors.from_options(options), max_detections=most, evaluated=evaluated)
    pixels: dict[bytes, int] = {}
    if open_images:
        images = np.setdiff1d(np.arange(len(data)), data.missing)
        results = read_images(data, images.tolist(), channels=options.model.in_channels, threads=options.data.threads)
        facts = list(progress(results, len(images), f"images of {name}"))
        by_row += check_images(data, images, facts, skip_broken=options.data.skip_broken)
        pixels = _places_by_pixels(data, images, facts)
    found += [_with_places(finding, data) for finding in by_row]
    return Split(name, json_path, image_dir, data, name_examples(json_path, _errors_first(_merge(found))), pixels)


def compare_splits(training: Split, evaluated: Split) -> tuple[Split, Split]:
    """Return the two splits with findings about what they have in common, and what only one of them has."""
    ours_data, theirs_data = training.data, evaluated.data
    if ours_data is None or theirs_data is None:
        return training, evaluated
    names: dict[str, Any] = {"training": training.name, "evaluated": evaluated.name}
    collector = Collector()
    theirs_data.categories.check_known(ours_data.categories, evaluated.name, report=collector)
    theirs = collector.findings()
    learned, wanted = (objects_per_category(data) for data in (ours_data, theirs_data))
    unlearned = [name for name, count in wanted.items() if count and learned.get(name) == 0]
    if unlearned:
        theirs.append(Kind.UNLEARNED_CATEGORY.finding(count=len(unlearned), names=listed(unlearned), **names))
    ours = []
    shared = {place: evaluated.pixels[key] for key, place in training.pixels.items() if key in evaluated.pixels}
    if shared:
        files = [_names_by_place(data) for data in (ours_data, theirs_data)]
        pairs = list(shared.items())[:NUM_EXAMPLES]
        examples = [f"{files[0][a]} = {files[1][b]} of {evaluated.name}" for a, b in pairs]
        ours.append(Kind.LEAK.finding(list(shared), examples=examples, **names))
    return (
        replace(training, findings=_errors_first(training.findings + ours)),
        replace(evaluated, findings=_errors_first(evaluated.findings + theirs)),
    )


def _judge(findings: list[Finding], options: Options) -> list[Finding]:
    """Return what the reader stops at as the errors and warnings that they are for this use."""
    return [replace(f, is_error=f.kind.severity.is_error(skip_broken=options.data.skip_broken)) for f in findings]


def _with_places(finding: Finding, data: CocoDataset) -> Finding:
    """Turn rows of the index into places in the lists of the file."""
    if finding.section == IMAGES:
        return replace(finding, rows=data.image_places[finding.rows])
    if finding.section == ANNOTATIONS:
        return replace(finding, rows=data.places[finding.rows])
    return finding


def _merge(findings: list[Finding]) -> list[Finding]:
    """Join findings of the same kind: masks that are polygons and those that are run lengths are checked apart."""
    merged: dict[Kind, Finding] = {}
    for finding in findings:
        known = merged.get(finding.kind)
        if known:
            examples = list(dict.fromkeys([*known.examples, *finding.examples]))[:NUM_EXAMPLES]
            finding = finding.kind.finding(np.union1d(known.rows, finding.rows), examples=examples)
        merged[finding.kind] = finding
    return list(merged.values())


def _errors_first(findings: list[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: not finding.is_error)


def with_unlisted_files(splits: Sequence[Split]) -> list[Split]:
    """Return splits with findings of the image files that no split with the same folder of images lists."""
    listed_in: dict[Path, set[str]] = defaultdict(set)
    for split in splits:
        listed_in[split.image_dir.resolve()].update(split.data.file_names.tolist() if split.data is not None else ())
    return [
        replace(split, findings=[*split.findings, *_unlisted_files(split.image_dir, listed_in)])
        if split.data is not None
        else split
        for split in splits
    ]


def _unlisted_files(image_dir: Path, listed_in: dict[Path, set[str]]) -> list[Finding]:
    names = sorted(file_names(image_dir) - listed_in[image_dir.resolve()])
    names = [name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    if not names:
        return []
    return [Kind.NOT_LISTED.finding(count=len(names), examples=names[:NUM_EXAMPLES], folder=image_dir)]


def _places_by_pixels(data: CocoDataset, images: np.ndarray, facts: list[ImageFacts]) -> dict[bytes, int]:
    places = data.image_places[images].tolist()
    return {fact.pixels: place for place, fact in zip(places, facts, strict=True) if fact.pixels}


def _names_by_place(data: CocoDataset) -> dict[int, str]:
    return dict(zip(data.image_places.tolist(), data.file_names.tolist(), strict=True))
