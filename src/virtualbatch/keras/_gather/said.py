"""Log lines about losses that need all rows: once, at the first batch."""

import logging
from collections.abc import Sequence

import keras

from virtualbatch.keras._gather.gathering import COMPARES, NUMBER, Coupled, Found

_log = logging.getLogger("virtualbatch")


def say_what_is_gathered(model: keras.Model, found: Found) -> None:
    """Logs which losses get gathered predictions, and why."""
    if found.gathering is None:
        return
    if found.gathering.losses is None:
        _log.warning(
            "%s overrides compute_loss: it gets the predictions of all rows, at the cost of one "
            "more forward pass. With gather=False its result counts as a mean over rows.",
            type(model).__name__,
        )
        if found.runs:
            _log.warning(
                "compute_loss sees all rows at once and runs %s on them, which needs the memory "
                "of the whole batch. Run that in call, and return its result as one more output.",
                _listed(found.runs),
            )
        return
    numbers = [found.name for found in found.coupled if found.why == NUMBER]
    _log.warning(
        "%s: %s the predictions of all rows, at the cost of one more forward pass. gather=False "
        "%s.",
        _reasons(found.coupled),
        {1: "it gets", 2: "both get"}.get(len(found.coupled), "they get"),
        f"treats {_listed(numbers)} as a mean over rows"
        if numbers
        else "shows it the rows of a micro-batch only",
    )


def say_what_is_not_gathered(model: keras.Model, found: Found) -> None:
    """Warns of losses that need all rows but do not get them, because of `gather=False`."""
    if found.gathering is not None and found.gathering.losses is None:
        _log.warning(
            "%s overrides compute_loss: its result is treated as one mean over rows.",
            type(model).__name__,
        )
    for name, why, differs in found.coupled:
        if why == COMPARES:
            _log.warning(
                "gather=False is set, but %s gives a row another value when the other rows "
                "change. Got values that differ by %.0e. Leave gather out.",
                *(name, differs),
            )


def _reasons(coupled: Sequence[Coupled]) -> str:
    by_why: dict[str, list[str]] = {}
    for name, why, _ in coupled:
        by_why.setdefault(why, []).append(name)
    parts = [
        f"{_listed(names)} {why if len(names) == 1 else _plural(why)}"
        for why, names in by_why.items()
    ]
    return f"The {'loss' if len(coupled) == 1 else 'losses'} {_listed(parts)}"


def _plural(why: str) -> str:
    verb, _, rest = why.partition(" ")
    return f"{'do' if verb == 'does' else verb.removesuffix('s')} {rest}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
