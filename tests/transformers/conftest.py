"""Warnings that trainers cause inside the libraries they stand on, and their tests do not."""

import pytest

_OF_TRL = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name.startswith("test_trl"):
            item.add_marker(pytest.mark.filterwarnings(_OF_TRL))
