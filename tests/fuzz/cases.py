"""One case: a call with one to three faults, made, and classified."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import NamedTuple

from tests.fuzz import outcomes
from tests.fuzz.call import ANY_ERROR, Call, Engine, Fault, Result
from tests.fuzz.outcomes import Outcome

from virtualbatch.plan import planner
from virtualbatch.plan.timing import TimeBudget


class Found(NamedTuple):
    """What became of one case.

    Fields:
        seed: reproduces it.
        verb: what was called.
        faults: what was wrong.
        outcome: what came of it.
    """

    seed: str
    verb: str
    faults: Sequence[str]
    outcome: Outcome

    def __str__(self) -> str:
        what = f"{self.outcome.kind} {self.outcome.where}  [{self.verb}; {'; '.join(self.faults)}]"
        return f"{what}\n    {self.outcome.text}\n    CASE={self.seed}"


def made_case(engine: Engine, seed: str) -> Call:
    """The call of a seed, new each time, so that nothing is left of an earlier one.

    Args:
        engine: whose verb is called.
        seed: any text; or a verb and the names of faults, between "|".
    """
    random = Random(seed)
    verb, *asked = seed.split("|")
    call = engine.call(verb if asked else random.choice(engine.verbs), random)
    faults = [fault for fault in engine.faults if fault.fits(call)]
    if asked:
        chosen = [fault for fault in faults if fault.name in asked]
    else:
        chosen = _chosen(faults, random)
    for fault in chosen:
        call.faults.append(fault.name)
        fault.change(call, random)
    return call


def _chosen(faults: Sequence[Fault], random: Random) -> list[Fault]:
    """One to three faults of different parts, in the order of the parts."""
    parts: dict[str, list[Fault]] = {}
    for fault in faults:
        parts.setdefault(fault.part, []).append(fault)
    if not parts:
        return []
    # By part, so that no part is met more often because it has more faults.
    names = list(parts)
    count = random.choices([1, 2, 3], [6, 3, 1])[0]
    often = {"batch": 8, "loss": 8, "weight": 4, "has_aux": 3, "trained": 2}
    found = set(random.choices(names, [often.get(name, 1) for name in names], k=count))
    return [random.choice(parts[name]) for name in sorted(found)]


def run_case(engine: Engine, seed: str) -> Found:
    """Makes the call of a seed, and says what became of it.

    Args:
        engine: whose verb is called.
        seed: any text.
    """
    with quiet():
        uncut = _uncut(engine, made_case(engine, seed))
        call = made_case(engine, seed)
        outcome = _outcome(engine, call, uncut)
        if outcome.kind == outcomes.WRONG and _is_told(engine, seed):
            outcome = Outcome(outcomes.UNTRIED, outcome.where, outcome.text)
    return Found(seed, call.verb, call.faults, outcome)


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings, which here are errors of nobody, and plans that time nothing."""
    before = planner.BUDGET
    planner.BUDGET = TimeBudget(seconds=0.0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        planner.BUDGET = before


def _uncut(engine: Engine, call: Call) -> Result | BaseException:
    try:
        return engine.uncut(call)
    except ANY_ERROR as error:
        return error


def _of_weight(call: Call) -> BaseException | None:
    """What the user's weight raises of the whole batch, if anything."""
    weight = call.options.get("weight")
    try:
        if callable(weight):
            weight(call.batch)
    except ANY_ERROR as error:
        return error
    return None


def _outcome(engine: Engine, call: Call, uncut: Result | BaseException) -> Outcome:
    before = engine.state(call)
    try:
        result = engine.run(call)
    except ANY_ERROR as error:
        raised = uncut if isinstance(uncut, BaseException) else uncut.traced or _of_weight(call)
        outcome = outcomes.of_error(error, raised)
        told = outcomes.changed(before, engine.state(call))
        if told and call.keeps_state and outcome.kind != outcomes.OBSCURE:
            return Outcome(outcomes.CHANGED, outcome.where, f"{told}, after {outcome.text}")
        return outcome
    if result is None and call.keeps_state:
        told = outcomes.changed(before, engine.state(call))
        if told:
            return Outcome(outcomes.CHANGED, "returned", told)
    return outcomes.of_result(call, result, uncut)


def _is_told(engine: Engine, seed: str) -> bool:
    """Whether the same call, where the law can be tried, is refused in words."""
    call = made_case(engine, seed)
    if not (call.compiled or call.options.get("check", True) is not True):
        return False
    call.compiled = False
    call.options.pop("check", None)
    try:
        engine.run(call)
    except ANY_ERROR as error:
        return outcomes.of_error(error, None).kind == outcomes.CLEAR
    return False
