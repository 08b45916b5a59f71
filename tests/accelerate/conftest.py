"""Each test has an Accelerate that nobody has used before."""

import pytest
from tests.accelerate.scripts import forget


@pytest.fixture(autouse=True)
def _unused():
    forget()
    yield
    forget()
