"""Bad input at random: how an outcome is classified, and the verbs that know no framework."""

import dataclasses
import re
from random import Random

import numpy as np
import pytest
from tests.fuzz import cases, outcomes
from tests.fuzz.call import Call, Fault, Result, UsersError
from tests.fuzz.cases import run_case
from tests.fuzz.runner import findings, load, run, seeds, table

RIGHT = Result(np.float64(2.0), [np.ones(2)], [np.arange(3)])
RULE = "A size must be positive. Got 0. Pass 1."


def raised(error):
    raise error


def changed(call):
    call.weights += 1
    raise ValueError(RULE)


def written(call):
    call.weights += 1


def wrong(**parts):
    return lambda call: RIGHT._replace(**parts)


@dataclasses.dataclass
class Fake:
    """An engine of one verb; what it does, and what is due."""

    does: object
    due: object = None
    name = "fake"
    verbs = ("verb",)
    faults = (Fault("none", "batch", lambda call, random: None),)

    def call(self, verb, random):
        options = {"check": True}
        return Call(
            verb, None, 1, None, None, options, frozenset(), weights=np.ones(1), compiled=False
        )

    def uncut(self, call):
        return RIGHT if self.due is None else self.due(call)

    def run(self, call):
        return self.does(call)

    def state(self, call):
        return {"weights": call.weights.copy()}


