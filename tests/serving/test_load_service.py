"""The tool that loads a service."""

import pytest

from maskrcnn_jax.commands.app import parse
from maskrcnn_jax.errors import UserError
from tests.serving.service import ColourPredictor, draw_regions, encoded, running
from tools import load_service as tool
from tools.load_service import load_service


def test_throughput_latency_batches_and_errors_are_those_of_the_clients():
    model = ColourPredictor()
    model.seconds = 0.05
    files = [encoded(draw_regions()), b"no image"]
    with running(model) as service:
        row = load_service(service.port, files, clients=4, seconds=1.0, max_batch=8)
    assert row.images_per_second * 1.0 == pytest.approx(sum(model.batches), rel=0.4)
    assert row.mean_batch == pytest.approx(sum(model.batches) / len(model.batches), rel=0.01)
    assert row.errors > 10, "every second file is no image"
    assert 0 < row.p50 <= row.p95 < 1
    assert len(row.memory) == 20 and min(row.memory) > 50


@pytest.mark.parametrize("sizes", ["abc", "", "1,3", "1,,8"])
def test_sizes_of_batches_that_the_service_refuses_are_refused_before_it_starts(sizes):
    with pytest.raises(UserError, match="--max_batch"):
        parse(tool, ["--workdir=.", "--images=.", f"--max_batch={sizes}"])
    assert parse(tool, ["--workdir=.", "--images=.", "--max_batch=1,4"]).max_batch == [1, 4]
