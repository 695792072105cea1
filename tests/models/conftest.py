"""The tiny model, built and compiled once for all tests."""

import pytest

from tests.models.tiny import compiled, tiny_model


@pytest.fixture(scope="session")
def tiny():
    """The tiny Mask R-CNN with frozen norms."""
    return tiny_model()


@pytest.fixture(scope="session")
def tiny_functions(tiny):
    """losses(batch, key) and detect(images, sizes), compiled; then the jitted functions and the tiny model's state."""
    return compiled(tiny)
