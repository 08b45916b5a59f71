"""One update by several contenders: checked first, then timed in interleaved rounds."""

from collections.abc import Callable, Sequence

from virtualbatch.bench.comparison import compared, lasting
from virtualbatch.bench.contender import Absent, Contender
from virtualbatch.bench.result import WRONG, Row

a_tenth_of_a_second = lasting(0.1)


def measured(
    contenders: Sequence[Contender | Absent],
    rounds: int,
    updates: Callable[[Contender], int] = a_tenth_of_a_second,
) -> list[Row]:
    """A row for each contender that is installed; the others are said.

    Raises:
        AssertionError: a contender does other work, so that its time says nothing.
    """
    (rows,) = compared([contenders], rounds, updates)
    for row in rows:
        if row.verdict == WRONG:
            raise AssertionError(f"{row.name}: its first update is off by {row.error:.1e}")
        if row.package:
            print(f"{row.name} is not installed and not compared: pip install {row.package}")
    return [row for row in rows if row.milliseconds]
