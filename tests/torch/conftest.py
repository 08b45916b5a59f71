"""Seeds for every test of this folder."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeds():
    torch.manual_seed(0)
