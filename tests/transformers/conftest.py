"""float64 and seeds for every test of this folder."""

import gc

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def _in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    # Trainers and their loaders are cycles; the next file is to find none.
    gc.collect()


@pytest.fixture(autouse=True)
def _seeds():
    torch.manual_seed(0)
