"""The results of `virtualbatch bench`: plain data and arithmetic."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from virtualbatch.bench.case import Case
from virtualbatch.bench.contender import OURS

RIGHT, WRONG, NOT_CHECKED, NOT_INSTALLED = "right", "wrong", "not checked", "not installed"

Quartiles = tuple[float, float, float]


@dataclass(frozen=True)
class Row:
    """One contender of a comparison.

    Args:
        name: the name of the contender.
        role: see `virtualbatch.bench.contender.Contender`.
        verdict: `RIGHT` or `WRONG` against the uncut batch, `NOT_CHECKED` (the floor), or
            `NOT_INSTALLED`.
        package: the package that is not installed; else None.
        error: the distance of the first update from the uncut batch's update, relative to its
            length.
        milliseconds: the time of an update: lower quartile, median and upper quartile over rounds.
        times_ours: its time over our time in the same round, as the same three quantiles.
    """

    name: str
    role: str
    verdict: str
    package: str | None = None
    error: float | None = None
    milliseconds: Quartiles | None = None
    times_ours: Quartiles | None = None


@dataclass(frozen=True)
class Comparison:
    """A case with its contenders.

    Args:
        case: what was measured.
        rows: one row per contender.
    """

    case: Case
    rows: Sequence[Row]

    def milliseconds(self, role: str) -> float | None:
        """The median of the fastest contender of a role; for `OURS`, of our default (the first)."""
        found = [row.milliseconds[1] for row in self.rows if row.role == role and row.milliseconds]
        if not found:
            return None
        return found[0] if role == OURS else min(found)


@dataclass(frozen=True)
class Peak:
    """The memory of one contender, measured in its own process.

    Args:
        case: the case that ran.
        name: the name of the contender.
        peak_bytes: the peak of an update above the memory of the process between two updates. None
            for a peer that is not installed.
    """

    case: Case
    name: str
    peak_bytes: int | None


@dataclass(frozen=True)
class BenchResult:
    """Everything that one call of the command measured.

    Args:
        machine: the machine, in words.
        versions: package -> version, for packages that may take part; None if it is not installed.
        absent_engines: engines that were left out because a package is not installed.
        comparisons: cases with all their contenders.
        sweeps: times of each sweep (more micro-batches, larger ones, wider models).
        peaks: memory of each sweep.
        failures: one text for each measurement that ended without a result.
    """

    machine: str
    versions: Mapping[str, str | None]
    absent_engines: Sequence[str]
    comparisons: Sequence[Comparison]
    sweeps: Mapping[str, Sequence[Comparison]]
    peaks: Mapping[str, Sequence[Peak]]
    failures: Sequence[str] = ()

    @property
    def ours_is_right(self) -> bool:
        """Whether our own update is right in all comparisons."""
        rows = [row for comparison in self.comparisons for row in comparison.rows]
        return not any(row.role == OURS and row.verdict == WRONG for row in rows)

    def to_json(self) -> str:
        """The figures as JSON text."""
        return json.dumps(asdict(self), indent=2)
