"""The size in force: asked for or planned, and made smaller where memory ran out.

Before a window an engine asks for the size; when memory runs out it asks to shrink, and runs the
same window again. A plan is made once for each signature of a batch and can be kept in a file.
"""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from virtualbatch.plan.plan import Plan, PlanRow, limit_as_text, readable_bytes
from virtualbatch.window.cut import check_sizes
from virtualbatch.window.window import Window, check_cut

_log = logging.getLogger("virtualbatch")


class Leaf(NamedTuple):
    """One array of a batch, without its rows.

    Fields:
        place: expression that reaches it, such as "batch['x']".
        shape: of one row.
        dtype: its name.
    """

    place: str
    shape: tuple[int, ...]
    dtype: str


class Signature(NamedTuple):
    """What a plan depends on.

    Fields:
        program: engine, device and parameters, in words.
        loss: what is computed, as a fingerprint.
        rows: of the batch.
        leaves: arrays of the batch, in order.
        limit: of memory, as a text; `Auto` fills it in.
    """

    program: str
    loss: str
    rows: int
    leaves: tuple[Leaf, ...]
    limit: str = ""

    def covers(self, other: "Signature") -> bool:
        """Whether what fits here fits there: the same, with no longer rows or more of them.

        So text that is padded to many lengths is planned again only when it grows longer.
        """
        return (
            (self.program, self.loss, self.limit) == (other.program, other.loss, other.limit)
            and self.rows >= other.rows
            and len(self.leaves) == len(other.leaves)
            and all(
                mine.place == its.place
                and mine.dtype == its.dtype
                and len(mine.shape) == len(its.shape)
                and all(m >= n for m, n in zip(mine.shape, its.shape, strict=True))
                for mine, its in zip(self.leaves, other.leaves, strict=True)
            )
        )


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
        grow_after: after so many windows in a row that fitted, a size that was made smaller because
            memory ran out is doubled again, up to the one that was planned. None: never.

    Raises:
        ValueError: the file holds no plans, or `grow_after` is not a positive integer.

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
        if file is not None and not isinstance(file, str | os.PathLike):
            raise TypeError(
                f"file must be a path, or None. Got file={file!r}. Pass for example 'plans.json'."
            )
        self.memory_limit = memory_limit
        self._file = None if file is None else Path(file)
        self._grow_after = grow_after
        self._plans = _read(self._file) if self._file is not None and self._file.exists() else []
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
        signature = signature._replace(limit=limit_as_text(self.memory_limit))
        for known, size in self._planned.items():
            if known.covers(signature):
                return size
        for known, found in self._plans:
            if known.covers(signature):
                return self._adopt(known, found, f"from {self._file}")
        found = plan()
        self._plans.append((signature, found))
        if self._file is not None:
            _write(self._file, self._plans)
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


def _read(file: Path) -> list[tuple[Signature, Plan]]:
    try:
        return [
            (_signature(entry["signature"]), _plan(entry["plan"]))
            for entry in json.loads(file.read_text())
            # Earlier versions did not say for which loss and limit: those plans are made anew.
            if set(entry["signature"]) != {"program", "rows", "leaves"}
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"file must hold plans that Auto has written. Got {str(file)!r}, which does not. "
            "Remove it, or pass another name."
        ) from error


def _signature(found: dict[str, Any]) -> Signature:
    leaves = (Leaf(place, tuple(shape), dtype) for place, shape, dtype in found["leaves"])
    return Signature(found["program"], found["loss"], found["rows"], tuple(leaves), found["limit"])


def _plan(found: dict[str, Any]) -> Plan:
    return Plan(**found | {"rows": tuple(PlanRow(**row) for row in found["rows"])})


def _write(file: Path, plans: list[tuple[Signature, Plan]]) -> None:
    content = [
        {"signature": signature._asdict(), "plan": json.loads(plan.to_json())}
        for signature, plan in plans
    ]
    # In one move, so that a reader or a crash never meets half a file.
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1))
    os.replace(beside, file)
