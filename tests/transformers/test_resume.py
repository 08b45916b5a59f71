"""The example of the Trainer, killed and started again, comes to the same weights."""

from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401  The first optimizer imports it, which costs seconds in a child.
from tests.lives import assert_resumed, lives

EXAMPLE = Path(__file__).parents[2] / "examples" / "resume_trainer.py"


@pytest.mark.proves_itself
@pytest.mark.thorough("seven short trainings")
def test_killed_and_resumed(tmp_path):
    assert_resumed(lives(EXAMPLE, tmp_path, 0, 5, ["loss", "file"]))


@pytest.mark.proves_itself
@pytest.mark.thorough("three short trainings")
def test_killed_after_its_last_checkpoint(tmp_path):
    assert_resumed(lives(EXAMPLE, tmp_path, None, 1, ["line"]))
