"""Mask R-CNN: features, proposals, boxes, masks; then the losses of training and the detections.

Each stage is a method, so that a comparison can feed the intermediate result of a reference into any of them, and a
named scope, by which profiles show it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Real

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.models import losses
from maskrcnn_jax.models.backbone import Backbone, check_backbone, feature_list, make_backbone
from maskrcnn_jax.models.box_head import BoxHead, deltas_of
from maskrcnn_jax.models.fpn import FPN
from maskrcnn_jax.models.layers import BatchNorm
from maskrcnn_jax.models.mask_head import MaskHead
from maskrcnn_jax.models.normalize import normalize_images
from maskrcnn_jax.models.postprocess import select_detections
from maskrcnn_jax.models.proposals import RPN_BOX_WEIGHTS, limit_proposals, sample_rois, select_proposals
from maskrcnn_jax.models.rpn import RPNHead
from maskrcnn_jax.ops.anchors import grid_anchors
from maskrcnn_jax.ops.boxes import encode_boxes
from maskrcnn_jax.ops.devices import any_on_devices, split_key, sum_over_devices
from maskrcnn_jax.ops.masks import mask_targets
from maskrcnn_jax.ops.matching import BACKGROUND, Sample, ignore_covered, match, sample_balanced
from maskrcnn_jax.ops.roi_align import multiscale_roi_align
from maskrcnn_jax.ops.roi_pool import multiscale_roi_pool
from maskrcnn_jax.options import ModelOptions
from maskrcnn_jax.structures import Batch, Detections, GroundTruth, Proposals, RoISamples

Images: TypeAlias = Real[Array | np.ndarray, "B H W I"]  # 0..255
Sizes: TypeAlias = Int[Array | np.ndarray, "B 2"]  # (height, width) of the images inside the padding
# For each level of the pyramid, finest first:
Pyramid: TypeAlias = list[Float[Array, "B _ _ K"]]
Anchors: TypeAlias = list[Float[Array, "_ 4"]]
Objectness: TypeAlias = list[Float[Array, "B _"]]
Deltas: TypeAlias = list[Float[Array, "B _ 4"]]
Scalars: TypeAlias = dict[str, Float[Array, ""]]

BOX_POOL_SIZE = 7
MASK_POOL_SIZE = 14


class MaskRCNN(nnx.Module):
    """Mask R-CNN with a feature pyramid."""

    def __init__(
        self,
        num_classes: int = 91,
        options: ModelOptions | None = None,
        *,
        backbone: nnx.Module | None = None,
        rngs: nnx.Rngs,
    ):
        """Build the network.

        Args:
            num_classes: C + 1, background included.
            options: Of the network; the defaults if not given.
            backbone: A network of your own as :func:`.backbone.check_backbone` describes it, instead of the one that
                ``options.backbone`` names.
            rngs: For the initial values.

        Raises:
            UserError: if there is no such backbone, the number of anchor sizes does not fit it, or that of class
                weights the classes.
        """
        self.options = options = options or ModelOptions()
        losses.check_class_weights(options.class_weights, num_classes)
        self.dtype = jnp.dtype(options.dtype)
        common: dict[str, Any] = {"dtype": self.dtype, "rngs": rngs}
        self.backbone: Backbone = make_backbone(options, **common) if backbone is None else check_backbone(backbone)
        num_maps = len(self.backbone.out_channels)
        if len(options.anchor_sizes) != num_maps + 1:
            raise UserError(
                f"model.anchor_sizes is {options.anchor_sizes}; use {num_maps + 1} sizes, one for each pyramid level: "
                f"the backbone's {num_maps} maps and one coarser"
            )
        channels, num_anchors = options.fpn_channels, len(options.aspect_ratios) * len(options.anchor_scales)
        self.fpn = FPN(self.backbone.out_channels, channels, norm=options.head_norm, **common)
        self.rpn = RPNHead(
            channels, options.rpn_channels or channels, num_anchors, depth=options.rpn_conv_depth, **common
        )
        self.box_head = BoxHead(
            channels,
            BOX_POOL_SIZE,
            num_classes,
            conv_channels=options.box_conv_channels,
            fc_channels=options.box_fc_channels,
            norm=options.head_norm,
            class_bias=losses.FOCAL_BIAS if options.classification_loss == "focal" else 0.0,
            class_agnostic=options.cls_agnostic_bbox_reg,
            **common,
        )
        self.mask_head = MaskHead(
            channels, options.mask_channels, num_classes, deconv=options.mask_deconv, norm=options.head_norm, **common
        )
        if not options.sync_batch_norm:
            self.set_attributes(BatchNorm, sync=False, raise_if_not_found=False)

    @property
    def mask_size(self) -> int:
        """Side of the predicted masks in cells: 28, or 14 without deconvolution."""
        return MASK_POOL_SIZE * (2 if self.options.mask_deconv else 1)

    # Stages

    def normalize(self, images: Images, sizes: Sizes) -> Float[Array, "B H W I"]:
        """Return images [B, H, W, I] standardised, in the compute dtype; the padding beyond ``sizes`` is zero."""
        return normalize_images(images, sizes, in_channels=self.options.in_channels, dtype=self.dtype)

    def features(self, images: Images, sizes: Sizes) -> Pyramid:
        """Return the pyramid of images [B, H, W, I] in 0..255, finest first; P2..P6 of a backbone with four maps."""
        with jax.named_scope("backbone"):
            maps = feature_list(self.backbone(self.normalize(images, sizes)), self.backbone.out_channels)
        with jax.named_scope("fpn"):
            return self.fpn(maps)

    def anchors(
        self, features: Sequence[Float[Array | np.ndarray, "B _ _ K"]], image_shape: tuple[int, ...]
    ) -> Anchors:
        """Return the anchors [A_l, 4] of each level."""
        shapes = [feature.shape[1:3] for feature in features]
        return grid_anchors(
            image_shape,
            shapes,
            sizes=self.options.anchor_sizes,
            aspect_ratios=self.options.aspect_ratios,
            scales=self.options.anchor_scales,
            exact=self.options.exact_anchors,
        )

    @jax.named_scope("propose")
    def propose(
        self, objectness: Objectness, deltas: Deltas, anchors: Anchors, sizes: Sizes, *, train: bool
    ) -> Proposals:
        """Select the proposals of every image, more of them if ``train``; no gradient flows through them."""
        options = self.options
        select = functools.partial(
            select_proposals,
            pre_nms_top_n=options.rpn_pre_nms_top_n_train if train else options.rpn_pre_nms_top_n_test,
            post_nms_top_n=options.rpn_post_nms_top_n_train if train else options.rpn_post_nms_top_n_test,
            nms_thresh=options.rpn_nms_thresh,
            min_size=options.rpn_min_size,
        )
        # Proposals are inputs of the second stage: Sec. 3.2, Faster R-CNN (approximate joint training).
        objectness, deltas = jax.lax.stop_gradient((objectness, deltas))
        return jax.vmap(lambda o, d, s: select(o, d, anchors, s))(objectness, deltas, sizes)

    @jax.named_scope("pool")
    def pool(
        self, features: Pyramid, boxes: Float[Array, "B R 4"], image_shape: tuple[int, ...], output_size: int
    ) -> Float[Array, "B R {output_size} {output_size} K"]:
        """Pool boxes [B, R, 4] from all levels but the coarsest to [B, R, output_size, output_size, K]."""
        operator: Callable[..., Array] = functools.partial(
            multiscale_roi_align, sampling_ratio=self.options.roi_sampling_ratio, aligned=self.options.roi_aligned
        )
        if self.options.roi_operator == "pool":
            operator = multiscale_roi_pool
        pool = functools.partial(operator, image_shape=image_shape, output_size=output_size)
        # One image after another: the table of all its levels, and the gradient of the table, are large.
        return jax.lax.map(lambda image: pool(*image), (features[:-1], boxes))

    @jax.named_scope("select")
    def select(
        self, logits: Float[Array, "B N C1"], deltas: Float[Array, "B N _ 4"], proposals: Proposals, sizes: Sizes
    ) -> tuple[Float[Array, "B D 4"], Float[Array, "B D"], Int[Array, "B D"], Bool[Array, "B D"]]:
        """Return boxes [B, D, 4], scores, labels and valid [B, D] of the detections in the box head's outputs."""
        to_scores = jax.nn.sigmoid if self.options.classification_loss == "focal" else jax.nn.softmax
        select = functools.partial(select_detections, options=self.options)
        return jax.vmap(select)(to_scores(logits)[..., 1:], deltas, proposals, sizes)

    @jax.named_scope("mask_logits")
    def mask_logits(
        self,
        features: Pyramid,
        boxes: Float[Array, "B F 4"],
        labels: Int[Array, "B F"],
        valid: Bool[Array, "B F"],
        image_shape: tuple[int, ...],
    ) -> Float[Array, "B F M M"]:
        """Return the mask logits [B, F, M, M] of boxes [B, F, 4] for their labels [B, F]; M is 28, or 14.

        Often few of the F slots are ``valid`` [B, F]. They come first: a quarter is computed if that holds them all.
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

        many = any_on_devices(jnp.any(valid[:, few:]))  # all devices take one branch, as norms need
        return nnx.cond(many, with_slots(num_slots), with_slots(few), self.mask_head)

    @jax.named_scope("match_anchors")
    def match_anchors(self, anchors: Anchors, gt: GroundTruth) -> Int[Array, "B A"]:
        """Return [B, A] the object of each anchor, or BACKGROUND or IGNORED."""
        flat, high, low = jnp.concatenate(anchors), self.options.rpn_fg_iou_thresh, self.options.rpn_bg_iou_thresh
        of_image = functools.partial(match, flat, high_threshold=high, low_threshold=low, allow_low_quality=True)
        matches = jax.vmap(of_image)(gt.boxes, gt.valid)
        if gt.ignored is None:
            return matches
        ignore = jax.vmap(lambda m, boxes, ignored: ignore_covered(m, flat, boxes, ignored))
        return ignore(matches, gt.boxes, gt.ignored)

    @jax.named_scope("sample_anchors")
    def sample_anchors(self, key: Key[Array, ""], matches: Int[Array, "B A"]) -> Sample:
        """Draw the anchors of the RPN losses from matches [B, A]."""
        keys = split_key(key, matches.shape[0])
        size, fraction = self.options.rpn_batch_size_per_image, self.options.rpn_positive_fraction
        sample = functools.partial(sample_balanced, size=size, positive_fraction=fraction)
        return jax.vmap(lambda k, m: sample(k, m >= 0, m == BACKGROUND))(keys, matches)

    @jax.named_scope("sample_rois")
    def sample_rois(
        self, key: Key[Array, ""], proposals: Proposals, gt: GroundTruth, *, proposals_from_rpn: bool = False
    ) -> RoISamples:
        """Draw the RoIs that the heads are trained on from the annotated boxes and some or all of the proposals."""
        options = self.options
        if not proposals_from_rpn:
            limit = functools.partial(
                limit_proposals, source=options.train_proposals, min_proposals=options.min_proposals
            )
            proposals = jax.vmap(limit)(proposals, gt)
        keys = split_key(key, proposals.boxes.shape[0])
        sample = functools.partial(
            sample_rois,
            size=options.box_batch_size_per_image,
            positive_fraction=options.box_positive_fraction,
            iou_thresh=options.box_fg_iou_thresh,
        )
        return jax.vmap(sample)(keys, proposals, gt)

    # Training

    def losses(
        self, batch: Batch, key: Key[Array, ""], *, proposals_from_rpn: bool = False
    ) -> tuple[Scalars, Scalars]:
        """Compute the five losses of a batch.

        Args:
            batch: With ground truth; rows with ``valid`` False are ignored.
            key: Of the sampling.
            proposals_from_rpn: Sample RoIs from all proposals, whatever ``train_proposals`` says.

        Returns:
            The loss terms, scalars whose sum is minimised, and metrics, scalars for the log. Where devices share a
            batch, each device returns its share: add them with ``ops.devices.sum_over_devices``.

        Raises:
            ValueError: if the batch has no ground truth.
        """
        if batch.gt is None:
            raise ValueError("the losses need a batch with ground truth; load it with annotations=True")
        rpn_key, roi_key = jax.random.split(key)
        image_shape = batch.images.shape[1:3]
        gt = batch.gt._replace(valid=batch.gt.valid & batch.valid[:, None])

        features = self.features(batch.images, batch.sizes)
        anchors = self.anchors(features, image_shape)
        with jax.named_scope("rpn"):
            objectness, deltas = self.rpn(features)
        matches = self.match_anchors(anchors, gt)
        sample = self.sample_anchors(rpn_key, matches)
        sample = sample._replace(valid=sample.valid & batch.valid[:, None])
        terms = self.rpn_losses(objectness, deltas, anchors, matches, sample, gt, batch.valid)

        proposals = self.propose(objectness, deltas, anchors, batch.sizes, train=True)
        rois = self.sample_rois(roi_key, proposals, gt, proposals_from_rpn=proposals_from_rpn)
        rois = rois._replace(valid=rois.valid & batch.valid[:, None])
        head_terms, metrics = self.head_losses(features, rois, gt, batch)
        return terms | head_terms, metrics

    @jax.named_scope("rpn_losses")
    def rpn_losses(
        self,
        objectness: Objectness,
        deltas: Deltas,
        anchors: Anchors,
        matches: Int[Array, "B A"],
        sample: Sample,
        gt: GroundTruth,
        valid: Bool[Array | np.ndarray, " B"] | None = None,
    ) -> Scalars:
        """Return the RPN's two losses over the sampled anchors.

        ``matches`` [B, A] are those of :meth:`match_anchors`. ``valid`` [B] are the images that count; all by default.
        """

        def gather(objectness, deltas, matches, index, gt_boxes):
            targets = encode_boxes(
                gt_boxes[jnp.maximum(matches[index], 0)], jnp.concatenate(anchors)[index], RPN_BOX_WEIGHTS
            )
            return objectness[index], deltas[index].astype(objectness.dtype), targets

        logits, predicted, targets = jax.vmap(gather)(
            jnp.concatenate(objectness, axis=1), jnp.concatenate(deltas, axis=1), matches, sample.index, gt.boxes
        )
        count = None
        if self.options.rpn_fixed_normalizer:
            num_images = jnp.asarray(len(logits) if valid is None else jnp.sum(valid))
            count = self.options.rpn_batch_size_per_image * num_images
        beta, samples = self.options.smooth_l1_beta, (sample.foreground, sample.valid)
        return {
            "loss_objectness": losses.objectness_loss(logits, *samples, count),
            "loss_rpn_box_reg": losses.box_loss(predicted, targets, *samples, beta=beta, count=count),
        }

    @jax.named_scope("head_losses")
    def head_losses(
        self, features: Pyramid, rois: RoISamples, gt: GroundTruth, batch: Batch
    ) -> tuple[Scalars, Scalars]:
        """Return the class, box and mask losses of the sampled RoIs, and metrics of the heads."""
        options, image_shape = self.options, batch.images.shape[1:3]
        foreground = rois.valid & (rois.labels > 0)
        pooled = self.pool(features, rois.boxes, image_shape, BOX_POOL_SIZE)
        with jax.named_scope("box_head"):
            logits, deltas = self.box_head(pooled, rois.valid)
        matched = jnp.take_along_axis(gt.boxes, rois.gt_index[..., None], axis=1)
        deltas = deltas_of(rois.labels, deltas)
        box_term = losses.roi_box_loss(
            options.box_loss, deltas, rois.boxes, matched, foreground, rois.valid, beta=options.smooth_l1_beta
        )
        class_term, metrics = losses.roi_class_loss(
            options.classification_loss, logits, rois.labels, rois.valid, options.class_weights
        )

        # Foreground comes first, so these slots hold all of it.
        num_mask = int(options.box_batch_size_per_image * options.box_positive_fraction)
        mask_rois = jax.tree.map(lambda x: x[:, :num_mask], rois)
        has_mask = foreground[:, :num_mask]
        if gt.has_mask is not None:
            has_mask &= jnp.take_along_axis(gt.has_mask, mask_rois.gt_index, axis=1)
        mask_logits = self.mask_logits(features, mask_rois.boxes, mask_rois.labels, has_mask, image_shape)
        mask_loss = losses.dice_loss if options.mask_loss == "dice" else losses.mask_loss
        terms = {
            "loss_classifier": class_term,
            "loss_box_reg": box_term,
            "loss_mask": mask_loss(mask_logits, self.mask_targets(mask_rois, gt, batch), has_mask),
        }
        num_foreground = jnp.sum(foreground) / jnp.maximum(sum_over_devices(jnp.sum(batch.valid)), 1)
        return terms, {"num_foreground": num_foreground} | metrics

    @jax.named_scope("mask_targets")
    def mask_targets(self, rois: RoISamples, gt: GroundTruth, batch: Batch) -> Float[Array, "B F M M"]:
        """Return the mask targets of foreground RoIs, as large as :meth:`mask_logits`."""
        shape, side, aligned = batch.images.shape[1:3], self.mask_size, self.options.roi_aligned
        of_image = functools.partial(mask_targets, max_size=shape, output_size=side, aligned=aligned)
        targets = jax.vmap(of_image)(gt.masks, gt.mask_windows, gt.mask_sizes, rois.boxes, rois.gt_index, batch.sizes)
        return (targets >= 0.5).astype(targets.dtype) if self.options.mask_targets_binary else targets

    # Testing

    def detect(self, images: Images, sizes: Sizes) -> Detections:
        """Find the objects in a batch of images.

        Args:
            images: [B, H, W, I] in 0..255, padded; I is ``options.in_channels``.
            sizes: [B, 2] int32 (height, width) inside the padding.

        Returns:
            Detections in pixels of the padded input.
        """
        features, boxes, scores, labels, valid = self.detect_boxes(images, sizes)
        mask_logits = self.mask_logits(features, boxes, labels, valid, images.shape[1:3])
        return Detections(boxes, scores, labels, jax.nn.sigmoid(mask_logits), valid)

    def detect_boxes(self, images: Images, sizes: Sizes) -> tuple[Pyramid, Array, Array, Array, Array]:
        """Find the boxes of :meth:`detect`: the pyramid, boxes [B, D, 4], and scores, labels and valid [B, D]."""
        features = self.features(images, sizes)
        with jax.named_scope("rpn"):
            objectness, deltas = self.rpn(features)
        proposals = self.propose(objectness, deltas, self.anchors(features, images.shape[1:3]), sizes, train=False)
        pooled = self.pool(features, proposals.boxes, images.shape[1:3], BOX_POOL_SIZE)
        with jax.named_scope("box_head"):
            logits, box_deltas = self.box_head(pooled)
        return features, *self.select(logits, box_deltas, proposals, sizes)
