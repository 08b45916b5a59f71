"""Bad input at random: each call is right, or refused in words with nothing changed."""

import pytest
from tests.fuzz.runner import findings, load, run, seeds

# Wrong losses and weights are found by first windows that prove themselves.
pytestmark = pytest.mark.proves_itself


def test_bad_input_is_refused_in_words_or_right():
    found = run(load("keras"), seeds(0, 12))
    assert not findings(found), "\n".join(map(str, findings(found)))


@pytest.mark.thorough("ten seeds of bad input")
@pytest.mark.parametrize("seed", range(10))
def test_bad_input_of_many_seeds_is_refused_in_words_or_right(seed):
    found = run(load("keras"), seeds(seed, 60))
    assert not findings(found), "\n".join(map(str, findings(found)))
