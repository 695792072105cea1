"""Training side by side with torchvision: torch's recipe follows our options, and what the comparison concludes."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

torch = pytest.importorskip("torch")
import tools.comparison.trained_pair as trained_pair  # noqa: E402
from maskrcnn_jax.commands.app import parse  # noqa: E402
from maskrcnn_jax.config import load_config, to_options  # noqa: E402
from maskrcnn_jax.data.dataset import load_coco  # noqa: E402
from maskrcnn_jax.data.shapes import write_dataset  # noqa: E402
from maskrcnn_jax.errors import UserError  # noqa: E402
from maskrcnn_jax.models.mask_rcnn import MaskRCNN  # noqa: E402
from maskrcnn_jax.options import ModelOptions, OptimOptions, Options  # noqa: E402
from maskrcnn_jax.training.optimizer import make_optimizer, make_schedule  # noqa: E402
from tools import compare_torch  # noqa: E402
from tools.comparison.paired_results import TERMS, PairedResults, adjust, late_mean, paired_test  # noqa: E402
from tools.comparison.torch_training import TorchImages, make_torch_optimizer, make_torch_schedule  # noqa: E402


@pytest.fixture(scope="module")
def shapes_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pair") / "shapes"
    write_dataset(directory, num_train=16, num_val=8, image_size=64, seed=3)
    return directory


@pytest.fixture
def options(shapes_dir) -> Options:
    """Four steps of a tiny network."""
    config = load_config("shapes")
    config.batch_size, config.epochs, config.log_every = 8, 2, 1
    config.data.coco_dir = str(shapes_dir)
    config.data.short_side = config.data.long_side = 64
    config.model.update({"roi_aligned": False, "stem_channels": 8, "stage_channels": 8, "fpn_channels": 16})
    config.model.update({"mask_channels": 8, "box_fc_channels": (32, 32), "rpn_post_nms_top_n_train": 32})
    return to_options(config)


@pytest.mark.parametrize("warmup_steps", [0, 7, 500])
@pytest.mark.parametrize("schedule", ["cosine", "multistep", "constant"])
def test_the_schedule_is_ours_at_every_step(schedule, warmup_steps):
    optim = OptimOptions(
        lr=0.02, schedule=schedule, warmup_steps=warmup_steps, final_lr_fraction=0.1, milestones=(4, 8), gamma=0.3
    )
    num_steps, steps_per_epoch = 100, 10
    ours = make_schedule(optim, num_steps, steps_per_epoch)
    optimizer = make_torch_optimizer(torch.nn.Linear(2, 2), optim)
    schedule = make_torch_schedule(optimizer, optim, num_steps, steps_per_epoch)
    for step in range(num_steps):
        with jax.enable_x64(True):
            assert optimizer.param_groups[0]["lr"] == pytest.approx(float(ours(step)), rel=1e-9), step
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize(("decay_norms", "decay_biases"), [(False, False), (True, False), (False, True)])
def test_the_optimizer_changes_kernels_biases_and_norms_as_ours_does(kind, decay_norms, decay_biases):
    optim = OptimOptions(
        kind=kind,
        lr=0.1,
        weight_decay=0.1,
        decay_norms=decay_norms,
        decay_biases=decay_biases,
        clip_norm=0.0,
        momentum=0.8,
        b1=0.7,
    )
    with jax.enable_x64(True):
        _compare_optimizers(optim, np.random.default_rng(0))


def _compare_optimizers(optim, rng):
    """Take four steps of both."""
    model = torch.nn.ModuleDict({"linear": torch.nn.Linear(2, 3), "norm": torch.nn.BatchNorm1d(3)}).double()
    theirs = {
        ("linear", "kernel"): model["linear"].weight,
        ("linear", "bias"): model["linear"].bias,
        ("norm", "scale"): model["norm"].weight,
        ("norm", "bias"): model["norm"].bias,
    }
    ours = traverse_util.unflatten_dict({path: jnp.array(p.detach().numpy()) for path, p in theirs.items()})
    optimizer = make_optimizer(optim, lambda _: optim.lr)
    state = optimizer.init(ours)
    torch_optimizer = make_torch_optimizer(model, optim)
    for _ in range(4):
        gradients = {path: rng.normal(size=parameter.shape) for path, parameter in theirs.items()}
        tree = traverse_util.unflatten_dict({path: jnp.array(gradient) for path, gradient in gradients.items()})
        updates, state = optimizer.update(tree, state, ours)
        ours = optax.apply_updates(ours, updates)
        for path, parameter in theirs.items():
            parameter.grad = torch.tensor(gradients[path])
        torch_optimizer.step()
    for path, array in traverse_util.flatten_dict(ours).items():
        np.testing.assert_allclose(array, theirs[path].detach(), rtol=1e-9)


@pytest.mark.parametrize("hflip", [0.0, 1.0])
def test_torchs_pipeline_gives_the_images_and_objects_that_ours_reads(shapes_dir, hflip):
    dataset = load_coco(shapes_dir, "train2017")
    images = TorchImages(dataset, np.arange(len(dataset)), hflip)
    for i, (image, target) in enumerate(images):
        truth, masks, pixels = dataset.annotations(i), dataset.masks(i), dataset.read_image(i)
        boxes = truth.boxes
        if hflip:
            masks, pixels = masks[:, :, ::-1], pixels[:, ::-1]
            boxes = np.stack([64 - boxes[:, 2], boxes[:, 1], 64 - boxes[:, 0], boxes[:, 3]], axis=1)
        assert type(image) is type(target["boxes"]) is torch.Tensor
        np.testing.assert_array_equal(target["labels"], truth.labels)
        np.testing.assert_allclose(target["boxes"], boxes, atol=1e-4)
        np.testing.assert_array_equal(target["masks"], masks)
        # Two decoders of JPEG.
        assert np.abs(image.permute(1, 2, 0).numpy() * 255 - pixels).max() <= 4


def test_options_that_torchvision_lacks_are_refused_by_name(options):
    trained_pair.check_options(options)
    optim = dataclasses.replace(options.optim, ema_decay=0.9)
    model = dataclasses.replace(options.model, mask_loss="dice")
    data = dataclasses.replace(options.data, resize="pillow")
    with pytest.raises(UserError, match=r"model\.mask_loss=dice .*, optim\.ema_decay=0\.9 .*, data\.resize=pillow"):
        trained_pair.check_options(dataclasses.replace(options, optim=optim, model=model, data=data))


def test_every_option_that_is_followed_exists():
    parts = {part.prefix: part for part in (Options(), Options().model, Options().optim, Options().data)}
    for prefix, names in trained_pair.FOLLOWED.items():
        assert set(names.split()) <= {field.name for field in dataclasses.fields(parts[prefix])}


def test_a_paired_test_has_the_values_of_the_textbook():
    test = paired_test("x", [2.0, 4.0, 6.0], [1.0, 2.0, 3.0])  # differences 1, 2, 3
    t = 2 / (1 / 3**0.5)
    assert test.difference == 2
    assert test.p == pytest.approx(1 - t / (t**2 + 2) ** 0.5)  # Student's distribution with two degrees of freedom
    assert test.interval == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), rel=1e-6)
    assert test.detectable == pytest.approx((4.302653 + 1.060660) / 3**0.5, rel=1e-6)
    assert test.spreads == pytest.approx(2 / 2.5**0.5)  # variances 4 and 1
    assert paired_test("x", [1.0, 2.0], [1.0, 2.0]).p == 1
    assert np.isnan(paired_test("x", [1.0], [2.0]).p)


def test_holms_correction():
    tests = [paired_test("x", [1.0], [1.0])._replace(p=p) for p in (0.03, 0.01, 0.04)]
    assert [test.adjusted_p for test in adjust(tests)] == pytest.approx([0.06, 0.03, 0.06])


def test_the_late_mean_is_that_of_the_last_half_of_the_steps():
    curve = [{"step": step, "loss": float(step)} for step in range(1, 11)]
    assert late_mean(curve, "loss") == 8


def test_a_run_that_was_interrupted_has_the_results_of_one_that_was_not(tmp_path):
    """It logs what it has of an interval when it stops, and the rest of it later."""
    whole = [{"step": step, **dict.fromkeys(TERMS, float(step))} for step in (10, 20, 30, 40)]
    parts = [{"step": 31, **dict.fromkeys(TERMS, 4.0)}, {"step": 40, **dict.fromkeys(TERMS, 44.0)}]
    interrupted = [*whole[:3], *parts]  # 1 x 4 + 9 x 44 is 10 x 40
    assert late_mean(interrupted, "loss") == pytest.approx(late_mean(whole, "loss")) == 35
    results = PairedResults()
    for curve in (whole, interrupted):
        run = {"curve": curve, "metrics": dict.fromkeys(("bbox_AP", "segm_AP"), 0.5), "seconds": 1.0}
        results.add(run, run)
    results.write_plot(tmp_path / "plot.svg")


def _results(mask_factor: float) -> PairedResults:
    """Return three seeds whose losses are drawn around 1."""
    rng = np.random.default_rng(0)
    results = PairedResults()
    for _ in range(3):
        runs = []
        for factor in (mask_factor, 1.0):
            curve = [{"step": step} | {term: rng.normal(1, 0.1) for term in TERMS} for step in range(1, 41)]
            curve = [point | {"loss_mask": point["loss_mask"] * factor} for point in curve]
            runs.append({"curve": curve, "metrics": dict.fromkeys(("bbox_AP", "segm_AP"), 0.5), "seconds": 1.0})
        results.add(*runs)
    return results


def test_a_difference_is_found_only_where_there_is_one(tmp_path):
    assert not _results(1.0).differs
    results = _results(0.5)
    assert [test.name for test in results.tests if test.differs] == ["loss_mask"]
    assert "differ: loss_mask" in results.table()
    results.write_json(tmp_path / "x.json")
    results.write_html(tmp_path / "x.html", "title <of> it")
    results.write_plot(tmp_path / "x.svg")
    assert len(json.loads((tmp_path / "x.json").read_text())["torchvision"]) == 3
    text = (tmp_path / "x.html").read_text()
    assert "title &lt;of&gt; it" in text
    assert "Beyond chance differ: loss_mask" in text


def _stop(*_, **__):
    raise KeyboardInterrupt


def _halve_mask_loss(monkeypatch):
    losses = MaskRCNN.losses

    def halved(self, *args):
        terms, metrics = losses(self, *args)
        return terms | {"loss_mask": terms["loss_mask"] / 2}, metrics

    monkeypatch.setattr(MaskRCNN, "losses", halved)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --images"),
        (["--images=x", "--config=shapes"], "--plot are for --train"),
        (["--images=x", "--coco_dir=y"], "--plot are for --train"),
        (["--images=x", "--workdir=y", "--weights=z"], "leave out --weights"),
        (["--train"], "--train needs --config"),
        (["--train", "--config=shapes", "--workdir=x", "--images=y"], "leave out --weights and --images"),
        (["--train", "--config=shapes", "--workdir=x"], r"lacks model\.roi_aligned=True \(set it to False\)"),
    ],
)
def test_the_tool_says_what_is_missing_or_of_no_use(arguments, message):
    with pytest.raises(UserError, match=message):
        compare_torch.main(parse(compare_torch, arguments))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ModelOptions(backbone="convnext_tiny"), "backbone convnext_tiny; only the stages of ResNets"),
        (ModelOptions(roi_aligned=True), "roi_aligned=True, which torchvision lacks"),
        (ModelOptions(smooth_l1_beta=0.0), r"model.smooth_l1_beta=0.0, which torchvision's losses lack.*--steps=0"),
    ],
)
def test_runs_that_torchvision_cannot_repeat_are_refused(model, message):
    with pytest.raises(UserError, match=message):
        compare_torch.check_run(model, "runs/x", with_losses=True)
    compare_torch.check_run(ModelOptions(smooth_l1_beta=0.0), "runs/x", with_losses=False)


@pytest.mark.slow
def test_both_sides_train_once_and_a_halved_loss_shows(options, tmp_path, monkeypatch):
    sound, faulty = tmp_path / "sound", tmp_path / "faulty"
    with monkeypatch.context() as patch:
        patch.setattr(trained_pair, "train_torchvision", _stop)
        with pytest.raises(KeyboardInterrupt):
            trained_pair.train_pairs(options, sound, 1)
    interrupted = json.loads((sound / "seed0/maskrcnn_jax/result.json").read_text())
    results = trained_pair.train_pairs(options, sound, 1)
    assert results.ours[0] == interrupted, "what was finished is not repeated"
    assert "One seed says nothing" in results.table()
    ours, theirs = results.ours[0]["curve"], results.theirs[0]["curve"]
    assert [point["step"] for point in ours] == [point["step"] for point in theirs] == [1, 2, 3, 4]
    # The same weights: the first losses differ only by the order of the images and the samples.
    for term, tolerance in {"loss_objectness": 0.01, "loss_classifier": 0.05, "loss_mask": 0.02}.items():
        assert ours[0][term] == pytest.approx(theirs[0][term], rel=tolerance), term

    with monkeypatch.context() as patch:
        patch.setattr(trained_pair.mr, "train", _stop)
        patch.setattr(trained_pair, "train_torchvision", _stop)
        assert trained_pair.train_pairs(options, sound, 1).table() == results.table()
    with pytest.raises(UserError, match="other options: batch_size 16"):
        trained_pair.train_pairs(dataclasses.replace(options, batch_size=16), sound, 1)

    shutil.copytree(sound, faulty, ignore=shutil.ignore_patterns("maskrcnn_jax"))
    _halve_mask_loss(monkeypatch)
    tests = {test.name: test for test in trained_pair.train_pairs(options, faulty, 1).tests}
    assert tests["loss_mask"].ours[0] == pytest.approx(tests["loss_mask"].theirs[0] / 2, rel=0.05)
    assert tests["loss_objectness"].ours[0] == pytest.approx(tests["loss_objectness"].theirs[0], rel=0.05)
