"""The list of mutants: what it must hold, and that a mutant which nothing catches is told."""

from collections import Counter

import pytest
from tests.mutants.run import ROOT, Mutant, mutants, mutated, tried

MUTANTS = mutants()


def test_there_are_enough_in_every_part():
    parts = Counter(mutant.part for mutant in MUTANTS)
    assert len(MUTANTS) >= 60
    assert all(parts[part] >= 8 for part in ("core", "torch", "jax", "tensorflow", "keras"))
    assert {m.backend for m in MUTANTS if m.part == "keras"} == {"tensorflow", "torch", "jax"}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.part}: {mutant.name}")
def test_each_changes_one_place_and_names_tests(mutant):
    text = (ROOT / "src" / "virtualbatch" / mutant.file).read_text()
    compile(mutated(mutant, text), mutant.file, "exec")
    assert all((ROOT / test).exists() for test in mutant.tests)


def test_a_text_that_moved_is_refused():
    mutant = Mutant("core", "moved", "window/shares.py", "no such line", "", [])
    with pytest.raises(ValueError, match=r"Got 0 of 'no such line' in window/shares\.py"):
        mutated(mutant, "some other line")


@pytest.mark.thorough("starts pytest once more")
def test_a_mutant_that_changes_nothing_is_not_caught():
    old = "total = math.fsum(weights)"
    mutant = Mutant("core", "none", "window/shares.py", old, old, ["tests/core/test_shares.py"])
    assert tried(9999, mutant)[0] == "NOT CAUGHT"
