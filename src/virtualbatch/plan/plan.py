"""A plan: the micro-batch that fits and is fast, with what is known of other sizes."""

import html
import math
import re
from dataclasses import dataclass

from virtualbatch.result import Result

# A smaller micro-batch is as good as the fastest one if it takes at most this much longer.
NEARLY_AS_FAST = 1.05

_UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


@dataclass(frozen=True)
class PlanRow:
    """One entry of a plan: what is known of one micro-batch size. It is no row of data.

    Args:
        microbatch_size: the rows of data in one micro-batch.
        peak_bytes: the peak memory of a window, in bytes. None if it is not known.
        measured: whether the peak was measured, or reported by the compiler. False if it was
            predicted from other sizes.
        seconds_per_batch: the time of the whole batch, in seconds. None if the size was not timed.
    """

    microbatch_size: int
    peak_bytes: int | None
    measured: bool
    seconds_per_batch: float | None

    @property
    def source(self) -> str:
        """Where the peak comes from: `"measured"`, `"predicted"` or, if unknown, `"tried"`."""
        if self.peak_bytes is None:
            return "tried"
        return "measured" if self.measured else "predicted"


@dataclass(frozen=True)
class Plan(Result):
    """How to cut a batch so that it fits in memory and is fast.

    Print it for a table. `to_json()` returns the same as JSON.

    Args:
        microbatch_size: the rows of data in one micro-batch.
        accumulation_steps: the micro-batches per window.
        memory_limit: the bytes that the window may take.
        reason: why this size was chosen, in one sentence.
        rows: the sizes that were looked at, smallest first, as `PlanRow` entries. They are the
            lines of the printed table, and no rows of data. `sizes` is the same under a clearer
            name.

    Example:
        >>> sizes = (PlanRow(16, 2**20, True, 0.2), PlanRow(32, 2**21, False, None))
        >>> found = Plan(16, 4, 3 * 2**19, "It is the largest size that fits.", sizes)
        >>> [(size.microbatch_size, size.source) for size in found.sizes]
        [(16, 'measured'), (32, 'predicted')]
        >>> print(found)
        microbatch_size=16 (accumulation_steps=4), memory limit 1.5 MiB
        It is the largest size that fits.
         micro-batch   peak memory                 s per batch
                  16       1.0 MiB      measured           0.2     <- chosen
                  32       2.0 MiB     predicted
    """

    microbatch_size: int
    accumulation_steps: int
    memory_limit: int
    reason: str
    rows: tuple[PlanRow, ...]

    @property
    def sizes(self) -> tuple[PlanRow, ...]:
        """The sizes that were looked at, smallest first; the same as `rows`."""
        return self.rows

    def __str__(self) -> str:
        lines = ["  ".join(cell.rjust(12) for cell in cells).rstrip() for cells in self._table()]
        return "\n".join([self._headline(), self.reason, *lines])

    def _repr_html_(self) -> str:
        lines = [
            "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) for cells in self._table()
        ]
        table = "".join(f"<tr>{line}</tr>" for line in lines)
        headline, reason = html.escape(self._headline()), html.escape(self.reason)
        return f"<p><b>{headline}</b><br>{reason}</p><table>{table}</table>"

    def _headline(self) -> str:
        return (
            f"microbatch_size={self.microbatch_size} (accumulation_steps="
            f"{self.accumulation_steps}), memory limit {readable_bytes(self.memory_limit)}"
        )

    def _table(self) -> list[tuple[str, ...]]:
        lines: list[tuple[str, ...]] = [("micro-batch", "peak memory", "", "s per batch", "")]
        for row in self.rows:
            seconds = row.seconds_per_batch
            lines.append(
                (
                    str(row.microbatch_size),
                    "unknown" if row.peak_bytes is None else readable_bytes(row.peak_bytes),
                    row.source,
                    "" if seconds is None else f"{seconds:.4g}",
                    "<- chosen" if row.microbatch_size == self.microbatch_size else "",
                )
            )
        return lines


def parse_limit(limit: int | str | None, usable: int | None) -> int:
    """A memory limit in bytes.

    Args:
        limit: bytes, a text such as "2GiB" or "80%", or None for all that is usable.
        usable: bytes that the device or the container has left; None if it does not report them.

    Raises:
        ValueError: the text does not parse, the limit is not positive, or it depends on `usable`,
            which is None.
        TypeError: the limit is something else.
    """
    if usable is None and (limit is None or (isinstance(limit, str) and "%" in limit)):
        raise ValueError(
            "memory_limit must be a number of bytes where the device does not tell what it has "
            f"left. Got memory_limit={limit!r}. Pass for example '10GiB'."
        )
    if limit is None and usable is not None:
        return usable
    if isinstance(limit, bool) or not isinstance(limit, int | str):
        raise TypeError(
            "memory_limit must be a number of bytes, a text or None. "
            f"Got {type(limit).__name__}. Pass for example 2 * 2**30, '2GiB' or '80%'."
        )
    found = limit if isinstance(limit, int) else _parsed(limit, usable)
    if found is None or found <= 0:
        raise ValueError(
            "memory_limit must be a positive number of bytes, or a text of a number and a unit. "
            f"Got memory_limit={limit!r}. Pass for example '2GiB', '500MB' or '80%'."
        )
    return found


def limit_as_text(limit: int | str | None) -> str:
    """A text for a limit. Limits with the same meaning get the same text.

    Args:
        limit: as `parse_limit` takes it.
    """
    found = _parsed(limit, None) if isinstance(limit, str) else limit
    return str(limit if found is None else found)


def _parsed(text: str, usable: int | None) -> int | None:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[a-zA-Z]+)\s*", text)
    # A number with very many digits becomes infinite.
    if match is None or math.isinf(float(match[1])):
        return None
    number, unit = float(match[1]), match[2].lower()
    if unit == "%" and usable is not None:
        return int(usable * number / 100) if number <= 100 else None
    return int(number * _UNITS[unit]) if unit in _UNITS else None


def readable_bytes(size: float) -> str:
    """Bytes as a text such as "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise RuntimeError("internal: no unit.")
