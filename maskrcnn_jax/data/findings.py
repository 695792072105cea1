"""Everything that can be wrong with a dataset: one table with a row for each kind of problem.

The reader of annotations reports problems that it cannot read past as findings of these kinds. By default a finding
stops the program; the checker collects findings instead, and the reader continues without the faulty entries. An error
of the reader and the line of the checker about the same problem are therefore the same sentence.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, StrEnum, unique
from typing import NoReturn

import numpy as np

from maskrcnn_jax.errors import UserError

# Lists of an annotation file, and the file as a whole.
IMAGES, ANNOTATIONS, CATEGORIES, FILE = "images", "annotations", "categories", "file"


class Severity(Enum):
    """Whether a problem is an error: training would stop, or learn something wrong."""

    WARNING = "a warning"
    ERROR = "an error"
    ERROR_UNLESS_SKIPPED = "an error unless data.skip_broken is set"
    ERROR_IF_EVALUATED = "an error in a split for evaluation, otherwise a warning"

    def is_error(self, *, skip_broken: bool = False, evaluated: bool = False) -> bool:
        """Return whether it is an error for this use of the dataset."""
        conditions = {Severity.ERROR_UNLESS_SKIPPED: not skip_broken, Severity.ERROR_IF_EVALUATED: evaluated}
        return conditions.get(self, self is Severity.ERROR)


class Mend(StrEnum):
    """What a cleaned copy of the annotations changes; the value describes the change."""

    DROP = "dropped"
    DROP_IMAGE = "images dropped with their annotations"
    FIND_FILE = "file names corrected"  # an image whose file is not found is dropped with its annotations
    MERGE_IMAGES = "annotations moved to the first entry of their image"
    SHIFT_CATEGORY = "category ids shifted"
    NEW_ID = "annotation ids replaced"
    NEST_POLYGONS = "polygons nested correctly"
    DROP_POLYGONS = "unusable polygons removed"
    SCALE_POLYGONS = "polygons converted from fractions to pixels"
    SCALE_BOXES = "boxes converted from fractions to pixels"
    CORNERS_TO_SIZES = "boxes converted from two corners to x, y, width, height"
    BOX_FROM_MASK = "boxes replaced by the box around the mask"  # without a mask, the annotation is dropped
    CLIP_BOX = "boxes clipped to their image"
    AREA_FROM_MASK = "areas replaced by that of the mask"  # without a mask, by that of the box
    NOT_CROWD = "crowds turned into single objects (iscrowd 0)"


@unique
class Kind(StrEnum):
    """The table. Each row: identifier, section, severity, mend (or None), sentence, remedy.

    Identifiers of problems that the reader counts are logged after a number.
    Sentences are templates: ``{count:box is|boxes are}`` becomes "1 box is" or "2 boxes are". Templates inside a form,
    as in ``{count:of {total} boxes is|of {total} boxes are}``, must be numbers.
    """

    section: str
    severity: Severity
    mend: Mend | None
    sentence: str
    remedy: str

    # fmt: off

    # The reader stops: the file cannot be read, or would be misread.
    UNREADABLE = (
        "unreadable annotation file", FILE, Severity.ERROR, None,
        "{error}", "")  # the message of the reader, with its remedy
    MALFORMED_IMAGE = (
        "malformed images", IMAGES, Severity.ERROR, Mend.DROP,
        "image {name} in {path} is malformed: {reason}", "correct or remove this entry")
    MALFORMED_ANNOTATION = (
        "malformed annotations", ANNOTATIONS, Severity.ERROR, Mend.DROP,
        "annotation {name} in {path} is malformed: {reason}", "correct or remove this entry")
    MALFORMED_CATEGORY = (
        "malformed categories", CATEGORIES, Severity.ERROR, Mend.DROP,
        "category {name} in {path} is malformed: {reason}", "correct or remove this entry")
    IMAGE_IDS_TWICE = (
        "repeated image ids", IMAGES, Severity.ERROR, Mend.DROP,
        "{path} uses image ids more than once, such as {ids}", "give every image its own id")
    CATEGORY_IDS_TWICE = (
        "repeated category ids", CATEGORIES, Severity.ERROR, Mend.DROP,
        "{path} uses category ids more than once, such as {ids}", "give every category its own id")
    UNLISTED_IMAGE = (
        "annotations of unlisted images", ANNOTATIONS, Severity.ERROR, Mend.DROP,
        "{count:annotation refers to an image|annotations refer to images} that {path} does not list, such as "
        "annotation {annotation} with image {id}", "add the image or remove the annotations")
    UNLISTED_CATEGORY = (
        "annotations of unlisted categories", ANNOTATIONS, Severity.ERROR, Mend.DROP,
        "{count:annotation refers to a category|annotations refer to categories} that {path} does not list, such as "
        "annotation {annotation} with category {id}",
        "add the category, remove the annotations, or set data.ignore_regions=true to ignore these objects")
    OFF_BY_ONE = (
        "category ids off by one", ANNOTATIONS, Severity.ERROR, Mend.SHIFT_CATEGORY,
        "the category ids of the annotations in {path} are off by one: the annotations use {used}, but the categories "
        "are {listed}", "number both from the same start")
    NESTING = (
        "wrongly nested polygons", ANNOTATIONS, Severity.ERROR, Mend.NEST_POLYGONS,
        "annotation {name} in {path} has wrongly nested polygons",
        "write its segmentation as a list of polygons, each a flat list x, y, x, y, ...")
    UNFILLED = (
        "run-length masks that do not fit their image", ANNOTATIONS, Severity.ERROR, Mend.DROP,
        "the run-length mask of annotation {annotation} does not fit its image {image} of {size} pixels (height x "
        "width)", "correct or remove the annotation")
    NORMALISED_POLYGONS = (
        "polygons in fractions of the image", ANNOTATIONS, Severity.ERROR, Mend.SCALE_POLYGONS,
        "the polygons in {path} are fractions of the image size (0 to 1) instead of pixels",
        "export the annotations again, in pixels")
    NORMALISED_BOXES = (
        "boxes in fractions of the image", ANNOTATIONS, Severity.ERROR, Mend.SCALE_BOXES,
        "the boxes in {path} are fractions of the image size (0 to 1) instead of pixels",
        "export the annotations again, in pixels")
    CORNERS = (
        "boxes given as two corners", ANNOTATIONS, Severity.ERROR, Mend.CORNERS_TO_SIZES,
        "the boxes in {path} look like x1, y1, x2, y2 instead of x, y, width, height",
        "export the annotations again in COCO's format")
    NOTHING_USABLE = (
        "no usable annotations", ANNOTATIONS, Severity.ERROR, None,
        "none of the {total} annotations in {path} can be used ({problems})",
        "add boxes, or instance masks as polygons or run lengths")
    MISSING_FILE = (
        "missing image files", IMAGES, Severity.ERROR_UNLESS_SKIPPED, Mend.FIND_FILE,
        "{count:of {total} image files is|of {total} image files are} missing from {folder}, such as {names}",
        "add them, or set data.skip_broken=true to train without them")
    BROKEN = (
        "unreadable images", IMAGES, Severity.ERROR_UNLESS_SKIPPED, Mend.DROP_IMAGE,
        "image {path} {problem}", "replace it, or set data.skip_broken=true to train without it")
    UNKNOWN_CATEGORY = (
        "evaluation categories that are not trained", CATEGORIES, Severity.ERROR, None,
        "{split} has {count:category|categories} that the model was not trained on, such as {names}",
        "evaluate on a dataset with the categories of the training set")

    # The reader continues: it drops or repairs the annotation.
    SHORT_POLYGON = (
        "polygons without three points (dropped)", ANNOTATIONS, Severity.WARNING, Mend.DROP_POLYGONS,
        "{count:polygon is|polygons are} dropped because of fewer than three points or an odd number of coordinates",
        "correct or remove these polygons")
    FAR_POLYGON = (
        "polygons with coordinates far outside any image (dropped)", ANNOTATIONS, Severity.WARNING, Mend.DROP_POLYGONS,
        "{count:polygon is|polygons are} dropped because of coordinates far outside any image",
        "correct or remove these polygons")
    ONLY_BOX = (
        "annotations with a box but no usable mask", ANNOTATIONS, Severity.WARNING, None,
        "{count:annotation has|annotations have} a box but no usable mask, so only the box is learned and masks "
        "predicted there are ignored in mask AP", "add masks if there should be some")
    NO_BOX_NOR_MASK = (
        "annotations with neither box nor usable mask (dropped)", ANNOTATIONS, Severity.WARNING, Mend.DROP,
        "{count:annotation is|annotations are} dropped because there is neither a box nor a usable mask",
        "add a box or a mask, or remove these annotations")
    NOT_FINITE = (
        "boxes with NaN or infinite numbers (dropped)", ANNOTATIONS, Severity.WARNING, Mend.BOX_FROM_MASK,
        "{count:annotation is|annotations are} dropped because the box has NaN or infinite numbers",
        "correct the boxes, or their objects are learned as background")
    FLAT_BOX = (
        "boxes without area (dropped)", ANNOTATIONS, Severity.WARNING, Mend.BOX_FROM_MASK,
        "{count:annotation is|annotations are} dropped because the width or height of the box is not positive, or too "
        "small for float32",
        "correct the boxes, or their objects are learned as background")
    OUTSIDE_BOX = (
        "boxes outside their image (dropped)", ANNOTATIONS, Severity.WARNING, Mend.BOX_FROM_MASK,
        "{count:annotation is|annotations are} dropped because the box lies outside the image",
        "correct the boxes, or their objects are learned as background")
    CLIPPED_BOX = (
        "boxes more than a pixel over the border (clipped)", ANNOTATIONS, Severity.WARNING, Mend.CLIP_BOX,
        "{count:box that extends more than a pixel beyond its image is|boxes that extend more than a pixel beyond "
        "their image are} clipped", "check that they belong to this image")
    OTHER_SIZE = (
        "run-length masks of another size than their image (dropped)", ANNOTATIONS, Severity.WARNING, Mend.DROP,
        "{count:annotation is|annotations are} dropped because the run-length mask has another size than the image",
        "write the masks at the size of their image, as [height, width]")
    IGNORED = (
        "objects of unlisted categories (ignored)", ANNOTATIONS, Severity.WARNING, None,
        "{count:object of an unlisted category is|objects of unlisted categories are} ignored",
        "list these categories if they are to be learned")

    WRONG_AREA = (
        "areas that cannot be right (recomputed)", ANNOTATIONS, Severity.WARNING, Mend.AREA_FROM_MASK,
        "{count:annotation has an area|annotations have areas} that cannot be right (not a positive number of pixels, "
        "or far from the mask), so evaluation takes that of the mask, or of the box where there is none",
        "write the area of the mask in pixels")

    # The reader does not notice: annotations and categories.
    SAME_FILE = (
        "images listed more than once", IMAGES, Severity.ERROR, Mend.MERGE_IMAGES,
        "{count:entry lists|entries list} an image file again under another id, so the objects of one entry are "
        "background in the other", "list every file once, with all of its annotations")
    SAME_ID = (
        "repeated annotation ids", ANNOTATIONS, Severity.ERROR_IF_EVALUATED, Mend.NEW_ID,
        "{count:annotation has|annotations have} the id of another annotation, so COCO's evaluation confuses them",
        "give every annotation its own id")
    ZERO_ID = (
        "annotations with id 0", ANNOTATIONS, Severity.WARNING, Mend.NEW_ID,
        "{count:annotation has|annotations have} id 0, which means 'unmatched' in COCO's evaluation, so a detection "
        "that finds the object counts as wrong", "number annotations from 1")
    SAME_ANNOTATION = (
        "duplicate annotations", ANNOTATIONS, Severity.WARNING, Mend.DROP,
        "{count:annotation repeats|annotations repeat} the image, category, box and mask of another one",
        "remove the copies")
    MISFIT = (
        "boxes that do not fit their masks", ANNOTATIONS, Severity.WARNING, None,
        "{count:box overlaps|boxes overlap} the box around the mask by less than half (intersection over union)",
        "correct the box or the mask, whichever is wrong")
    EMPTY_MASK = (
        "masks without a pixel in their image", ANNOTATIONS, Severity.WARNING, Mend.DROP,
        "{count:mask has|masks have} no pixel inside the image, so an empty mask is learned",
        "correct or remove these annotations")
    SMALL = (
        "objects too small for the anchors", ANNOTATIONS, Severity.WARNING, None,
        "{count} of {total} objects are too small for the anchors: with images resized to {side} pixels, no anchor "
        "overlaps them by {iou} or more (the smallest is {anchor}), so the RPN learns each from a single anchor",
        "use smaller model.anchor_sizes, or enlarge the images with data.short_side")
    LARGE = (
        "objects too large or too thin for the anchors", ANNOTATIONS, Severity.WARNING, None,
        "{count} of {total} objects are too large or too thin for the anchors: with images resized to {side} pixels, "
        "no anchor overlaps them by {iou} or more (the largest is {anchor}), so the RPN learns each from a single "
        "anchor", "change model.anchor_sizes or model.aspect_ratios")
    CROWDS = (
        "many crowds", ANNOTATIONS, Severity.WARNING, None,
        "{count} of {total} annotations are crowds (iscrowd 1), which are not learned as objects",
        "set iscrowd to 0 for single objects")
    ONLY_CROWDS = (
        "nothing but crowds", ANNOTATIONS, Severity.ERROR, Mend.NOT_CROWD,
        "{count:annotation is a crowd|annotations are crowds} (iscrowd 1) and there is no other, so no object is "
        "learned or evaluated; CVAT writes masks that were painted so",
        "set iscrowd to 0; maskrcnn-jax check --fix=FILE writes such a copy")
    MANY_OBJECTS = (
        "images with more objects than detections", IMAGES, Severity.WARNING, None,
        "{count:image has|images have} more than {limit} objects (up to {most}), but only {limit} detections of an "
        "image are made and count in AP", "set model.box_detections_per_img to the number of objects or more")
    EMPTY = (
        "many images without objects", IMAGES, Severity.WARNING, None,
        "{count:of {total} images has|of {total} images have} no objects, so the whole image is learned as background",
        "check whether annotations are missing")
    UNUSED_CATEGORY = (
        "categories without objects", CATEGORIES, Severity.WARNING, None,
        "{count:of {total} categories has|of {total} categories have} no objects and cannot be learned: {names}",
        "annotate such objects, or leave the categories out with data.exclude_categories")
    RARE_CATEGORY = (
        "categories with few objects", CATEGORIES, Severity.WARNING, None,
        "{count:category has|categories have} few objects ({most} has {num_most}): {names}",
        "annotate more such objects, or expect low AP for them")
    SAME_NAME = (
        "repeated category names", CATEGORIES, Severity.WARNING, None,
        "{count:category name is|category names are} used by several categories: {names}",
        "rename or merge these categories")

    # The reader does not notice: image files.
    SAME_PIXELS = (
        "images with the pixels of another image", IMAGES, Severity.WARNING, None,
        "{count:image has|images have} exactly the pixels of another image", "keep one of each")
    TURNED = (
        "images with an EXIF orientation", IMAGES, Severity.WARNING, None,
        "{count:of {total} images has|of {total} images have} an EXIF orientation, which is ignored",
        "make sure that boxes and masks refer to the pixels as stored")
    GREY = (
        "grey images", IMAGES, Severity.WARNING, None,
        "{count:of {total} images is grey and read|of {total} images are grey and read} as three equal channels",
        "replace them if colour versions exist")
    CMYK = (
        "images in CMYK", IMAGES, Severity.WARNING, None,
        "{count:of {total} images is|of {total} images are} converted from CMYK to RGB without the colour profile",
        "convert them to RGB if the colours matter")
    DEEP = (
        "images of more than 8 bits per channel", IMAGES, Severity.WARNING, None,
        "{count:of {total} images has|of {total} images have} more than 8 bits per channel, and the upper 8 are kept",
        "rescale them if the camera uses fewer bits than the file has, or they are read as dark")
    ALPHA = (
        "images with an alpha channel", IMAGES, Severity.WARNING, None,
        "{count:of {total} images has|of {total} images have} an alpha channel, which is dropped",
        "remove the channel, or set model.in_channels=4 if it holds data such as depth")
    FRAMES = (
        "images of several pages or frames", IMAGES, Severity.WARNING, None,
        "{count:of {total} images has|of {total} images have} several pages or frames, and the first is read",
        "save the pages as files of their own if they should be used")
    OTHER_FORM = (
        "file names in another form", IMAGES, Severity.WARNING, None,
        "{count:image file has|image files have} a name that the annotations write in another form (accents, %20 for "
        "a space, a backslash between folders); the file is used",
        "write the names alike, for the sake of other programs")
    NOT_LISTED = (
        "unlisted image files", IMAGES, Severity.WARNING, None,
        "{folder} has {count:image file|image files} that the annotation file does not list and training does not use",
        "list them if they should be used")

    # Between splits.
    NO_EVALUATION = (
        "no split for evaluation", FILE, Severity.WARNING, None,
        "{folder} has no split {split}",
        "add it, hold out a share of the training images with data.val_share=0.2, or set eval_every=0 to train "
        "without evaluation")
    LEAK = (
        "training images among the evaluation images", IMAGES, Severity.ERROR, Mend.DROP_IMAGE,
        "{count:training image has|training images have} the pixels of an image of {evaluated}, so AP measures "
        "memorisation", "remove these images from one of the two splits")
    UNLEARNED_CATEGORY = (
        "evaluation categories without training objects", CATEGORIES, Severity.WARNING, None,
        "{count:category has|categories have} objects in {evaluated} but none in {training}: {names}",
        "annotate such objects for training")
    # fmt: on

    def __new__(
        cls, identifier: str, section: str, severity: Severity, mend: Mend | None, sentence: str, remedy: str
    ) -> "Kind":
        """Make a member that is a string, its identifier, and has the columns of its row as attributes."""
        kind = str.__new__(cls, identifier)
        kind._value_ = identifier
        kind.section, kind.severity, kind.mend, kind.sentence, kind.remedy = section, severity, mend, sentence, remedy
        return kind

    def tell(self, count: int = 1, **details: object) -> str:
        """Return the sentence and the remedy.

        Args:
            count: number of entries.
            **details: the other values that the sentence names.
        """
        text = f"{self.sentence}; {self.remedy}" if self.remedy else self.sentence
        return text.format(count=_Count(count), **details)

    def finding(
        self,
        rows: Sequence[int] | np.ndarray = (),
        *,
        count: int | None = None,
        examples: Sequence[str] = (),
        **details: object,
    ) -> "Finding":
        """Return a finding of this kind.

        Args:
            rows: places of the entries in their section.
            count: number of entries, where they have no rows.
            examples: names of a few of the entries.
            **details: the other values that the sentence names.
        """
        text = self.tell(len(rows) if count is None else count, **details)
        return Finding(self, self.severity.is_error(), text, np.asarray(rows, np.int64), examples)


class _Count(int):
    """A number whose format specification is what follows it, in singular and plural: ``box is|boxes are``."""

    def __format__(self, forms: str) -> str:
        singular, _, plural = forms.partition("|")
        return f"{int(self)} {singular if self == 1 else plural}".rstrip()


@dataclass(frozen=True, eq=False)
class Finding:
    """A problem of one kind that a dataset has."""

    kind: Kind
    is_error: bool
    sentence: str  # what was found, what was expected, and what to do
    rows: np.ndarray  # [n] int64, places of the entries in their section; empty if there are no single entries
    examples: Sequence[str] = ()  # names of a few of the entries

    @property
    def section(self) -> str:
        """The list of the annotation file that the rows refer to."""
        return self.kind.section


Report = Callable[[Finding], None]


def stop(finding: Finding) -> NoReturn:
    """Raise a finding as a UserError."""
    raise UserError(finding.sentence)


class Collector:
    """Collects what the reader reports; because it returns, the reader continues without the faulty entries."""

    def __init__(self) -> None:
        self._first: dict[Kind, Finding] = {}
        self._rows: dict[Kind, array] = {}

    def __call__(self, finding: Finding) -> None:
        self._first.setdefault(finding.kind, finding)
        self._rows.setdefault(finding.kind, array("q")).extend(finding.rows.tolist())

    def findings(self) -> list[Finding]:
        """Return one finding of each kind, in the order of the first ones, with the rows of all."""
        return [replace(finding, rows=np.array(self._rows[kind], np.int64)) for kind, finding in self._first.items()]
