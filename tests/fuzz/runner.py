"""Runs cases of an engine, and tells what it found.

python -m tests.fuzz --engine torch --seconds 60 --seed 0
"""

import importlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from random import Random

from tests.fuzz import outcomes
from tests.fuzz.call import Engine
from tests.fuzz.cases import Found, run_case

# Engine -> the class of its verbs. Keras has one backend per process.
ENGINES = {
    "neutral": "tests.fuzz.engines.neutral:Neutral",
    "torch": "tests.fuzz.engines.torch:Torch",
    "jax": "tests.fuzz.engines.jax:Jax",
    "tensorflow": "tests.fuzz.engines.tensorflow:TensorFlow",
    "keras": "tests.fuzz.engines.keras:Keras",
    "keras-tensorflow": "tests.fuzz.engines.keras:Keras",
    "keras-jax": "tests.fuzz.engines.keras:Keras",
    "keras-torch": "tests.fuzz.engines.keras:Keras",
}


def load(name: str) -> Engine:
    """The engine of a name; its framework is imported here."""
    backend = name.partition("-")[2]
    if backend:
        # Read when Keras is imported.
        os.environ["KERAS_BACKEND"] = backend
    module, _, kind = ENGINES[name].partition(":")
    engine: Engine = getattr(importlib.import_module(module), kind)()
    return engine


def seeds(seed: int, count: int | None = None) -> Iterator[str]:
    """The seeds of single cases, as many as asked for, or without end."""
    number = 0
    while count is None or number < count:
        yield f"{seed}.{number}"
        number += 1


def each_alone(engine: Engine) -> Iterator[str]:
    """The seeds of each fault alone, with each verb that it fits."""
    for verb in dict.fromkeys(engine.verbs):
        call = engine.call(verb, Random(0))
        for fault in engine.faults:
            if fault.fits(call):
                yield f"{verb}|{fault.name}"


def run(
    engine: Engine,
    cases: Iterable[str],
    seconds: float | None = None,
    tell: Callable[[Found], None] = lambda found: None,
) -> list[Found]:
    """Runs cases until they or the seconds end.

    Args:
        engine: whose verbs are called.
        cases: their seeds.
        seconds: None for all of them.
        tell: is told of each finding that is new.
    """
    known: set[str] = set()
    end = None if seconds is None else time.monotonic() + seconds
    found = []
    for case in cases:
        if end is not None and time.monotonic() > end:
            break
        found.append(run_case(engine, case))
        for new in findings(found):
            if new.seed not in known:
                known.add(new.seed)
                tell(new)
    return found


def findings(found: Iterable[Found]) -> list[Found]:
    """Faults of the library, one for each line that raised and each verb that was wrong."""
    known: dict[tuple[str, ...], Found] = {}
    for each in found:
        if each.outcome.kind in outcomes.FAULTS:
            place = (each.outcome.where, each.outcome.text.partition(":")[0])
            alike = place if each.outcome.kind == outcomes.OBSCURE else (each.seed,)
            known.setdefault((each.outcome.kind, *alike), each)
    return list(known.values())


def table(name: str, found: Iterable[Found]) -> str:
    """One line: how many cases came out how."""
    counts = Counter(each.outcome.kind for each in found)
    told = "  ".join(f"{kind} {counts[kind]}" for kind in outcomes.KINDS)
    return f"{name:12} {sum(counts.values()):6} cases  {told}"
