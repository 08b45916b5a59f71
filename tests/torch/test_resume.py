"""The example of PyTorch, killed and started again, comes to the same weights."""

from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401  The first optimizer imports it, which costs seconds in a child.
from tests.lives import assert_resumed, lives
from tests.tiers import tiered

EXAMPLE = Path(__file__).parents[2] / "examples" / "resume_torch.py"

pytestmark = [pytest.mark.proves_itself, pytest.mark.usefixtures("one_thread")]

# What the example needs in its checkpoint -> the same without it.
NEEDED = {
    "random states": ('torch.set_rng_state(state["random"])', "pass"),
    "weights": ('"model": model, ', ""),
    "the optimizer": ('"optimizer": optimizer, ', ""),
    "the schedule": ('"schedule": schedule, ', ""),
    "the place in the data": ("batches(updates)", "batches(0)"),
}


def test_killed_and_resumed(tmp_path):
    assert_resumed(lives(EXAMPLE, tmp_path, 0, 3, ["loss", "line", "file"]))


def test_killed_after_its_last_checkpoint(tmp_path):
    assert_resumed(lives(EXAMPLE, tmp_path, None, 1, ["line"]))


@pytest.mark.thorough("sixty short trainings")
@pytest.mark.parametrize("seed", range(1, 7))
def test_killed_and_resumed_at_many_places(seed, tmp_path):
    assert_resumed(lives(EXAMPLE, tmp_path, seed, 8, ["loss", "line", "file"]))


@pytest.mark.parametrize("name", tiered(NEEDED, ["random states"], "other parts of a checkpoint"))
def test_each_part_of_the_checkpoint_is_needed(name, tmp_path):
    old, new = NEEDED[name]
    text = EXAMPLE.read_text()
    assert text.count(old) == 1
    forgetful = tmp_path / "forgetful.py"
    forgetful.write_text(text.replace(old, new))
    whole, *_, last = found = lives(forgetful, tmp_path, 0, 1, ["loss"])
    assert last.begins_after > 0
    assert last.end != whole.end
    with pytest.raises(AssertionError):
        assert_resumed(found)
