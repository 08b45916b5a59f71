"""What a user may save of this library goes on after a copy as it would have without one."""

import copy
import pickle

import pytest

from virtualbatch import Auto, NoiseScale
from virtualbatch.noise.estimate import WindowStats

COPIES = [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))]


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle"])
def test_a_noise_scale_goes_on(copied):
    noise = NoiseScale(decay=0.9)
    for mean_square in (3.0, 3.2, 2.8):
        noise.update(WindowStats(64, 4, mean_square, 1.0))
    found = copied(noise)
    for each in (noise, found):
        each.update(WindowStats(64, 4, 2.5, 1.0))
    assert found.estimate() == noise.estimate()
    assert found.windows == 4


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle"])
def test_an_auto_keeps_the_size_that_memory_left(copied):
    size = Auto(memory_limit="1GiB", grow_after=2)
    size.asked(32).shrink(32)
    found = copied(size).asked(32)
    # A size of its own: what one of them learns is no news to the other.
    size.asked(32).shrink(16)
    assert (found.rows, size.asked(32).rows) == (16, 8)
    found.succeeded()
    found.succeeded()
    assert found.rows == 32