OUTCOMES = {
    "equal": (lambda call: RIGHT, None, outcomes.RIGHT),
    "nothing to compare": (lambda call: None, None, outcomes.RIGHT),
    "three parts": (lambda call: raised(ValueError(RULE)), None, outcomes.CLEAR),
    "the user's own": (lambda call: raised(UsersError("mine")), None, outcomes.USERS),
    "as uncut": (
        lambda call: raised(KeyError("x 1")),
        lambda call: raised(KeyError("x 2")),
        outcomes.FRAMEWORK,
    ),
    "of the kind that uncut is, and says another thing": (
        lambda call: raised(KeyError("x")),
        lambda call: raised(KeyError("y")),
        outcomes.OBSCURE,
    ),
    "nothing to compare, and something was written": (written, None, outcomes.CHANGED),
    "another error than uncut": (
        lambda call: raised(KeyError("x")),
        lambda call: raised(ValueError("y")),
        outcomes.OBSCURE,
    ),
    "no fix": (lambda call: raised(ValueError("Got 0.")), None, outcomes.OBSCURE),
    "internal": (
        lambda call: raised(ValueError("internal: a rule. Got 0. Fix.")),
        None,
        outcomes.OBSCURE,
    ),
    "an attribute": (lambda call: call.nothing, None, outcomes.OBSCURE),
    "three parts of an AttributeError": (
        lambda call: raised(AttributeError(RULE)),
        None,
        outcomes.OBSCURE,
    ),
    "another loss": (wrong(loss=np.float64(2.1)), None, outcomes.WRONG),
    "NaN for a number": (wrong(loss=np.float64("nan")), None, outcomes.WRONG),
    "another gradient": (wrong(gradients=[np.ones(2) * 1.01]), None, outcomes.WRONG),
    "no gradient": (wrong(gradients=[None]), None, outcomes.WRONG),
    "a row less": (wrong(aux=[np.arange(2)]), None, outcomes.WRONG),
    "accepted, and refused uncut": (
        lambda call: RIGHT,
        lambda call: raised(ValueError("no")),
        outcomes.WRONG,
    ),
    "rows, where the weight says none": (
        lambda call: setattr(call, "is_empty", True) or RIGHT,
        lambda call: RIGHT._replace(loss=np.float64(0), gradients=[], aux=[]),
        outcomes.WRONG,
    ),
    "clear, and something was written": (changed, None, outcomes.CHANGED),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_each_kind_of_outcome_is_told_from_the_others(monkeypatch, name):
    # This file stands for the library.
    monkeypatch.setattr(outcomes, "LIBRARY", __file__)
    does, due, kind = OUTCOMES[name]
    found = run_case(Fake(does, due), "0")
    assert found.outcome.kind == kind, found
    assert bool(findings([found])) == (kind in outcomes.FAULTS)
    assert f"{kind} 1" in table("fake", [found])


def test_what_is_wrong_only_where_nothing_can_be_tried_counts_as_untried(monkeypatch):
    monkeypatch.setattr(outcomes, "LIBRARY", __file__)

    class Compiled(Fake):
        def call(self, verb, random):
            return dataclasses.replace(super().call(verb, random), compiled=True)

    def does(call):
        return RIGHT._replace(loss=np.float64(3)) if call.compiled else raised(ValueError(RULE))

    assert run_case(Compiled(does), "0").outcome.kind == outcomes.UNTRIED
    silent = Compiled(wrong(loss=np.float64(3)))
    assert run_case(silent, "0").outcome.kind == outcomes.WRONG


def test_an_error_of_the_users_line_that_only_micro_batches_raise_is_told(monkeypatch):
    monkeypatch.setattr(outcomes, "LIBRARY", "nowhere")
    monkeypatch.setattr(outcomes, "USERS_FILES", {__file__})
    by_user = run_case(Fake(lambda call: raised(IndexError("mine"))), "0").outcome
    below = run_case(Fake(lambda call: np.ones(2).reshape(3, 3)), "0").outcome
    assert (by_user.kind, below.kind) == (outcomes.USERS, outcomes.OBSCURE)
    assert "and not uncut" in below.text


def test_a_case_is_reproduced_by_its_seed_and_by_the_names_of_its_faults():
    engine = load("neutral")
    first, again = (cases.made_case(engine, "3.14") for _ in range(2))
    assert first.faults == again.faults
    named = cases.made_case(engine, "pack|round_to: 0")
    assert (named.verb, named.faults, named.options["round_to"]) == ("pack", ["round_to: 0"], 0)


def test_findings_of_one_line_are_told_once():
    found = [
        cases.Found(str(k), "verb", [], outcomes.Outcome(outcomes.OBSCURE, "file:1", "KeyError: x"))
        for k in range(3)
    ]
    assert len(findings(found)) == 1


def test_every_fault_of_every_part_can_be_chosen():
    engine = load("neutral")
    parts = {fault.part for fault in engine.faults}
    calls = [engine.call(verb, Random(0)) for verb in engine.verbs]
    assert all(any(f.part == part and f.fits(c) for f in engine.faults for c in calls)
               for part in parts - {"has_aux", "stats", "check"} | {"stats"})  # fmt: skip


def test_verbs_without_a_framework_refuse_bad_input_in_words():
    found = run(load("neutral"), seeds(0, 250))
    assert not findings(found), "\n".join(map(str, findings(found)))


@pytest.mark.thorough("ten seeds of bad input, some thousand calls")
@pytest.mark.parametrize("seed", range(10))
def test_verbs_without_a_framework_refuse_bad_input_of_many_seeds(seed):
    found = run(load("neutral"), seeds(seed, 1000))
    assert not findings(found), "\n".join(map(str, findings(found)))


NAMED = {
    "pack|batch: a list that holds itself": r"nested structure must end\. Got batch of type list",
    "pack|batch: nested 5000 deep": r"nested structure must end\. Got batch of type list, which",
    "pack|lengths: ragged": r"must be an array, or a list of numbers or text\. Got \[\[1\], \[1, ",
    "whole_groups|groups: objects": r"equal values form a group\. Got groups of object\. Pass",
    "Window|batch: an int": r"A Window is made of micro-batches\. Got 3\. Pass a list of them",
    "windows|batch: a class": r"groups an iterable of micro-batches\. Got type\. Pass a loader",
    "NoiseScale|stats: too few": r"update takes the WindowStats of a window\. Got \(1, 2\)\. Pass",
    "NoiseScale|stats: texts": r"WindowStats must hold four numbers\. Got rows='a'\. Pass what an",
    "NoiseScale|stats: no rows": r"A window must have rows.* Got WindowStats of 0 rows\. Pass",
    "NoiseScale|confidence: text": r"confidence must be between 0 and 1\. Got confidence='no such",
    "NoiseScale|plan: text": r"plan must be what a plan function returned\. Got plan='no such",
    "write_html|file: bytes": r"file must be a path\. Got file=b'name'\. Pass for example",
    "Auto|file: a number": r"file must be the name of a file, or None\. Got float\. Pass",
    "certify_loop|loop: a list": r"loop must be a function\. Got loop=\[1, 2\]\. See the example",
    "certify_loop|batches: 3": r"batches must be an iterable of whole batches\. Got 3\. Pass",
}


@pytest.mark.parametrize("case", NAMED)
def test_what_once_failed_obscurely_says_what_is_wrong(case):
    found = run_case(load("neutral"), case)
    assert found.outcome.kind == outcomes.CLEAR, found
    assert re.search(NAMED[case], found.outcome.text), found


@pytest.mark.parametrize(
    "case", ["pack|round_to: a NumPy byte", "windows|accumulation_steps: huge"]
)
def test_numbers_that_python_could_not_hold_are_right(case):
    assert run_case(load("neutral"), case).outcome.kind == outcomes.RIGHT
