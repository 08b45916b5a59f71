"""The example of JAX, killed and started again, comes to the same weights."""

from pathlib import Path

import pytest
from tests.lives import assert_resumed, lives_of_a_process
from tests.tiers import tiered

EXAMPLE = Path(__file__).parents[2] / "examples" / "resume_jax.py"


@pytest.mark.parametrize("kills", tiered([1, 4], [1], "more lives of the same"))
def test_killed_and_resumed(kills, tmp_path):
    assert_resumed(lives_of_a_process(EXAMPLE, tmp_path, kills, kills, "file"))


@pytest.mark.thorough("a process that imports JAX, and three short trainings")
def test_killed_after_its_last_checkpoint(tmp_path):
    assert_resumed(lives_of_a_process(EXAMPLE, tmp_path, None, 1, "file"))
