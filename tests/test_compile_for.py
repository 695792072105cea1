"""The compiler's text and what is read from it, on programs small enough to count by hand; then a real compilation."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from maskrcnn_jax.errors import UserError
from tests.children import PATIENCE
from tests.compiled_text import LOOPS, ROOT, ROWS, TABLE, program
from tools.compiling.analysis import analyse, notes, roofline
from tools.compiling.compiler import ROOT as PROJECT
from tools.compiling.compiler import Compiled, check_installed
from tools.compiling.flops import products
from tools.compiling.hlo import Array, parse, parse_shape
from tools.compiling.loops import executions, trip_count, uncounted_loops
from tools.compiling.memory import largest_buffers, memory_by_kind
from tools.compiling.sweep import Fit, largest_that_fits
from tools.compiling.targets import CHIPS, parse_target
from tools.compiling.traffic import traffic


def moved(*lines: str, before: str = "") -> int:
    """Return the traffic of the last instruction of a program."""
    module = program(*lines, before=before)
    instruction = list(module.entry.instructions.values())[-1]
    return traffic(module, instruction, module.entry)


def test_shapes_are_as_large_as_their_tiles():
    cases = {
        "f32[268569,4]{1,0:T(8,128)}": 137_510_912,  # XLA's own figures
        "u8[4,800,1344,3]{2,1,3,0:T(32,128)(4,1)}": 13_516_800,
        "f32[3,5]{0,1:T(8,128)}": 8 * 128 * 4,
        "bf16[4,100]{1,0:T(4,128)(2,1)}": 4 * 128 * 2,
        "pred[5]{0:T(512)}": 512,
        "f32[7]": 28,
        "s4[7,2]{1,0}": 7,
        "f32[]": 4,
    }
    for text, size in cases.items():
        shape, end = parse_shape(text)
        assert isinstance(shape, Array) and shape.padded_bytes == size, text
        assert end == len(text)
    assert parse_shape("f32[3,5]{0,1:T(8,128)S(1)}")[0].hbm_bytes == 0
    shape, _ = parse_shape("((f32[2], s32[]), token[])")
    assert [str(shape[0][0]), shape[1].padded_bytes] == ["f32[2]", 0]


def test_nested_loops_run_as_often_as_their_counters_say():
    module = parse(LOOPS)
    outer, inner = module.entry.instructions["m.while"], module.computations["outer_body"].instructions["e.while"]
    assert trip_count(module, outer, module.entry) == 3  # 0, 3, 6
    assert trip_count(module, inner, module.computations["outer_body"]) == 4
    times = {execution.instruction.name: execution.times for execution in executions(module, lambda *_: 0)}
    assert (times["p.0"], times["e.copy"], times["changed"]) == (1, 3, 12)
    assert not uncounted_loops(module)


def test_the_compilers_own_count_is_believed():
    text = LOOPS.replace("body=%outer_body", 'body=%outer_body, backend_config={"known_trip_count":{"n":"5"}}')
    module = parse(text)
    assert trip_count(module, module.entry.instructions["m.while"], module.entry) == 5


def test_a_loop_that_ends_by_its_data_is_told_of():
    text = LOOPS.replace("compare(%nine, %d.i), direction=GT", "custom-call(%d.i)")
    costs = analyse(parse(text), ROOT, "float32")
    assert [loop.trips for loop in costs.loops] == [None, 4]
    assert "10 are assumed" in notes(costs, "float32")[0]


def test_loops_multiply_traffic_and_collectives():
    costs = analyse(parse(LOOPS), ROOT, "float32")
    # In each round the inner loop reads a slice, then changes it in place; the outer one copies the table.
    assert costs.traffic == 3 * 2 * TABLE + 12 * (ROWS + 2 * ROWS)
    (collective,) = costs.collectives
    assert (collective.op, collective.dtype, collective.in_loop) == ("all-reduce", "f32", True)
    assert (collective.bytes, collective.times, collective.places) == (12 * 4, 12, ("maskrcnn_jax/ops/a.py:7",))
    assert any("all-reduce of f32 inside a loop" in warning for warning in costs.warnings)
    assert [(loop.place, loop.trips, loop.traffic) for loop in costs.loops] == [
        ("m.while", 3, costs.traffic),
        ("maskrcnn_jax/ops/a.py:7", 4, 36 * ROWS),
    ]


def test_large_copies_inside_loops_are_told_of():
    assert not any("copied" in warning for warning in analyse(parse(LOOPS), ROOT, "float32").warnings)
    large = analyse(parse(LOOPS.replace("[1024,128]", "[102400,128]")), ROOT, "float32").warnings
    assert any(
        "f32[102400,128] is copied 3 times a step, inside the loop at m.while, for maskrcnn_jax/ops/a.py:7" in x
        for x in large
    )


def test_only_what_is_sliced_or_gathered_is_read():
    table = "%t = f32[1000,128]{1,0} parameter(0)"
    index = "%i = s32[10]{0} parameter(1)"
    gather = "%g = f32[10,128]{1,0} gather(%t, %i), offset_dims={1}"
    assert moved(table, index, gather) == 2 * 10 * 128 * 4 + 10 * 4
    assert moved(table, "%s = f32[5,128]{1,0} slice(%t), slice={[0:5], [0:128]}") == 2 * 5 * 128 * 4
    assert moved(table, "%s = f32[5,128]{1,0:S(1)} slice(%t), slice={[0:5], [0:128]}") == 5 * 128 * 4
    assert moved(table, "%n = f32[1000,128]{1,0} negate(%t)") == 2 * 1000 * 128 * 4


def test_what_lies_on_the_chip_is_no_traffic():
    near = "%t = f32[1000,128]{1,0:S(1)} parameter(0)"
    assert moved(near, "%n = f32[1000,128]{1,0:S(1)} negate(%t)") == 0
    assert moved(near, "%n = f32[1000,128]{1,0} negate(%t)") == 512_000
    assert moved(near, "%b = f32[128,1000]{1,0} bitcast(%t)") == 0
    start = "(f32[1000,128]{1,0}, f32[1000,128]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%t)"
    assert moved(near, f"%c = {start}") == 512_000
    assert moved(near, f"%c = {start}", "%d = f32[1000,128]{1,0} copy-done(%c)") == 0


def test_updates_in_place_move_what_they_change():
    lines = ["%t = f32[1000,128]{1,0} parameter(0)", "%u = f32[2,128]{1,0} parameter(1)", "%i = s32[] parameter(2)"]
    update = "%d = f32[1000,128]{1,0} dynamic-update-slice(%t, %u, %i, %i)"
    assert moved(*lines, update) == 3 * 2 * 128 * 4 + 2 * 4
    scatter = "%d = f32[1000,128]{1,0} scatter(%t, %j, %u), to_apply=%add"
    assert moved(*lines, "%j = s32[2]{0} parameter(3)", scatter) == 3 * 2 * 128 * 4 + 2 * 4


def test_asynchronous_operations_count_once():
    fetch = "%fetch (f.0: f32[8,128]) -> f32[2,128] {\n  %f.0 = f32[8,128]{1,0} parameter(0)\n"
    fetch += "  ROOT %f.1 = f32[2,128]{1,0:S(1)} slice(%f.0), slice={[0:2], [0:128]}\n}\n"
    lines = [
        "%t = f32[8,128]{1,0} parameter(0)",
        "%s = ((f32[8,128]{1,0}), f32[2,128]{1,0:S(1)}, s32[]{:S(2)}) async-start(%t), calls=%fetch",
    ]
    assert moved(*lines, before=fetch) == 2 * 128 * 4
    assert moved(*lines, "%d = f32[2,128]{1,0:S(1)} async-done(%s)", before=fetch) == 0


def test_the_costly_branch_of_a_conditional_counts():
    branch = "%{0} ({0}.0: f32[{1}]) -> f32[{1}] {{\n  %{0}.0 = f32[{1}]{{0}} parameter(0)\n"
    branch += "  ROOT %{0}.1 = f32[{1}]{{0}} negate(%{0}.0)\n}}\n\n"
    module = program(
        "%p = s32[] parameter(0)",
        "%few = f32[10]{0} parameter(1)",
        "%all = f32[40]{0} parameter(2)",
        "ROOT %c = f32[] conditional(%p, %few, %all), branch_computations={%a, %b}",
        before=branch.format("a", 10) + branch.format("b", 40),
    )
    assert analyse(module, ROOT, "float32").traffic == 2 * 40 * 4


def test_flops_leave_out_padding_and_gaps():
    def flops(left: str, right: str, result: str, window: str, labels: str) -> int:
        module = program(
            f"%l = {left} parameter(0)",
            f"%r = {right} parameter(1)",
            f"ROOT %c = {result} convolution(%l, %r), window={{{window}}}, dim_labels={labels}",
        )
        ((_, count, _),) = products(module, module.entry.root, module.entry)
        return count

    # 5 x 5 cells, 3 x 3 window, padding 1: along an axis 3 + 3 + 3 + 2 + 2 products.
    labels = "b01f_01io->b01f"
    same = flops("bf16[2,5,5,7]", "bf16[3,3,7,4]", "bf16[2,5,5,4]", "size=3x3 pad=1_1x1_1", labels)
    assert same == 2 * 2 * 13 * 13 * 7 * 4
    strided = flops("bf16[2,5,5,7]", "bf16[3,3,7,4]", "bf16[2,3,3,4]", "size=3x3 stride=2x2 pad=1_1x1_1", labels)
    assert strided == 2 * 2 * 7 * 7 * 7 * 4
    # Its gradient with respect to the input has as many products: the zeros between the values do not count.
    backward = "size=3x3 pad=1_1x1_1 lhs_dilate=2x2 rhs_reversal=1x1"
    assert flops("bf16[2,3,3,4]", "bf16[3,3,4,7]", "bf16[2,5,5,7]", backward, labels) == strided
    dot = program(
        "%l = bf16[3,5] parameter(0)",
        "%r = bf16[5,4] parameter(1)",
        "ROOT %d = bf16[3,4] dot(%l, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
    )
    ((_, count, dtypes),) = products(dot, dot.entry.root, dot.entry)
    assert (count, dtypes) == (2 * 3 * 5 * 4, {"bf16"})


def test_libraries_on_gpus_compute_as_many_flops():
    call = 'ROOT %c = ({0}, u8[9]) custom-call(%l, %r), custom_call_target="{1}"'
    window = "window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f"
    images, kernel, result = "bf16[2,5,5,7]", "bf16[4,3,3,7]", "bf16[2,3,3,4]"
    for target, left, right, output in (
        ("__cudnn$convForward", images, kernel, result),
        ("__cudnn$convBackwardInput", result, kernel, images),
        ("__cudnn$convBackwardFilter", images, result, kernel),
    ):
        lines = f"%l = {left} parameter(0)", f"%r = {right} parameter(1)", f"{call.format(output, target)}, {window}"
        module = program(*lines)
        assert [flops for _, flops, _ in products(module, module.entry.root, module.entry)] == [2 * 2 * 7 * 7 * 7 * 4]
    config = 'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}'
    gemm = f"{call.format('bf16[3,4]', '__cublas$lt$matmul')}, {config}"
    module = program("%l = bf16[3,5] parameter(0)", "%r = bf16[5,4] parameter(1)", gemm)
    assert [flops for _, flops, _ in products(module, module.entry.root, module.entry)] == [2 * 3 * 5 * 4]


def test_large_products_in_another_dtype_are_told_of():
    module = program(
        "%l = f32[1000,1000] parameter(0)",
        "ROOT %d = f32[1000,1000] dot(%l, %l), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
    )
    assert not analyse(module, ROOT, "float32").warnings
    (warning,) = analyse(module, ROOT, "bfloat16").warnings
    assert "matrix product of f32, not bf16, 2.0 GFLOP" in warning


def test_memory_is_told_by_kind():
    buffers = """\
