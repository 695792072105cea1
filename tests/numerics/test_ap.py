"""AP of a model that was trained here, and of torchvision's model with its exported weights."""

import pytest

torch = pytest.importorskip("torch")
from maskrcnn_jax.config import load_config, to_options  # noqa: E402
from maskrcnn_jax.data.shapes import write_dataset  # noqa: E402
from maskrcnn_jax.run_folder import load_run  # noqa: E402
from maskrcnn_jax.training.loop import train  # noqa: E402
from maskrcnn_jax.weights.convert import to_torchvision  # noqa: E402
from maskrcnn_jax.weights.files import read_arrays, write_arrays  # noqa: E402
from tools.comparison.ap import compare_ap  # noqa: E402
from tools.comparison.comparison_page import Comparison  # noqa: E402
from tools.torchvision_reference import build_reference, load_reference  # noqa: E402


@pytest.mark.slow
def test_an_exported_run_has_the_same_ap_in_torchvision(optimized, tmp_path):
    """Overfitted to eight images, so that there is an AP after a minute."""
    write_dataset(tmp_path / "shapes", num_train=8, num_val=1, image_size=96, seed=3)
    config = load_config("shapes")
    config.epochs, config.eval_every, config.log_every = 120, 0, 0
    config.optim.lr, config.optim.warmup_steps = 3e-3, 10
    config.data.update(coco_dir=str(tmp_path / "shapes"), eval_split="train2017", hflip=0.0)
    config.data.update(short_side=96, long_side=96, resize="float32", buckets="exact")
    config.eval_batch_size = 8
    config.model.update(roi_aligned=False, roi_sampling_ratio=2, stem_channels=16, stage_channels=16)
    options = to_options(config)
    train(options, tmp_path / "run", make_evaluate=lambda categories: None)

    model, categories, options = load_run(tmp_path / "run")
    write_arrays(tmp_path / "model.pth", to_torchvision(model))
    reference = build_reference(options.model, categories.num_classes, min_size=96, max_size=96)
    load_reference(reference, read_arrays(tmp_path / "model.pth"))
    result = Comparison()
    compare_ap(result, reference, model, options, categories)
    assert result.ok, result.table()
