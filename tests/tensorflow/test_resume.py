"""The example of TensorFlow, killed and started again, comes to the same weights."""

from pathlib import Path

import pytest
from tests.lives import assert_resumed, lives_of_a_process

EXAMPLE = Path(__file__).parents[2] / "examples" / "resume_tensorflow.py"


@pytest.mark.thorough("a process that imports TensorFlow, and four of it that trace a window")
def test_killed_and_resumed(tmp_path):
    assert_resumed(lives_of_a_process(EXAMPLE, tmp_path, 3, 2, "line"))


@pytest.mark.thorough("a process that imports TensorFlow, and three of it that trace a window")
def test_killed_after_its_last_checkpoint(tmp_path):
    assert_resumed(lives_of_a_process(EXAMPLE, tmp_path, None, 1, "line"))
