"""Every option, its default, its unit and where the number comes from. The other files change a few lines of it.

Any field can be overridden on the command line: ``--config.optim.lr=1e-4``. A field that does not exist is an error.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of initialisation, sampling, shuffling and augmentation
    config.batch_size = 16  # images a step, over all devices and parts (paper, Sec. 3.2)
    config.epochs = 12  # 0: as many as show the network images_to_see images, but 12 to 100
    # Few images are to be seen more often, but training on them need not last longer (as the BiT-HyperRule has steps
    # and not epochs, Kolesnikov et al. 2020). 5,000: 25 epochs of 200 images.
    config.images_to_see = 5000
    config.max_steps = 0  # stop after this many steps; 0 means after `epochs`
    config.log_every = 20  # steps between lines of metrics.jsonl; 0 means only with checkpoints
    config.eval_every = 1  # epochs between evaluations; the last step is evaluated too; 0 means never
    config.eval_batch_size = 8  # images a step of evaluation
    config.eval_losses = False  # evaluations also compute the losses and the accuracy of the RoI classifier
    config.eval_train_limit = 0  # training images that evaluations measure too, the first of a seeded shuffle
    config.eval_workers = 0  # extra processes that encode masks, for accelerators that are faster than one core at it
    config.checkpoint_every = 1000  # steps between checkpoints, beside those of evaluations and the last; 0 means none
    # Divide parameters, their averages and the optimizer's state among the devices, instead of a copy on each: less
    # memory, more communication, the same results.
    config.shard_params = False
    config.keep_checkpoints = 2  # newest ones kept, beside the best by mask AP, or box AP without masks

    # Keyword arguments of maskrcnn_jax.models.mask_rcnn.MaskRCNN, under the names that torchvision gives them.
    config.model = ConfigDict()
    model = config.model
    model.backbone = "resnet50"  # resnet18, resnet34, resnet50, resnet101, mobilenet_v3_large
    # Of the images: RGB; others, such as depth as the alpha channel of a PNG, enter as (x / 255 - 0.5) / 0.25.
    model.in_channels = 3
    model.stem_channels = 64  # this, the next two, norm_eps and stride_in_1x1 are of ResNets only
    model.stage_channels = (
        0  # outputs of the first stage, doubled from stage to stage; 0: 256, or 64 in resnet18 and 34
    )
    model.bottleneck_channels = 64  # inside the bottlenecks of the first stage, likewise
    model.norm = "batch"  # batch: trained, over the whole batch; frozen: fixed statistics, for pretrained weights
    model.norm_eps = 1e-5  # added to the variance; 0 with torchvision's COCO weights of version 1
    model.stride_in_1x1 = False  # bottleneck stride in the 1x1 (detectron2's MSRA weights) or in the 3x3 convolution
    model.head_norm = (
        "none"  # batch: also in the FPN, the box head's convolutions and the mask head (torchvision's v2)
    )
    model.fpn_channels = 256
    model.anchor_sizes = (32, 64, 128, 256, 512)  # pixels, one per level P2..P6
    model.aspect_ratios = (0.5, 1.0, 2.0)  # height / width
    model.anchor_scales = (1.0,)  # each level has anchors of its size times each of these
    model.exact_anchors = False  # unrounded, at strides of powers of two (detectron2), or as torchvision has them
    model.rpn_channels = 0  # of the RPN head's convolutions; 0: fpn_channels
    model.rpn_conv_depth = 1  # 3x3 convolutions of the RPN head
    model.rpn_fg_iou_thresh = 0.7
    model.rpn_bg_iou_thresh = 0.3
    model.rpn_batch_size_per_image = 256  # anchors in the RPN loss
    model.rpn_positive_fraction = 0.5
    model.rpn_pre_nms_top_n_train = 2000  # per level
    model.rpn_pre_nms_top_n_test = 1000
    model.rpn_post_nms_top_n_train = 2000  # per image
    model.rpn_post_nms_top_n_test = 1000
    model.rpn_nms_thresh = 0.7
    model.rpn_min_size = 1e-3  # pixels; smaller proposals are dropped
    model.train_proposals = "rpn"  # gt: annotated boxes alone; gt_then_rpn: up to min_proposals (paper, Sec. 2.2)
    model.min_proposals = 15  # annotated boxes and the RPN's best together, with gt_then_rpn (paper, Sec. 3.2)
    model.roi_operator = "align"  # or pool: RoIPool, which rounds to whole cells
    model.roi_sampling_ratio = 2  # samples per bin and axis; 0: one per feature cell (detectron2)
    model.roi_aligned = (
        False  # RoIAlign, mask targets and pasting exact to half a pixel (detectron2) or not (torchvision)
    )
    model.box_conv_channels = ()  # of the box head's 3x3 convolutions
    model.box_fc_channels = (1024, 1024)  # units of its fully connected layers
    model.box_iou_thresh = 0.5  # foreground at or above
    model.box_batch_size_per_image = 512  # RoIs in the box loss
    model.box_positive_fraction = 0.25
    model.box_score_thresh = 0.05
    model.box_nms_thresh = 0.5
    model.box_min_size = 1e-2  # pixels; smaller detections are dropped
    model.box_detections_per_img = 100
    model.mask_channels = 256
    model.mask_deconv = True  # masks of 28x28; without it the five convolutions of the paper, Sec. 2.5, give 14x14
    model.mask_targets_binary = False  # 0 or 1 (detectron2), or the share of the object in each cell (torchvision)
    model.classification_loss = "cross_entropy"  # or focal: sigmoid focal loss (paper, Sec. 3.2)
    model.box_loss = "smooth_l1"  # of the box head; or iou, giou (paper, Sec. 3.2)
    model.mask_loss = "bce"  # or dice (paper, Sec. 3.2)
    model.remat = False  # compute the backbone again in the gradient: less memory, more time
    model.dtype = "float32"  # of convolutions and matrix products: float32, bfloat16, float16 (V100, T4), float64

    config.optim = ConfigDict()
    optim = config.optim
    optim.kind = "adamw"  # adamw (paper, Sec. 3.2) or sgd (torchvision's and detectron2's recipes)
    optim.lr = 5e-4  # peak (paper, Sec. 3.2)
    optim.lr_batch_size = 0  # images a step that lr is for, in proportion to which it scales; 0: lr is as it is
    optim.warmup_steps = 500  # linear from lr / 1000, as torchvision's recipe
    optim.final_lr_fraction = 0.0  # of the cosine
    optim.weight_decay = 1e-4  # decoupled in AdamW, part of the gradient in SGD
    optim.decay_norm_and_bias = False
    optim.b1 = 0.9
    optim.b2 = 0.999
    optim.momentum = 0.9  # of SGD
    optim.clip_norm = 1.0  # global norm of the gradient; 0 does not clip
    optim.loss_scale = 2.0**15  # to begin with, in float16 alone; halved by gradients that are not finite
    optim.loss_scale_interval = 2000  # steps with finite gradients after which it doubles (torch's GradScaler)
    # Evaluation and prediction then use an exponential average of the parameters, that keeps so much of itself a step
    # (step t: at most (1 + t) / (10 + t)), with the batch statistics of the last step; 0: none. Such as 0.9998.
    optim.ema_decay = 0.0
    # The batch is worked on in so many equal parts one after the other, in the memory of one; the gradient is the mean
    # of theirs. Losses divide by numbers of samples, and norms take their statistics, part by part.
    optim.accumulate = 1
    optim.frozen_stages = 0  # of the backbone, which keep their initial values: 1 the stem, 2 the first stage too, ...

    config.data = ConfigDict()
    data = config.data
    data.source = "coco"  # coco: files in coco_dir; tfds: the same samples from few large files in tfds_dir
    data.coco_dir = ""  # folder with <split>/ and annotations/instances_<split>.json
    data.tfds_dir = ""  # folder that tools/build_tfds.py wrote
    data.train_split = "train2017"
    data.eval_split = "val2017"
    data.train_limit = 0  # use only so many training images, the first of a seeded shuffle; 0 means all
    data.drop_labels = 0.0  # share of the training annotations to forget, to learn what missing labels cost
    data.eval_limit = 0  # evaluate only the first so many images; 0 means all
    data.short_side = 800  # pixels, after resizing
    data.long_side = 1333  # pixels, at most
    data.buckets = "auto"  # padded sizes: auto (four), or exact: each image's own multiple of 32
    data.resize = "uint8"  # uint8: fast; float32: what torchvision computes; pillow: what detectron2 computes
    data.contiguous_labels = False  # number COCO's categories 1..80 (detectron2) instead of by their ids (torchvision)
    data.hflip = 0.5  # probability
    data.color_jitter = 0.0  # strength of brightness, contrast and saturation changes
    # Crowds, and objects of categories that the file does not list (otherwise an error), are neither object nor
    # background where their boxes cover half of an anchor or proposal; torchvision learns them as background.
    data.ignore_regions = False
    data.mask_side = 640  # pixels, canvas of the ground-truth masks; COCO's images fit as they are
    data.threads = 4  # reading and decoding in this process
    data.workers = 0  # extra processes that read and decode
    data.prefetch = 4  # batches ready ahead of the training step
    data.skip_broken = False  # go on without images that cannot be read
    return config
