"""The size in force: asked for or planned, and made smaller where memory ran out.

Before a window an engine asks for the size; when memory runs out it asks to shrink, and runs the
same window again. A plan is made once for each signature of a batch and can be kept in a file.
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
    """Rows of a micro-batch, never more than asked for or planned.

    Args:
        most: rows asked for or planned.
        grow_after: windows without running out after which a smaller size is doubled; None: never.
    """

    def __init__(self, most: int, grow_after: int | None):
        self.most = most
        self._grow_after = grow_after
        self._in_a_row = 0
        self.rows = most

    def shrink(self, rows: int, unit: str = "rows") -> bool:
        """Takes a smaller size after memory ran out; False if there is none.

        Args:
            rows: of the largest micro-batch of the window that ran out.
            unit: what sizes count; "tokens" where rows are packed.
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
        memory_limit: bytes, a text such as "2GiB" or "80%", or None for what the device or the
            container really has left.
        file: JSON file in which plans are kept from one process to the next; None: in memory only.
            Several threads and processes may share it. Where it cannot be written, one line of the
            log says so, and plans are kept in memory.
        grow_after: after so many windows in a row that fitted, a size that was made smaller because
            memory ran out is doubled again, up to the one that was planned. None: never.

    Raises:
        ValueError: the file holds something else than plans, cannot be read or is in no folder
            that exists; or `grow_after` is not a positive integer.
        TypeError: `file` is no name of a file.

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
        """The size in force where so many rows were asked for."""
        return self._asked.setdefault(rows, CurrentSize(rows, self._grow_after))

    def planned(self, signature: Signature, plan: Callable[[], Plan]) -> CurrentSize:
        """The size in force for a batch, planned unless a plan is known that covers it.

        Args:
            signature: of the batch.
            plan: makes a plan for it.
        """
        limit = limit_as_text(self.memory_limit)
        if not limit.isdecimal():
            # A share of what is left, or all of it, is something else on a smaller machine.
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
    """Memory of the machine or the container, whatever is left of it now."""
    return host_memory().usable_bytes


def is_automatic(microbatch_size: Any) -> bool:
    """Whether a size is to be planned."""
    # Compared as text only: arrays would compare themselves element by element.
    return isinstance(microbatch_size, Auto) or (
        isinstance(microbatch_size, str) and microbatch_size == "auto"
    )


def check_sizes_or_auto(microbatch_size: Any, accumulation_steps: Any) -> None:
    """Refuses size arguments that no batch could satisfy, where a size may be planned.

    Args:
        microbatch_size: rows of one forward and backward, "auto", an `Auto`, or None.
        accumulation_steps: micro-batches per window, or None.

    Raises:
        ValueError: `check_sizes` refuses them, or a number of micro-batches is given although
            it is to be planned.
    """
    if not is_automatic(microbatch_size):
        check_sizes(microbatch_size, accumulation_steps)
    elif accumulation_steps is not None:
        raise ValueError(
            'microbatch_size="auto" finds the number of micro-batches itself. '
            f"Got accumulation_steps={accumulation_steps!r} with it. Leave one of them out."
        )


def check_cut_or_auto(batch: Any, microbatch_size: Any, accumulation_steps: Any) -> None:
    """Refuses sizes that no batch could satisfy, and any size for what is already cut.

    Args:
        batch: a batch or a Window.
        microbatch_size: rows of one forward and backward, "auto", an `Auto`, or None.
        accumulation_steps: micro-batches per window, or None.

    Raises:
        ValueError: a size comes with a Window, or `check_sizes_or_auto` refuses it for a batch.
    """
    if isinstance(batch, Window):
        check_cut(batch, microbatch_size, accumulation_steps)
    else:
        check_sizes_or_auto(microbatch_size, accumulation_steps)
