"""float64, one thread and seeds for every test of this folder, and warnings of TRL."""

import gc
import os

import pytest

# Before the import: nothing is looked up on a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Else Accelerate sets it on several processes, and warns.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

_OF_TRL = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name.startswith("test_trl"):
            item.add_marker(pytest.mark.filterwarnings(_OF_TRL))


@pytest.fixture(scope="module", autouse=True)
def _in_float64():
    # Models are tiny, and threads that wait for each other cost more than they do.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
    # Trainers and their loaders are cycles; the next file is to find none.
    gc.collect()


@pytest.fixture(autouse=True)
def _seeds():
    """And the dtype again, which a head may have changed for itself."""
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float64)
