"""What every test relies on: quiet and reproducible TensorFlow, reproducible hypothesis."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from virtualbatch.certify.proven import Proven, Seen
from virtualbatch.plan import planner
from virtualbatch.plan.timing import TimeBudget

# Read when TensorFlow is imported. oneDNN picks other summation orders on other machines.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"

# The helpers beside the tests are imported as `tests.oracle` and so on.
ROOT = str(Path(__file__).parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

settings.register_profile("reproducible", derandomize=True, deadline=None, print_blob=False)
settings.load_profile("reproducible")

from tests.tiers import refuse_a_tier_without_a_reason  # noqa: E402


def pytest_collection_modifyitems(items):
    refuse_a_tier_without_a_reason(items)


@pytest.fixture
def quick_plans(monkeypatch):
    """Plans that time each size once; what more of it gains is what benchmarks/plan.py measures."""
    monkeypatch.setattr(planner, "BUDGET", TimeBudget(rounds=1))


@pytest.fixture
def untimed_plans(monkeypatch):
    """Plans by memory alone, for tests that read no times."""
    monkeypatch.setattr(planner, "BUDGET", TimeBudget(seconds=0.0))


@pytest.fixture(scope="module")
def one_thread():
    """Threads of PyTorch that wait for each other spin where other processes have the cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def first_windows_are_known(request, monkeypatch):
    """No first window proves itself, but in tests of that: others count calls of the loss."""
    if request.node.get_closest_marker("proves_itself") is None:
        monkeypatch.setattr(Proven, "seen", lambda *args: Seen())
