"""Seeds for every test of this folder."""

import keras
import pytest


@pytest.fixture(autouse=True)
def _seeds():
    keras.utils.set_random_seed(0)
