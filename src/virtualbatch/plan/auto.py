"""The size in use: requested or planned, and reduced when memory runs out.

An engine asks for the size before each window. If memory runs out, it asks for a smaller size and
runs the same window again. A plan is made once for each signature of a batch and can be kept in a
file.
"""

import logging
import os
from collections.abc import Callable
from functools import cache
from typing import Any

from virtualbatch.plan.host_memory import host_memory
from virtualbatch.plan.plan import Plan, limit_as_text, readable_bytes
from virtualbatch.plan.plan_file import PlanFile
from virtualbatch.plan.signature import Signature
from virtualbatch.window.cut import check_sizes
from virtualbatch.window.window import Window, check_cut

_log = logging.getLogger("virtualbatch")


class CurrentSize:
    """Rows of a micro-batch, never more than requested or planned.

    Args:
        most: rows requested or planned.
        grow_after: number of windows that must fit in a row before a reduced size is doubled;
            None: never.
    """

    def __init__(self, most: int, grow_after: int | None):
        self.most = most
        self._grow_after = grow_after
        self._in_a_row = 0
        self.rows = most

    def shrink(self, rows: int, unit: str = "rows") -> bool:
        """Halves the size after memory ran out; returns False if no smaller size exists.

        Args:
            rows: rows of the largest micro-batch of the window that ran out of memory.
            unit: what sizes count: "rows", or "tokens" for packed rows.
        """
        self._in_a_row = 0
        if rows <= 1:
            return False
        smaller = rows // 2
        _log.warning(
            "Out of memory with micro-batches of %d %s. The same update is run again with "
            "micro-batches of %d %s, which are kept.",
            rows,
            unit,
            smaller,
            unit,
        )
        self.rows = smaller
        return True

    def succeeded(self) -> None:
        """Counts a window that fitted."""
        if self.rows == self.most or self._grow_after is None:
            return
        self._in_a_row += 1
        if self._in_a_row >= self._grow_after:
            self._in_a_row = 0
            self.rows = min(2 * self.rows, self.most)
            _log.info("Micro-batches grow again, to %d rows.", self.rows)


class Auto:
    """A micro-batch size that is planned at the first batch and remembered.

    `microbatch_size="auto"` is `microbatch_size=Auto()`, kept for as long as the model lives.

    Args:
        memory_limit: bytes, a text such as "2GiB" or "80%", or None for all memory that the device
            or the container has left.
        file: JSON file that keeps plans between processes; None: in memory only. Several threads
            and processes may share it. If it cannot be written, a warning is logged once and plans
            are kept in memory.
        grow_after: number of windows that must fit in a row before a size that was reduced, because
            memory ran out, is doubled again. It never exceeds the planned size. None: never.

    Raises:
        ValueError: the file holds anything but plans, cannot be read, or its folder does not exist;
            or `grow_after` is not a positive integer.
        TypeError: `file` is not a path.

    Example:
        >>> size = Auto(memory_limit="2GiB", grow_after=1000)
    """

    def __init__(
        self,
        *,
        memory_limit: int | str | None = None,
        file: str | os.PathLike[str] | None = None,
        grow_after: int | None = None,
    ):
        if grow_after is not None and (
            isinstance(grow_after, bool) or not isinstance(grow_after, int) or grow_after < 1
        ):
            raise ValueError(
                "grow_after must be a positive number of windows, or None. "
                f"Got grow_after={grow_after!r}. Pass for example grow_after=1000."
            )
        self.memory_limit = memory_limit
        self._file = None if file is None else PlanFile(file)
        self._grow_after = grow_after
        self._plans = [] if self._file is None else self._file.plans
        self._planned: dict[Signature, CurrentSize] = {}
        self._asked: dict[int, CurrentSize] = {}

    def __repr__(self) -> str:
        file = None if self._file is None else str(self._file)
        given = {
            "memory_limit": self.memory_limit,
            "file": file,
            "grow_after": self._grow_after,
        }
        told = (f"{name}={value!r}" for name, value in given.items() if value is not None)
        return f"Auto({', '.join(told)})"

    def asked(self, rows: int) -> CurrentSize:
        """The size in use for a requested number of rows."""
        return self._asked.setdefault(rows, CurrentSize(rows, self._grow_after))

    def planned(self, signature: Signature, plan: Callable[[], Plan]) -> CurrentSize:
        """The size in use for a batch; makes a plan if no known plan covers the batch.

        Args:
            signature: the signature of the batch.
            plan: makes a plan for the batch.
        """
        limit = limit_as_text(self.memory_limit)
        if not limit.isdecimal():
            # A share of the memory, or all of it, means another limit on another machine.
            limit = f"{limit} of {_host_bytes()} bytes"
        signature = signature._replace(limit=limit)
        # Copied, because another thread may plan meanwhile.
        for known, size in list(self._planned.items()):
            if known.covers(signature):
                return size
        for known, found in self._plans:
            if known.covers(signature):
                return self._adopt(known, found, f"from {self._file}")
        found = plan()
        self._plans.append((signature, found))
        if self._file is not None:
            self._file.add(signature, found)
        return self._adopt(signature, found, "planned")

    def _adopt(self, signature: Signature, plan: Plan, source: str) -> CurrentSize:
        _log.info(
            "microbatch_size=%d for batches of up to %d rows, memory limit %s (%s): %s",
            plan.microbatch_size,
            signature.rows,
            readable_bytes(plan.memory_limit),
            source,
            plan.reason,
        )
        size = CurrentSize(plan.microbatch_size, self._grow_after)
        self._planned[signature] = size
        return size


@cache
def _host_bytes() -> int:
    """Total memory of the machine or the container."""
    return host_memory().usable_bytes


def is_automatic(microbatch_size: Any) -> bool:
    """Whether a size argument asks for a planned size."""
    # Only texts are compared: an array would compare element by element.
    return isinstance(microbatch_size, Auto) or (
        isinstance(microbatch_size, str) and microbatch_size == "auto"
    )


def check_sizes_or_auto(microbatch_size: Any, accumulation_steps: Any) -> None:
    """Checks size arguments where the size may be planned.

    Args:
        microbatch_size: rows of one forward and backward, "auto", an `Auto`, or None.
        accumulation_steps: micro-batches per window, or None.

    Raises:
        ValueError: `check_sizes` raises it, or a number of micro-batches is given although the
            size is planned.
    """
    if not is_automatic(microbatch_size):
        check_sizes(microbatch_size, accumulation_steps)
    elif accumulation_steps is not None:
        raise ValueError(
            'microbatch_size="auto" finds the number of micro-batches itself. '
            f"Got accumulation_steps={accumulation_steps!r} with it. Leave one of them out."
        )


def check_cut_or_auto(batch: Any, microbatch_size: Any, accumulation_steps: Any) -> None:
    """Checks size arguments for a batch; a Window is already cut and takes none.

    Args:
        batch: a batch or a Window.
        microbatch_size: rows of one forward and backward, "auto", an `Auto`, or None.
        accumulation_steps: micro-batches per window, or None.

    Raises:
        ValueError: a size comes with a Window, or `check_sizes_or_auto` raises it for a batch.
    """
    if isinstance(batch, Window):
        check_cut(batch, microbatch_size, accumulation_steps)
    else:
        check_sizes_or_auto(microbatch_size, accumulation_steps)
