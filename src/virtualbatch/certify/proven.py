"""The losses whose first window was tried, and what was seen of them."""

import logging
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from virtualbatch.window.fingerprint import fingerprint

_log = logging.getLogger("virtualbatch")

# Of a Window that is taken as it is.
NO_ROWS = "its micro-batches have no common rows"


class Seen(NamedTuple):
    """What was seen of a loss when it was tried.

    Fields:
        group: rows that belong together; 1 where each stands alone.
        writes_rows: whether it changes its rows in place.
    """

    group: int = 1
    writes_rows: bool = False

    def check_sizes(self, sizes: Sequence[int]) -> None:
        """Refuses micro-batches that cut apart what belongs together.

        Raises:
            ValueError: one is no multiple of the group.
        """
        if any(size % self.group for size in sizes):
            raise ValueError(
                "The rows of this loss belong together, so each micro-batch must have a multiple "
                f"of {self.group}. Got micro-batches of {', '.join(map(str, sizes))} rows. Pass "
                "another microbatch_size, and whole groups in the last batch. See docs/rows.md."
            )


def untried(reason: str) -> None:
    """Logs that the law could not be tried.

    Args:
        reason: why.
    """
    _log.warning(
        "Whether micro-batches add up to their batch could not be tried (%s). Run certify once.",
        reason,
    )


class Proven:
    """The losses that were tried with one module, or one set of variables, and what was seen.

    A loss is often written anew at each call. One that is still the same object is known at once,
    any other by what it does.
    """

    def __init__(self) -> None:
        self._objects: WeakKeyDictionary[Any, dict[Hashable, Seen]] = WeakKeyDictionary()
        self._texts: dict[Hashable, Seen] = {}

    def seen(self, loss_fn: Any, weight: Any, structure: Hashable) -> Seen | None:
        """What was remembered of a loss; None if it was not tried.

        Args:
            loss_fn: the loss function.
            weight: as the engine is given it.
            structure: of the batch, and whatever else asks for another try.
        """
        known, key = self._of_object(loss_fn, weight, structure)
        if key not in known:
            found = self._texts.get((fingerprint(loss_fn, weight), structure))
            if found is None:
                return None
            known[key] = found
        return known[key]

    def remember(self, loss_fn: Any, weight: Any, structure: Hashable, seen: Seen) -> None:
        """Remembers what was seen of a loss."""
        known, key = self._of_object(loss_fn, weight, structure)
        known[key] = self._texts[fingerprint(loss_fn, weight), structure] = seen

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
        key = (code, getattr(weight, "__code__", weight), structure)
        try:
            known = self._objects.get(owner)
            if known is None:
                known = self._objects[owner] = {}
        except TypeError:  # not hashable, or without weak references
            known = {}
        return known, key
