"""What all tests of the Hugging Face Trainer share."""

import os

import pytest

# Before the import: nothing is looked up on a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

# Models are tiny, and threads that wait for each other cost more than they do.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def float64():
    """Models, inputs and losses are float64, as their oracle is."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
