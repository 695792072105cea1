"""What is wrong with a dataset: kinds of faults, and what happens at one.

The reader tells a function of every fault that it cannot read past. By default that function raises, so that training
stops at the first; the checker collects them instead, and the reader goes on without the entry. So both say the same
sentence. What the reader mends or drops by itself it counts under a kind of problem.
"""

from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

from maskrcnn_jax.errors import UserError

# Faults: the reader stops.
MALFORMED_IMAGE = "malformed entries of images"
MALFORMED_ANNOTATION = "malformed annotations"
MALFORMED_CATEGORY = "malformed entries of categories"
NESTING = "polygons nested wrongly"
IMAGE_IDS_TWICE = "image ids given more than once"
CATEGORY_IDS_TWICE = "category ids given more than once"
UNLISTED_IMAGE = "annotations of images that are not listed"
UNLISTED_CATEGORY = "annotations of categories that are not listed"
OFF_BY_ONE = "category ids off by one"
UNFILLED = "run-length masks that do not fill their image"
MISSING_FILE = "image files that are missing"
CORNERS = "boxes given by two corners"
NORMALISED_BOXES = "boxes given in shares of the image"
NORMALISED_POLYGONS = "polygons given in shares of the image"
NOTHING_USABLE = "no annotation that can be used"

# Problems: the reader goes on.
SHORT_POLYGON = "polygons without three points dropped"
FAR_POLYGON = "polygons with coordinates that no image has dropped"
ONLY_BOX = "annotations without a usable mask, of which only the box is learnt"
NO_BOX_NOR_MASK = "annotations without a usable mask, and without a box dropped"
NOT_FINITE = "boxes with numbers that are not finite dropped"
OTHER_SIZE = "run-length masks of another size than their image dropped"
IGNORED = "objects of categories that are not listed, ignored"
FLAT_BOX = "boxes without area dropped"
OUTSIDE_BOX = "boxes outside their image dropped"
CLIPPED_BOX = "boxes clipped to their image by more than a pixel"


class Fault(NamedTuple):
    """Entries of an annotation file that cannot be read as they are."""

    kind: str
    sentence: str  # what came, what was wanted, what to do
    section: str  # images, annotations or categories
    rows: Sequence[int]  # places of the entries in that list of the file


Report = Callable[[Fault], None]


def stop(fault: Fault) -> None:
    """Raises the fault as an error of the user's."""
    raise UserError(fault.sentence)


class Faults:
    """Collects faults by kind; called with one, as the reader does, it returns, so that the reader goes on."""

    def __init__(self):
        self.first: dict[str, Fault] = {}  # by kind, in the order in which the reader met them
        self.rows: dict[str, array] = {}  # by kind, places in the section of all of them

    def __call__(self, fault: Fault) -> None:
        self.first.setdefault(fault.kind, fault)
        self.rows.setdefault(fault.kind, array("q")).extend(map(int, fault.rows))
