"""What is wrong with a size or another option."""

from collections.abc import Mapping
from random import Random
from typing import Any

import numpy as np
from tests.fuzz.batches import Pair, nothing
from tests.fuzz.call import Call, Fault

from virtualbatch import Auto

SIZES: dict[str, Any] = {
    "0": 0,
    "-1": -1,
    "True": True,
    "2.0": 2.0,
    "2.5": 2.5,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "a NumPy int": np.int64(2),
    "a NumPy byte": np.uint8(3),
    "a NumPy float": np.float64(2),
    "an array": np.array([2]),
    "an array of no axes": np.array(2),
    "huge": 10**30,
    "1": 1,
    "all rows": 6,
    "more than rows": 100,
    "text": "2",
    "another word": "automatic",
    "a list": [2],
    "a dict": {"rows": 2},
    "an object": object(),
    "complex": 2j,
    "a class": int,
}

WORDS: dict[str, Any] = {
    "None": None,
    "0": 0,
    "3": 3,
    "-1": -1,
    "NaN": float("nan"),
    "text": "no such word",
    "empty text": "",
    "a list": [1, 2],
    "a dict": {"a": 1},
    "an object": object(),
    "a function": nothing,
    "a class": Pair,
    "True": True,
    "an array": np.ones(2),
}

LIMITS: dict[str, Any] = {
    "0": 0,
    "-5": -5,
    "1": 1,
    "a float": 3.5,
    "NaN": float("nan"),
    "True": True,
    "text": "much",
    "no unit": "12",
    "a unit": "GiB",
    "above all": "180%",
    "none": "0%",
    "negative": "-2GiB",
    "NaN in text": "nanGiB",
    "infinite": "infGiB",
    "huge": "9" * 400 + "GiB",
    "a list": [1],
    "an object": object(),
    "enough": "8GiB",
    "bytes": b"2GiB",
}


def option(part: str, values: Mapping[str, Any], aux_is_judged: bool = True) -> list[Fault]:
    """One fault for each value that an option may be given.

    Args:
        part: the option.
        values: by name.
        aux_is_judged: whether the aux of the uncut batch is still that of the window.
    """

    def fault(name: str) -> Fault:
        def change(call: Call, random: Random) -> None:
            call.options[part] = values[name]
            call.aux_is_judged = call.aux_is_judged and aux_is_judged

        return Fault(f"{part}: {name}", part, change)

    return [fault(name) for name in values]


def coarse(part: str, values: Mapping[str, Any]) -> list[Fault]:
    """The same for an option whose values may round more than the uncut batch does."""

    def unjudged(fault: Fault) -> Fault:
        def change(call: Call, random: Random) -> None:
            fault.change(call, random)
            call.is_judged = False

        return fault._replace(change=change)

    return list(map(unjudged, option(part, values)))


def _no_size(call: Call, random: Random) -> None:
    if call.loss is None and "gather" not in call.allowed:
        return
    call.options.pop("microbatch_size", None)
    call.options.pop("accumulation_steps", None)


def _both(call: Call, random: Random) -> None:
    if "microbatch_size" not in call.allowed:
        return
    call.options |= {"microbatch_size": random.choice([2, 3, 4]), "accumulation_steps": 2}


def _auto(call: Call, random: Random) -> None:
    call.options["microbatch_size"] = random.choice(
        ["auto", Auto(), Auto(memory_limit="4GiB"), Auto(memory_limit=1)]
    )
    call.options.pop("accumulation_steps", None)


FAULTS = [
    *option("microbatch_size", SIZES),
    *option("accumulation_steps", SIZES),
    Fault("no size", "microbatch_size", _no_size),
    Fault("both sizes", "accumulation_steps", _both),
    Fault("an automatic size", "microbatch_size", _auto),
    *option("has_aux", WORDS),
    *option("stats", WORDS),
    *option("check", WORDS),
    *option("memory_limit", LIMITS),
]
