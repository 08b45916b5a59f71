"""Remembers the losses whose first window was tried, and what was observed."""

import logging
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from virtualbatch.window.fingerprint import fingerprint, plain_values

# A loss that differs only in plain values is tried this often.
_MOST_TRIES = 4

_log = logging.getLogger("virtualbatch")

# The reason for a Window that is taken as it is.
NO_ROWS = "its micro-batches have no common rows"
# The reason for modules that gather parameters.
IN_STEP = "its module runs on all ranks at once, and not on a few rows of one"


class Seen(NamedTuple):
    """Observations of a loss, made when it was tried.

    Fields:
        group: number of rows that belong together; 1 if rows are independent.
        writes_rows: whether the loss changes its rows in place.
    """

    group: int = 1
    writes_rows: bool = False

    def check_sizes(self, sizes: Sequence[int]) -> None:
        """Raises an error if micro-batches separate rows that belong together.

        Raises:
            ValueError: the rows of a micro-batch are not a multiple of the group.
        """
        if any(size % self.group for size in sizes):
            raise ValueError(
                "The rows of this loss belong together, so each micro-batch must have a multiple "
                f"of {self.group}. Got micro-batches of {', '.join(map(str, sizes))} rows. Pass "
                "another microbatch_size, and whole groups in the last batch. "
                "See docs/guides/rows.md."
            )


def untried(reason: str) -> None:
    """Logs that a loss could not be tried.

    Args:
        reason: why not.
    """
    _log.warning(
        "Whether micro-batches add up to their batch could not be tried (%s). Run certify once.",
        reason,
    )


class Proven:
    """The losses that were tried with one module or one set of variables, and the observations.

    A loss is often defined anew at each call. The same object is recognised directly, another one
    by its code and by the plain values that it uses.
    """

    def __init__(self) -> None:
        self._objects: WeakKeyDictionary[Any, dict[Hashable, Seen]] = WeakKeyDictionary()
        self._texts: dict[Hashable, dict[Hashable, Seen]] = {}

    def seen(self, loss_fn: Any, weight: Any, structure: Hashable) -> Seen | None:
        """The observations of a loss; None if it was not tried.

        Args:
            loss_fn: the loss function.
            weight: as passed to the engine.
            structure: the structure of the batch, and all else whose change needs another attempt.
        """
        known, key = self._of_object(loss_fn, weight, structure)
        if key in known:
            return known[key]
        tried = self._texts.get((fingerprint(loss_fn, weight), structure), {})
        found = tried.get(plain_values(loss_fn, weight))
        if found is None and len(tried) >= _MOST_TRIES:
            # A value changes with each update, such as a step or a coefficient.
            found = next(reversed(tried.values()))
        if found is not None:
            known[key] = found
        return found

    def remember(self, loss_fn: Any, weight: Any, structure: Hashable, seen: Seen) -> None:
        """Remembers the observations of a loss."""
        known, key = self._of_object(loss_fn, weight, structure)
        known[key] = seen
        tried = self._texts.setdefault((fingerprint(loss_fn, weight), structure), {})
        tried[plain_values(loss_fn, weight)] = seen

    def tell_once(self, loss_fn: Any, weight: Any, reason: str) -> None:
        """Logs, once, that a loss cannot be tried, and why."""
        if self.seen(loss_fn, weight, reason) is None:
            untried(reason)
            self.remember(loss_fn, weight, reason, Seen())

    def _of_object(
        self, loss_fn: Any, weight: Any, structure: Hashable
    ) -> tuple[dict[Hashable, Seen], Hashable]:
        # A bound method is a new object at every access, but its instance is not.
        owner = getattr(loss_fn, "__self__", loss_fn)
        code = getattr(loss_fn, "__code__", None)
        weighing = getattr(weight, "__code__", None)
        if weighing is None:
            weighing = weight
        elif weight.__closure__:
            weighing = (weighing, plain_values(weight))
        key = (code, weighing, structure)
        try:
            known = self._objects.get(owner)
            if known is None:
                known = self._objects[owner] = {}
        except TypeError:  # not hashable, or without weak references
            known = {}
        return known, key
