"""What Lightning warns of in every small training on a CPU, and one reference for all tests."""

import logging

import pytest
import torch

# Each is about speed, about PyTorch's own names, or about what a test does on purpose.
EXPECTED = (
    "ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    "ignore:The '.*dataloader' does not have many workers",
    "ignore:The number of training batches .* is smaller than the logging interval",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:It is recommended to use `self.log\\(.*sync_dist=True",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/lightning" in item.path.as_posix():
            for text in EXPECTED:
                item.add_marker(pytest.mark.filterwarnings(text))


@pytest.fixture(autouse=True, scope="module")
def _float64_in_one_thread():
    """Numbers are logged in the default dtype; threads would wait for each other."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture(autouse=True)
def _quiet():
    torch.manual_seed(0)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def uncut(_float64_in_one_thread):
    """Lightning alone, on whole batches of 20 of the 46 rows."""
    from tests.lightning.nets import Run

    return Run(20)


@pytest.fixture(scope="module")
def own(_float64_in_one_thread):
    """Lightning's own accumulation of 5 batches of 4 rows."""
    from tests.lightning.nets import Run

    return Run(4, 5)
