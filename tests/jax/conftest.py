"""float64 for every test of this folder: the oracle is the uncut batch in float64."""

import jax
import pytest

from virtualbatch.jax._remembered import _REMEMBERED


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def _no_sizes_of_other_tests():
    """A size that shrank is kept for a loss that is made anew, also by the next test."""
    for found in list(_REMEMBERED.values()):
        found.sizes.clear()


@pytest.fixture
def optimized():
    """Programs as users get them, for tests of their speed and memory (tests/run.py says why)."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)
