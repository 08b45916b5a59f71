"""The example of Keras, killed and started again, comes to the same weights on each backend."""

from pathlib import Path

import keras
import pytest
from tests.lives import assert_resumed, lives_of_a_process

EXAMPLE = Path(__file__).parents[2] / "examples" / "resume_keras.py"


@pytest.mark.thorough("a process that imports Keras, and four of it that compile a model")
def test_killed_and_resumed(tmp_path):
    backend = keras.config.backend()
    assert_resumed(lives_of_a_process(EXAMPLE, tmp_path, 3, 2, "file", KERAS_BACKEND=backend))


@pytest.mark.thorough("a process that imports Keras, and three of it that compile a model")
def test_killed_after_its_last_checkpoint(tmp_path):
    backend = keras.config.backend()
    assert_resumed(lives_of_a_process(EXAMPLE, tmp_path, None, 1, "file", KERAS_BACKEND=backend))
