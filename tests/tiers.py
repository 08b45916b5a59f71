"""Two tiers: `make test` leaves out what is marked `thorough`, `make test-all` runs everything."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def tiered(values: Iterable[Any], quick: Collection[Any], reason: str) -> list[Any]:
    """Values of a parameter, of which only some are tried in the quick tier.

    Args:
        values: all of them, in order.
        quick: those that the quick tier tries too.
        reason: why the others may wait, in one line.

    Raises:
        ValueError: `quick` holds what is not among the values.
    """
    values = list(values)
    if strangers := [value for value in quick if value not in values]:
        raise ValueError(
            f"The quick tier tries some of the values. Got {strangers}, not among {values}."
        )
    marks = pytest.mark.thorough(reason)
    return [value if value in quick else pytest.param(value, marks=marks) for value in values]


def refuse_a_tier_without_a_reason(items: Iterable[pytest.Item]) -> None:
    """Raises where a test is left out of the quick tier and nobody says why.

    Raises:
        pytest.UsageError: a mark has no reason, or one of several lines.
    """
    for item in items:
        for mark in item.iter_markers("thorough"):
            reason = mark.args[0] if len(mark.args) == 1 and not mark.kwargs else None
            if not isinstance(reason, str) or not reason.strip() or "\n" in reason:
                raise pytest.UsageError(
                    "A thorough test must say in one line why it is one. Got "
                    f"args={mark.args} and kwargs={mark.kwargs} on {item.nodeid}. "
                    'Write @pytest.mark.thorough("the reason").'
                )
