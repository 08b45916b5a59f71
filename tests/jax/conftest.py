"""float64 for every test of this folder: the oracle is the uncut batch in float64."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield
