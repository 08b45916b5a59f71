"""float64, seeds, and the warnings of the trainer's own libraries, for every test of this folder."""

import gc

import pytest
import torch


@pytest.fixture(autouse=True)
def _in_float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module", autouse=True)
def _freed():
    """Trainers and their loaders are cycles; the next file is to find none."""
    yield
    gc.collect()
