"""What the paper trained, as runs of train.py: the rows of its tables, and the comparisons that its text reports.

A run is a config, overrides of it and a seed. Comparisons share the runs that they have in common.
"""

import math
from typing import NamedTuple

from configs import paper_comparisons
from configs.paper import ROWS

COMPARED_IMAGES = 4000  # of the training set at scale 1
# Epochs and images of the smaller of two datasets, on which as many steps are taken.
_FEW = 8


class Run(NamedTuple):
    """One training."""

    config: str
    overrides: tuple[tuple[str, object], ...]  # fields of the config and their values, by name
    seed: int

    @property
    def name(self) -> str:
        """Identifies the run: a folder and a key of the results."""
        config = self.config.removeprefix("configs/").replace(".py", "").replace(":", "_").replace(",", "_")
        changes = "_".join(f"{name.split('.')[-1]}={value}" for name, value in self.overrides)
        return f"{config}/{changes or 'full'}/seed{self.seed}"

    @property
    def arguments(self) -> list[str]:
        """Options of train.py, without --workdir."""
        fields = (*self.overrides, ("seed", self.seed))
        return [f"--config={self.config}", *(f"--config.{name}={value}" for name, value in fields)]


class Comparison(NamedTuple):
    """Variants that differ in one respect."""

    title: str
    claim: str  # of the paper, and where
    variants: dict[str, dict[str, object]]  # name -> overrides


_SECOND_LOSSES = {"model.classification_loss": "focal", "model.box_loss": "iou", "model.mask_loss": "dice"}
COMPARISONS = {
    "roi_operator": Comparison(
        "RoIAlign and RoIPool",
        "RoIAlign removes the misalignment of RoIPool and sharpens masks (Sec. 2.3, 4.2).",
        {"RoIAlign": {}, "RoIPool": {"model.roi_operator": "pool"}},
    ),
    "losses": Comparison(
        "Loss functions at two sizes of the dataset",
        "Focal, IoU and Dice losses help with few images and stagnate with many (Sec. 3.2).",
        {
            "cross-entropy, smooth L1, BCE; all images": {},
            "focal, IoU, Dice; all images": _SECOND_LOSSES,
            f"cross-entropy, smooth L1, BCE; 1/{_FEW} of them": {"share": 1 / _FEW},
            f"focal, IoU, Dice; 1/{_FEW} of them": {"share": 1 / _FEW} | _SECOND_LOSSES,
        },
    ),
    "proposals": Comparison(
        "Where proposals come from in training",
        "Annotated boxes as proposals, the RPN where they are too few, improve accuracy and speed (Sec. 2.2).",
        {
            "rpn": {},
            "gt": {"model.train_proposals": "gt"},
            "gt_then_rpn, 15 at least": {"model.train_proposals": "gt_then_rpn"},
        },
    ),
    "min_proposals": Comparison(
        "The least number of proposals",
        "30 instead of 15 had a positive impact on accuracy (Sec. 3.2).",
        {
            "15": {"model.train_proposals": "gt_then_rpn"},
            "30": {"model.train_proposals": "gt_then_rpn", "model.min_proposals": 30},
        },
    ),
    "deconvolution": Comparison(
        "Masks with and without deconvolution",
        "Five convolutions to a mask per class are enough, without deconvolution (Sec. 2.5).",
        {"28 x 28, with deconvolution": {}, "14 x 14, without": {"model.mask_deconv": False}},
    ),
    "learning_rate": Comparison(
        "Learning rates in the proportions of the paper's 5e-4, 7e-4 and 1e-4",
        "The lowest was best for the longest training (Sec. 3.2, Table 2).",
        {"1": {}, "1.4": {"optim.lr": 2.1e-3}, "0.2": {"optim.lr": 3e-4}},
    ),
    "dropped_labels": Comparison(
        "Labels that are missing",
        "Missing labels made training difficult (Sec. 5); not measured there.",
        {f"{share:.0%} dropped": {"data.drop_labels": share} if share else {} for share in (0, 0.2, 0.4, 0.6)},
    ),
    "curves": Comparison(
        "Loss and accuracy while training",
        "Loss falls and accuracy rises throughout, more in training than in validation (Sec. 4.1, Fig. 4).",
        {"10 epochs": {"epochs": 10, "eval_every": 1}},
    ),
}


def table_run(table: int, row: int, scale: float, changes: dict[str, object]) -> Run:
    """Return the training of a row of the paper's tables.

    Args:
      table: 1 or 2.
      row: from 1.
      scale: of the numbers of images and of epochs; 1 is the paper's.
      changes: of the config, beside those.
    """
    values = ROWS[table, row]
    overrides = {}
    if scale != 1:
        overrides = {
            "epochs": max(1, round(values.epochs * scale)),
            "data.train_limit": _scaled(values.train_size, scale),
            "data.eval_limit": _scaled(5000, scale),
            "eval_train_limit": _scaled(5000, scale),
        }
    return Run(f"configs/paper.py:table={table},row={row}", _sorted(overrides | changes), 0)


def comparison_run(overrides: dict[str, object], seed: int, scale: float) -> Run:
    """Return the training of one variant of a comparison.

    Args:
      overrides: as Comparison has them.
      seed: of initial values, order, augmentation and the choice of images.
      scale: of the number of images; 1 is all that ``make train`` writes.
    """
    fields = dict(overrides)
    share = fields.pop("share", 1)
    if share != 1:
        fields["epochs"] = math.ceil(paper_comparisons.get_config().epochs / share)
    fields["data.train_limit"] = _scaled(COMPARED_IMAGES * share, scale)
    return Run("configs/paper_comparisons.py", _sorted(fields), seed)


def _scaled(number: float, scale: float) -> int:
    return max(1, round(number * scale))


def _sorted(fields: dict[str, object]) -> tuple:
    return tuple(sorted(fields.items()))
