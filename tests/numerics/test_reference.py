"""The stand-ins for torchvision's compiled operators against torchvision's own fallback in plain torch."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from tools import torchvision_reference as reference  # noqa: E402

torchvision = reference.import_torchvision()


@pytest.mark.parametrize("sampling_ratio", [2, -1])
@pytest.mark.parametrize("aligned", [False, True])
def test_the_roi_align_of_the_reference_equals_torchvisions_inside_the_map(sampling_ratio, aligned):
    """torchvision's fallback does not tell samples beyond the map from those at its border, hence inside only."""
    rng = np.random.default_rng(0)
    features = torch.tensor(rng.normal(size=(2, 3, 14, 15)))
    corner = rng.uniform(0, 28, (10, 2))
    boxes = np.concatenate([rng.integers(0, 2, (10, 1)), corner, corner + rng.uniform(0, 25, (10, 2))], axis=-1)
    arguments = (features, torch.tensor(boxes), 0.25, 4, 5, sampling_ratio, aligned)
    fallback = reference.torch_fallback["roi_align"]
    # Both in float64; only the order of the additions differs.
    np.testing.assert_allclose(reference.roi_align(*arguments), fallback(*arguments), atol=1e-12)


def test_the_nms_of_the_reference_keeps_the_expected_boxes():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 5], [30, 0, 40, 10]])
    scores = torch.tensor([0.7, 0.6, 0.5, 0.9])
    assert torchvision.ops.nms(boxes, scores, 0.6).tolist() == [3, 0, 2]
    assert reference.greedy_nms(boxes, scores, 0.6).tolist() == [3, 0, 2]
