"""Two tiers: `make test` leaves out what is marked `thorough`, `make test-all` runs everything."""

from collections.abc import Iterable

import pytest


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
