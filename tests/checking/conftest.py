"""The tests of the checker write small datasets as those of data/ do."""

from tests.data.conftest import dataset  # noqa: F401
