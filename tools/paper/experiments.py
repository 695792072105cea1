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


class Claim(NamedTuple):
    """That one variant does better than another by some metric."""

    text: str
    better: str
    worse: str
    metric: str


class Comparison(NamedTuple):
    """Variants that differ in one respect."""

    title: str
    variants: dict[str, dict[str, object]]  # name -> overrides
    claims: tuple[Claim, ...] = ()
    note: str = ""  # what the reader of the numbers should know


_FIRST, _SECOND = "cross-entropy, smooth L1, BCE", "focal, IoU, Dice"
_SECOND_LOSSES = {"model.classification_loss": "focal", "model.box_loss": "iou", "model.mask_loss": "dice"}
_GT_THEN_RPN = {"model.train_proposals": "gt_then_rpn"}
COMPARISONS = {
    "roi_operator": Comparison(
        "RoIAlign and RoIPool",
        {"RoIAlign": {}, "RoIPool": {"model.roi_operator": "pool"}},
        (
            Claim("RoIAlign improves mask AP (Sec. 2.3)", "RoIAlign", "RoIPool", "segm_AP"),
            Claim("RoIAlign improves the outlines of masks (Sec. 4.2)", "RoIAlign", "RoIPool", "segm_AP75"),
        ),
    ),
    "losses": Comparison(
        "Loss functions at two sizes of the dataset",
        {
            f"{_FIRST}; all images": {},
            f"{_SECOND}; all images": _SECOND_LOSSES,
            f"{_FIRST}; few images": {"share": 1 / _FEW},
            f"{_SECOND}; few images": {"share": 1 / _FEW} | _SECOND_LOSSES,
        },
        (
            Claim(
                "The second set of losses improves performance with few images (Sec. 3.2)",
                f"{_SECOND}; few images",
                f"{_FIRST}; few images",
                "segm_AP",
            ),
            Claim(
                "The second set of losses improves accuracy with few images (Sec. 3.2)",
                f"{_SECOND}; few images",
                f"{_FIRST}; few images",
                "eval_accuracy",
            ),
            *(
                Claim(
                    f"Its training accuracy is lower with {size} images (Sec. 3.2 claims this for many)",
                    f"{_FIRST}; {size} images",
                    f"{_SECOND}; {size} images",
                    "train_accuracy",
                )
                for size in ("all", "few")
            ),
        ),
        f'"Few images" are one in {_FEW}, seen {_FEW} times as often. With focal loss, a RoI is background unless a\n'
        "class has a probability above one half, which focal loss rarely gives; this explains part of its lower\n"
        "accuracy. Dice loss has squares in the denominator, as in V-Net. With plain sums, which are as common,\n"
        "masks could collapse to whole boxes: mask AP 0.341, 0.080 and 0.071 with all images and seeds 0, 1 and 2.\n"
        "Those runs were replaced.",
    ),
    "proposals": Comparison(
        "Sources of training proposals",
        {
            "rpn": {},
            "gt": {"model.train_proposals": "gt"},
            "gt_then_rpn": _GT_THEN_RPN,
        },
        (
            Claim(
                "Ground-truth boxes before RPN proposals improve accuracy (Sec. 2.2)",
                "gt_then_rpn",
                "rpn",
                "eval_accuracy",
            ),
            Claim("Ground-truth boxes before RPN proposals improve box AP", "gt_then_rpn", "rpn", "bbox_AP"),
        ),
    ),
    "min_proposals": Comparison(
        "Minimum number of proposals with gt_then_rpn",
        {"15": _GT_THEN_RPN, "30": _GT_THEN_RPN | {"model.min_proposals": 30}},
        (
            Claim("30 instead of 15 improves accuracy (Sec. 3.2)", "30", "15", "eval_accuracy"),
            Claim("30 instead of 15 improves foreground accuracy", "30", "15", "eval_accuracy_foreground"),
            Claim("30 instead of 15 improves box AP", "30", "15", "bbox_AP"),
        ),
    ),
    "deconvolution": Comparison(
        "Mask head with and without deconvolution (Sec. 2.5)",
        {"28 x 28, with": {}, "14 x 14, without": {"model.mask_deconv": False}},
    ),
    "learning_rate": Comparison(
        "Learning rates in the ratio of the paper's 5e-4, 7e-4 and 1e-4 (Sec. 3.2)",
        {"1.5e-3": {}, "2.1e-3": {"optim.lr": 2.1e-3}, "3e-4": {"optim.lr": 3e-4}},
    ),
    "dropped_labels": Comparison(
        "Missing training annotations (Sec. 5)",
        {f"{share:.0%}": {"data.drop_labels": share} if share else {} for share in (0, 0.2, 0.4, 0.6)},
        (Claim("Missing labels make training harder (Sec. 5)", "0%", "60%", "segm_AP"),),
    ),
    "curves": Comparison("Loss and accuracy during training (Fig. 4)", {"10 epochs": {"epochs": 10, "eval_every": 1}}),
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
