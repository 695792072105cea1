"""Mask R-CNN on one screen: features, proposals, boxes, masks; then the losses of training and the detections.

Each stage is a method, so that a comparison can feed the intermediate result of a reference into any of them.
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import FrozenDict
from jaxtyping import Array, Bool, Float, Int, Key, Real

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.models import losses
from maskrcnn_jax.models.backbone import feature_list, make_backbone
from maskrcnn_jax.models.box_head import BOX_WEIGHTS, BoxHead
from maskrcnn_jax.models.fpn import FPN
from maskrcnn_jax.models.mask_head import MaskHead
from maskrcnn_jax.models.postprocess import select_detections
from maskrcnn_jax.models.proposals import (
    RPN_BOX_WEIGHTS,
    TRAIN_PROPOSALS,
    limit_proposals,
    sample_rois,
    select_proposals,
)
from maskrcnn_jax.models.rpn import RPNHead
from maskrcnn_jax.ops.anchors import grid_anchors
from maskrcnn_jax.ops.boxes import decode_boxes, encode_boxes
from maskrcnn_jax.ops.masks import mask_targets
from maskrcnn_jax.ops.matching import BACKGROUND, Sample, ignore_covered, match, sample_balanced
from maskrcnn_jax.ops.roi_align import multiscale_roi_align
from maskrcnn_jax.ops.roi_pool import multiscale_roi_pool
from maskrcnn_jax.structures import Batch, Detections, GroundTruth, Proposals, RoISamples

# Of ImageNet's images scaled to 0..1, the statistics that pretrained backbones expect.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
# Of further channels, about which nothing is known: roughly those of values that fill 0..1.
EXTRA_MEAN, EXTRA_STD = 0.5, 0.25
BOX_POOL_SIZE = 7
MASK_POOL_SIZE = 14
# Of options that are a choice. The losses of the heads: the paper's first set and its second (Sec. 3.2).
CHOICES = {
    "train_proposals": TRAIN_PROPOSALS,
    "roi_operator": ("align", "pool"),
    "classification_loss": ("cross_entropy", "focal"),
    "box_loss": ("smooth_l1", "iou", "giou"),
    "mask_loss": ("bce", "dice"),
    "dtype": ("float32", "bfloat16", "float16", "float64"),
}
# Of a class that decides for itself, before training: otherwise the many that are absent would drown the one present.
FOCAL_PRIOR = 0.01


class MaskRCNN(nnx.Module):
    """Mask R-CNN with a feature pyramid; options carry torchvision's names and default to its values."""

    def __init__(
        self,
        num_classes: int = 91,
        *,
        backbone: object = "resnet50",
        in_channels: int = 3,
        stem_channels: int = 64,
        stage_channels: int = 0,
        bottleneck_channels: int = 64,
        norm: str = "batch",
        norm_eps: float = 1e-5,
        stride_in_1x1: bool = False,
        head_norm: str = "none",
        fpn_channels: int = 256,
        anchor_sizes: tuple[float, ...] = (32, 64, 128, 256, 512),
        aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0),
        anchor_scales: tuple[float, ...] = (1.0,),
        exact_anchors: bool = False,
        rpn_channels: int = 0,
        rpn_conv_depth: int = 1,
        rpn_fg_iou_thresh: float = 0.7,
        rpn_bg_iou_thresh: float = 0.3,
        rpn_batch_size_per_image: int = 256,
        rpn_positive_fraction: float = 0.5,
        rpn_pre_nms_top_n_train: int = 2000,
        rpn_pre_nms_top_n_test: int = 1000,
        rpn_post_nms_top_n_train: int = 2000,
        rpn_post_nms_top_n_test: int = 1000,
        rpn_nms_thresh: float = 0.7,
        rpn_min_size: float = 1e-3,
        train_proposals: str = "rpn",
        min_proposals: int = 15,
        roi_operator: str = "align",
        roi_sampling_ratio: int = 2,
        roi_aligned: bool = False,
        box_conv_channels: tuple[int, ...] = (),
        box_fc_channels: tuple[int, ...] = (1024, 1024),
        box_iou_thresh: float = 0.5,
        box_batch_size_per_image: int = 512,
        box_positive_fraction: float = 0.25,
        box_score_thresh: float = 0.05,
        box_nms_thresh: float = 0.5,
        box_min_size: float = 1e-2,
        box_detections_per_img: int = 100,
        mask_channels: int = 256,
        mask_deconv: bool = True,
        mask_targets_binary: bool = False,
        classification_loss: str = "cross_entropy",
        box_loss: str = "smooth_l1",
        mask_loss: str = "bce",
        remat: bool = False,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        """Build the network; configs/base.py says what each option means.

        Args:
          num_classes: C + 1, background included.
          backbone: its name, or a network of your own as :func:`.backbone.make_backbone` describes it, to which the
            options from ``stem_channels`` to ``stride_in_1x1`` and ``remat`` do not apply.
          anchor_sizes: as many as pyramid levels: one more than the backbone has maps.
          rngs: for the initial values.

        Raises:
          UserError: for an option that cannot be.
        """
        chosen = (train_proposals, roi_operator, classification_loss, box_loss, mask_loss, dtype)
        for (name, choices), value in zip(CHOICES.items(), chosen, strict=True):
            if value not in choices:
                raise UserError(f"{name} is {value!r}; use one of {', '.join(choices)}")
        if in_channels < 3:
            raise UserError(f"in_channels is {in_channels}; use 3 (RGB; grey images are read as such) or more")
        self.classification_loss, self.box_loss, self.mask_loss = classification_loss, box_loss, mask_loss
        self.dtype = jnp.dtype(dtype)
        self.in_channels = in_channels
        self.anchor_options = FrozenDict(
            sizes=tuple(anchor_sizes),
            aspect_ratios=tuple(aspect_ratios),
            exact=exact_anchors,
            scales=tuple(anchor_scales),
        )
        self.rpn_thresholds = (rpn_fg_iou_thresh, rpn_bg_iou_thresh)
        # FrozenDict, because the structure of a model must be hashable for jax.jit to recognise it.
        self.rpn_sampling = FrozenDict(size=rpn_batch_size_per_image, positive_fraction=rpn_positive_fraction)
        self.rpn_selection_train = FrozenDict(
            pre_nms_top_n=rpn_pre_nms_top_n_train,
            post_nms_top_n=rpn_post_nms_top_n_train,
            nms_thresh=rpn_nms_thresh,
            min_size=rpn_min_size,
        )
        self.rpn_selection_test = FrozenDict(
            pre_nms_top_n=rpn_pre_nms_top_n_test,
            post_nms_top_n=rpn_post_nms_top_n_test,
            nms_thresh=rpn_nms_thresh,
            min_size=rpn_min_size,
        )
        self.roi_operator, self.roi_aligned = roi_operator, roi_aligned
        self.roi_sampling_ratio = roi_sampling_ratio
        self.proposal_source = FrozenDict(source=train_proposals, min_proposals=min_proposals)
        self.roi_sampling = FrozenDict(
            size=box_batch_size_per_image,
            positive_fraction=box_positive_fraction,
            iou_thresh=box_iou_thresh,
        )
        self.selection = FrozenDict(
            score_thresh=box_score_thresh,
            nms_thresh=box_nms_thresh,
            min_size=box_min_size,
            detections_per_img=box_detections_per_img,
        )
        self.mask_targets_binary = mask_targets_binary
        common = {"dtype": self.dtype, "rngs": rngs}
        resnet_options = {
            "stem_channels": stem_channels,
            "stage_channels": stage_channels,
            "bottleneck_channels": bottleneck_channels,
            "norm_eps": norm_eps,
            "stride_in_1x1": stride_in_1x1,
        }
        shared_options = {"in_channels": in_channels, "norm": norm, "remat": remat}
        self.backbone = make_backbone(backbone, resnet_options=resnet_options, **shared_options, **common)
        num_maps = len(self.backbone.out_channels)
        if len(anchor_sizes) != num_maps + 1:
            raise UserError(
                f"anchor_sizes {tuple(anchor_sizes)} must be {num_maps + 1} sizes, one for each pyramid level: those "
                f"of the backbone's {num_maps} maps and one coarser"
            )
        self.fpn = FPN(self.backbone.out_channels, fpn_channels, norm=head_norm, **common)
        self.rpn = RPNHead(
            fpn_channels,
            rpn_channels or fpn_channels,
            len(aspect_ratios) * len(anchor_scales),
            depth=rpn_conv_depth,
            **common,
        )
        self.box_head = BoxHead(
            fpn_channels,
            BOX_POOL_SIZE,
            num_classes,
            conv_channels=tuple(box_conv_channels),
            fc_channels=tuple(box_fc_channels),
            norm=head_norm,
            class_bias=math.log(FOCAL_PRIOR / (1 - FOCAL_PRIOR)) if classification_loss == "focal" else 0.0,
            **common,
        )
        self.mask_head = MaskHead(
            fpn_channels, mask_channels, num_classes, deconv=mask_deconv, norm=head_norm, **common
        )
        self.mask_size = MASK_POOL_SIZE * (2 if mask_deconv else 1)

    # Stages

    def normalize(
        self, images: Real[Array | np.ndarray, "B H W I"], sizes: Int[Array | np.ndarray, "B 2"]
    ) -> Float[Array, "B H W I"]:
        """Return images [B, H, W, I] standardised, in the compute dtype; the padding beyond ``sizes`` is zero."""
        if images.shape[-1] != self.in_channels:
            raise UserError(f"images have {images.shape[-1]} channels where model.in_channels is {self.in_channels}")
        wide = jnp.promote_types(self.dtype, jnp.float32)
        extra = self.in_channels - 3
        values = (*IMAGE_MEAN, *[EXTRA_MEAN] * extra), (*IMAGE_STD, *[EXTRA_STD] * extra)
        mean, std = (jnp.array(value, wide).reshape(1, 1, 1, -1) for value in values)
        normalized = (images.astype(wide) / 255 - mean) / std
        inside_y = jnp.arange(images.shape[1])[None, :] < sizes[:, :1]
        inside_x = jnp.arange(images.shape[2])[None, :] < sizes[:, 1:]
        inside = inside_y[:, :, None, None] & inside_x[:, None, :, None]
        return jnp.where(inside, normalized, 0).astype(self.dtype)

    def features(
        self, images: Real[Array | np.ndarray, "B H W I"], sizes: Int[Array | np.ndarray, "B 2"]
    ) -> list[Float[Array, "B _ _ K"]]:
        """Return the pyramid of images [B, H, W, I] in 0..255, finest first; P2..P6 of a backbone with four maps."""
        maps = self.backbone(self.normalize(images, sizes))
        return self.fpn(feature_list(maps, self.backbone.out_channels))

    def anchors(
        self, features: list[Float[Array, "B _ _ K"]], image_shape: tuple[int, ...]
    ) -> list[Float[Array, "_ 4"]]:
        """Return the anchors [A_l, 4] of each level."""
        shapes = [feature.shape[1:3] for feature in features]
        return [jnp.asarray(a) for a in grid_anchors(image_shape, shapes, **self.anchor_options)]

    def propose(
        self,
        objectness: list[Float[Array, "B _"]],
        deltas: list[Float[Array, "B _ 4"]],
        anchors: list[Float[Array, "_ 4"]],
        sizes: Int[Array | np.ndarray, "B 2"],
        selection: Mapping,
    ) -> Proposals:
        """Select the proposals of every image from the RPN's outputs; no gradient flows through them."""
        # Proposals are inputs of the second stage: Sec. 3.2, Faster R-CNN (approximate joint training).
        objectness, deltas = jax.lax.stop_gradient((objectness, deltas))
        return jax.vmap(lambda o, d, s: select_proposals(o, d, anchors, s, **selection))(objectness, deltas, sizes)

    def pool(
        self,
        features: list[Float[Array, "B _ _ K"]],
        boxes: Float[Array, "B R 4"],
        image_shape: tuple[int, ...],
        output_size: int,
    ) -> Float[Array, "B R {output_size} {output_size} K"]:
        """Pool boxes [B, R, 4] from all levels but the coarsest to [B, R, output_size, output_size, K]."""
        options = {"image_shape": image_shape, "output_size": output_size}
        if self.roi_operator == "pool":
            operator = functools.partial(multiscale_roi_pool, **options)
        else:
            options |= {"sampling_ratio": self.roi_sampling_ratio, "aligned": self.roi_aligned}
            operator = functools.partial(multiscale_roi_align, **options)
        return jax.vmap(operator)(features[:-1], boxes)

    def select(
        self,
        logits: Float[Array, "B N C1"],
        deltas: Float[Array, "B N C1 4"],
        proposals: Proposals,
        sizes: Int[Array | np.ndarray, "B 2"],
    ) -> tuple[Float[Array, "B D 4"], Float[Array, "B D"], Int[Array, "B D"], Bool[Array, "B D"]]:
        """Return boxes [B, D, 4], scores, labels and valid [B, D] of the detections in the box head's outputs."""
        if self.classification_loss == "focal":
            scores = jax.nn.sigmoid(logits[..., 1:])
        else:
            scores = jax.nn.softmax(logits, axis=-1)[..., 1:]
        return jax.vmap(lambda c, d, p, s: select_detections(c, d, p, s, **self.selection))(
            scores, deltas, proposals, sizes
        )

    def mask_logits(
        self,
        features: list[Float[Array, "B _ _ K"]],
        boxes: Float[Array, "B F 4"],
        labels: Int[Array, "B F"],
        valid: Bool[Array, "B F"],
        image_shape: tuple[int, ...],
    ) -> Float[Array, "B F M M"]:
        """Return the mask logits [B, F, M, M] of boxes [B, F, 4] for their labels [B, F]; M is 28, or 14.

        The mask head is the most expensive part per box, and of its F slots ``valid`` [B, F] often has few, which come
        first: a quarter is computed if that holds them all.
        """
        num_slots = boxes.shape[1]
        few = -(-num_slots // 4)

        def with_slots(size):
            def run(mask_head):
                pooled = self.pool(features, boxes[:, :size], image_shape, MASK_POOL_SIZE)
                logits = mask_head(pooled, labels[:, :size], valid[:, :size])
                return jnp.pad(logits, ((0, 0), (0, num_slots - size), (0, 0), (0, 0)))

            # Recomputed in the gradient, which would otherwise keep what each branch leaves for it, used or not.
            return nnx.remat(run)

        return nnx.cond(jnp.any(valid[:, few:]), with_slots(num_slots), with_slots(few), self.mask_head)

    def match_anchors(self, anchors: list[Float[Array, "_ 4"]], gt: GroundTruth) -> Int[Array, "B A"]:
        """Return [B, A] the object of each anchor, or BACKGROUND or IGNORED."""
        high, low = self.rpn_thresholds
        flat = jnp.concatenate(anchors)
        matches = jax.vmap(
            lambda boxes, valid: match(
                flat, boxes, valid, high_threshold=high, low_threshold=low, allow_low_quality=True
            )
        )(gt.boxes, gt.valid)
        if gt.ignored is None:
            return matches
        return jax.vmap(lambda m, boxes, ignored: ignore_covered(m, flat, boxes, ignored))(
            matches, gt.boxes, gt.ignored
        )

    def sample_anchors(self, key: Key[Array, ""], matches: Int[Array, "B A"]) -> Sample:
        """Draw the anchors of the RPN losses from matches [B, A]."""
        keys = jax.random.split(key, matches.shape[0])
        return jax.vmap(lambda k, m: sample_balanced(k, m >= 0, m == BACKGROUND, **self.rpn_sampling))(keys, matches)

    def sample_rois(
        self, key: Key[Array, ""], proposals: Proposals, gt: GroundTruth, *, proposals_from_rpn: bool = False
    ) -> RoISamples:
        """Draw the RoIs that the heads are trained on from the annotated boxes and some or all of the proposals."""
        if not proposals_from_rpn:
            proposals = jax.vmap(lambda p, g: limit_proposals(p, g, **self.proposal_source))(proposals, gt)
        keys = jax.random.split(key, proposals.boxes.shape[0])
        return jax.vmap(lambda k, p, g: sample_rois(k, p, g, **self.roi_sampling))(keys, proposals, gt)

    # Training

    def losses(
        self, batch: Batch, key: Key[Array, ""], *, proposals_from_rpn: bool = False
    ) -> tuple[dict[str, Float[Array, ""]], dict[str, Float[Array, ""]]]:
        """Compute the five losses of a batch.

        Args:
          batch: with ground truth; rows with ``valid`` False count for nothing.
          key: random key of the sampling.
          proposals_from_rpn: RoIs come from the RPN's proposals whatever ``train_proposals`` says, as in testing.

        Returns:
          The loss terms, scalars whose sum is to be minimised, and metrics, scalars for the log.
        """
        rpn_key, roi_key = jax.random.split(key)
        image_shape = batch.images.shape[1:3]
        gt = batch.gt._replace(valid=batch.gt.valid & batch.valid[:, None])

        features = self.features(batch.images, batch.sizes)
        anchors = self.anchors(features, image_shape)
        objectness, deltas = self.rpn(features)
        matches = self.match_anchors(anchors, gt)
        sample = self.sample_anchors(rpn_key, matches)
        sample = sample._replace(valid=sample.valid & batch.valid[:, None])
        terms = self.rpn_losses(objectness, deltas, anchors, matches, sample, gt)

        proposals = self.propose(objectness, deltas, anchors, batch.sizes, self.rpn_selection_train)
        rois = self.sample_rois(roi_key, proposals, gt, proposals_from_rpn=proposals_from_rpn)
        rois = rois._replace(valid=rois.valid & batch.valid[:, None])
        head_terms, metrics = self.head_losses(features, rois, batch._replace(gt=gt))
        return terms | head_terms, metrics

    def rpn_losses(
        self,
        objectness: list[Float[Array, "B _"]],
        deltas: list[Float[Array, "B _ 4"]],
        anchors: list[Float[Array, "_ 4"]],
        matches: Int[Array, "B A"],
        sample: Sample,
        gt: GroundTruth,
    ) -> dict[str, Float[Array, ""]]:
        """Return the RPN's two losses over the sampled anchors."""

        def gather(objectness, deltas, matches, index, gt_boxes):
            targets = encode_boxes(
                gt_boxes[jnp.maximum(matches[index], 0)], jnp.concatenate(anchors)[index], RPN_BOX_WEIGHTS
            )
            return objectness[index], deltas[index], targets

        logits, predicted, targets = jax.vmap(gather)(
            jnp.concatenate(objectness, axis=1), jnp.concatenate(deltas, axis=1), matches, sample.index, gt.boxes
        )
        return {
            "loss_objectness": losses.objectness_loss(logits, sample.foreground, sample.valid),
            "loss_rpn_box_reg": losses.box_loss(predicted, targets, sample.foreground, sample.valid),
        }

    def head_losses(
        self, features: list[Float[Array, "B _ _ K"]], rois: RoISamples, batch: Batch
    ) -> tuple[dict[str, Float[Array, ""]], dict[str, Float[Array, ""]]]:
        """Return the class, box and mask losses of the sampled RoIs, and metrics of the heads."""
        image_shape = batch.images.shape[1:3]
        foreground = rois.valid & (rois.labels > 0)
        logits, deltas = self.box_head(self.pool(features, rois.boxes, image_shape, BOX_POOL_SIZE), rois.valid)
        matched = jnp.take_along_axis(batch.gt.boxes, rois.gt_index[..., None], axis=1)
        deltas = jnp.take_along_axis(deltas, rois.labels[..., None, None], axis=2)[:, :, 0]
        if self.box_loss == "smooth_l1":
            targets = encode_boxes(matched, rois.boxes, BOX_WEIGHTS)
            box_term = losses.box_loss(deltas, targets, foreground, rois.valid)
        else:
            box_loss = losses.iou_loss if self.box_loss == "iou" else losses.giou_loss
            box_term = box_loss(decode_boxes(deltas, rois.boxes, BOX_WEIGHTS), matched, foreground)
        if self.classification_loss == "focal":
            class_term = losses.focal_loss(logits, rois.labels, rois.valid)
            logits = logits.at[..., 0].set(0)  # background where no class is more likely present than not
        else:
            class_term = losses.classification_loss(logits, rois.labels, rois.valid)

        # Foreground comes first, so these slots hold all of it.
        num_mask = int(self.roi_sampling["size"] * self.roi_sampling["positive_fraction"])
        mask_rois = jax.tree.map(lambda x: x[:, :num_mask], rois)
        has_mask = foreground[:, :num_mask]
        if batch.gt.has_mask is not None:
            has_mask &= jnp.take_along_axis(batch.gt.has_mask, mask_rois.gt_index, axis=1)
        mask_logits = self.mask_logits(features, mask_rois.boxes, mask_rois.labels, has_mask, image_shape)
        mask_loss = losses.dice_loss if self.mask_loss == "dice" else losses.mask_loss
        terms = {
            "loss_classifier": class_term,
            "loss_box_reg": box_term,
            "loss_mask": mask_loss(mask_logits, self.mask_targets(mask_rois, batch), has_mask),
        }
        correct = jnp.argmax(logits, axis=-1) == rois.labels
        metrics = {
            "num_foreground": jnp.sum(foreground) / jnp.maximum(jnp.sum(batch.valid), 1),
            "accuracy": losses.masked_mean(correct.astype(logits.dtype), rois.valid),
            "accuracy_foreground": losses.masked_mean(correct.astype(logits.dtype), foreground),
        }
        return terms, metrics

    def mask_targets(self, rois: RoISamples, batch: Batch) -> Float[Array, "B F M M"]:
        """Return the mask targets of foreground RoIs, as large as :meth:`mask_logits`."""
        targets = jax.vmap(
            lambda packed, boxes, index, mask_size, size: mask_targets(
                packed,
                boxes,
                index,
                mask_size=mask_size,
                image_size=size,
                max_size=batch.images.shape[1:3],
                output_size=self.mask_size,
                aligned=self.roi_aligned,
            )
        )(batch.gt.masks, rois.boxes, rois.gt_index, batch.gt.mask_sizes, batch.sizes)
        return (targets >= 0.5).astype(targets.dtype) if self.mask_targets_binary else targets

    # Testing

    def detect(self, images: Real[Array | np.ndarray, "B H W I"], sizes: Int[Array | np.ndarray, "B 2"]) -> Detections:
        """Find the objects in a batch of images.

        Args:
          images: [B, H, W, I] in 0..255, padded; I is ``in_channels``.
          sizes: [B, 2] int32 (height, width) inside the padding.

        Returns:
          Detections in pixels of the padded input.
        """
        image_shape = images.shape[1:3]
        features = self.features(images, sizes)
        anchors = self.anchors(features, image_shape)
        objectness, deltas = self.rpn(features)
        proposals = self.propose(objectness, deltas, anchors, sizes, self.rpn_selection_test)
        logits, deltas = self.box_head(self.pool(features, proposals.boxes, image_shape, BOX_POOL_SIZE))
        boxes, scores, labels, valid = self.select(logits, deltas, proposals, sizes)
        mask_logits = self.mask_logits(features, boxes, labels, valid, image_shape)
        return Detections(boxes, scores, labels, jax.nn.sigmoid(mask_logits), valid)


def make_unfilled(num_classes: int, **options) -> MaskRCNN:
    """Build a network of zeros to read weights into: drawing the initial values takes many seconds.

    Args:
      num_classes: C + 1, background included.
      options: of MaskRCNN.
    """
    model = nnx.eval_shape(lambda: MaskRCNN(num_classes, **options, rngs=nnx.Rngs(0)))
    nnx.update(model, jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), nnx.state(model)))
    return model