BufferAssignment:
allocation 0: size 512, thread-local:
allocation 1: size 4096, constant:
allocation 2: size 1000, parameter 0, shape |f32[250]| at ShapeIndex {}, maybe-live-out:
allocation 3: size 500, parameter 1, shape |f32[125]| at ShapeIndex {}:
allocation 4: size 64, maybe-live-out:
allocation 5: size 20000, preallocated-temp:
allocation 6: size 300, color 1, preallocated-temp:
"""
    live = """\
  Live ranges at 17 (peak):
    e.copy{}: 9000 bytes (cumulative: 9000 bytes)
    changed{}: 8000 bytes (cumulative: 17000 bytes)
    e.while{1}: 1000 bytes (cumulative: 18000 bytes)
    p.1{}: 512 bytes (cumulative: 18512 bytes)
"""
    compiled = Compiled(LOOPS, buffers, live, None, False)
    assert memory_by_kind(compiled) == {
        "arguments": 1500,
        "aliased": 1000,
        "outputs": 64,
        "constants": 4096,
        "temporaries": 20000,
        "code": None,
        "total": 25660,
    }
    assert memory_by_kind(compiled._replace(code_bytes=340))["total"] == 26000
    found = [
        (buffer.num_bytes, buffer.shape, buffer.place) for buffer in largest_buffers(parse(LOOPS), compiled, ROOT, 9)
    ]
    assert found[:2] == [
        (10000, "f32[1024,128]", "maskrcnn_jax/ops/a.py:7"),  # the copy too, because the loop there uses it
        (8000, "f32[1024,128]", "changed"),
    ]
    assert all(size != 512 for size, *_ in found), "what lies on the chip takes no HBM"


def test_topologies_are_read():
    assert parse_target("v5e:4x4").chips == 16
    target = parse_target("v5p:2x2x4", 2)
    assert (target.chips, target.groups, str(target)) == (32, 2, "v5p:2x2x4 (2 slices)")
    target = parse_target("h100:3x8")
    assert (target.chips, target.groups, target.chip.platform) == (24, 3, "cuda")
    for text in ("v5e", "v5e:4", "v5e:4x", "v5p:4x4", "v1:2x2", "v5e:0x4"):
        with pytest.raises(UserError, match="--topology"):
            parse_target(text)


def test_the_narrowest_part_limits_the_speed():
    costs = analyse(parse(LOOPS), ROOT, "float32")
    limits = roofline(costs, parse_target("v5e:2x2"), 4)
    assert limits["hbm"] == pytest.approx(4 * CHIPS["v5e"].hbm / costs.traffic)
    assert limits["network"] == pytest.approx(4 * CHIPS["v5e"].links / (1.5 * 48))
    nodes = roofline(costs, parse_target("h100:2x8"), 4)["network"]
    assert nodes == pytest.approx(4 / (48 * (1.75 / CHIPS["h100"].links + 1 / 8 / CHIPS["h100"].network)))
    assert roofline(costs, parse_target("v5e:1x1"), 4).keys() == {"hbm"}


@pytest.mark.parametrize("largest", [0, 1, 2, 3, 7, 8, 40])
@pytest.mark.parametrize("curve", [lambda n: 5 + 10 * n, lambda n: 10 * n if n < 5 else 50 + n, lambda n: 7])
def test_the_largest_batch_that_fits_is_found(largest, curve):
    asked = []

    def measure(number):
        asked.append(number)
        return Fit(number <= largest, curve(number))

    assert largest_that_fits(measure, limit=curve(largest)) == largest
    assert len(asked) == len(set(asked)) <= 11


@pytest.fixture(scope="session")
def libtpu() -> str:
    """Folder of libtpu, TPUs' compiler, installed for JAX's version if it is not there; skips where it cannot be."""
    if spec := importlib.util.find_spec("libtpu"):
        return str(Path(spec.origin).parent.parent)
    requirement = next(
        found[1] for line in importlib.metadata.requires("jax") if (found := re.match(r"(libtpu==[\d.*]+).*tpu", line))
    )
    folder = Path.home() / ".cache" / "maskrcnn_jax" / requirement.replace("*", "x")
    if not folder.is_dir():
        unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            f"--target={unfinished}",
            requirement,
        ]
        installed = subprocess.run(command, capture_output=True, text=True)
        if installed.returncode:
            shutil.rmtree(unfinished, ignore_errors=True)
            pytest.skip(f"{requirement} cannot be installed: {installed.stderr.strip().splitlines()[-1]}")
        unfinished.rename(folder)
    return str(folder)


def report(libtpu: str, file: Path, *options: str) -> dict:
    """Run the tool on a small network of small images."""
    small = [f"--config.data.{name}=64" for name in ("short_side", "long_side")]
    command = [sys.executable, "tools/compile_for.py", "--config=shapes", *small, "--num_objects=8", f"--json={file}"]
    done = subprocess.run(
        [*command, "--config.model.dtype=bfloat16", *options],
        cwd=PROJECT,
        env=os.environ | {"PYTHONPATH": libtpu},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert "Compiled, not run" in done.stdout
    return json.loads(file.read_text())


@pytest.mark.slow
def test_the_training_step_compiles_for_tpus_and_devices_meet_in_no_loop(tmp_path, libtpu):
    """One test, so that one process installs libtpu."""
    one = report(libtpu, tmp_path / "one.json", "--topology=v5e:2x2", "--config.batch_size=8")
    two = report(libtpu, tmp_path / "two.json", "--topology=v5e:2x2", "--slices=2", "--config.batch_size=16")
    for found in (one, two):
        assert found["fits"] and found["images_per_chip"] == 2
        assert found["memory_bytes"]["temporaries"] > 0 and found["hbm_traffic_bytes"] > 1e6
        assert found["collectives"] and not any(item["in_loop"] for item in found["collectives"])
        places = [loop["place"] for loop in found["loops"]]
        assert any(place.startswith("maskrcnn_jax/ops/nms.py:") for place in places), "the form for TPUs"
        assert not any(place.startswith("maskrcnn_jax/ops/cpu/nms.py:") for place in places)
    # As many images a chip, so the same work, in convolutions that XLA pads a little differently.
    assert two["flops_per_image"] == pytest.approx(one["flops_per_image"], rel=0.05)
    assert {item["op"] for item in two["collectives"]} > {"send"}, "slices are connected by a network"
    # The parameters' gradients, in float32; at most a bias more or less.
    (gradients,) = (item for item in one["collectives"] if item["op"] == "all-reduce" and item["dtype"] == "f32")
    assert gradients["bytes"] > 8e6


def test_what_is_missing_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "jax\[tpu\]=='):
        check_installed(parse_target("v5e:2x2"))
    with pytest.raises(UserError, match=r'pip install "jax\[cuda12\]=='):
        check_installed(parse_target("h100:1x8"))
