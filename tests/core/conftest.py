"""The search itself is tested here, with all the looks that it takes."""

import pytest


@pytest.fixture(autouse=True)
def _hurry():
    """In place of what makes the tests of engines short."""
