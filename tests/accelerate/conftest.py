"""Each test has an Accelerate that nobody has used before, and one thread."""

import pytest
from tests.accelerate.scripts import forget


@pytest.fixture(autouse=True)
def _unused(one_thread):
    forget()
    yield
    forget()
