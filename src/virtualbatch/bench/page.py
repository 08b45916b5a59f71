"""A benchmark's result as a page of Markdown: ratios, plots, the machine."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from virtualbatch.bench.asked import asked
from virtualbatch.bench.contender import FLOOR, OURS, VIRTUALBATCH, WHOLE
from virtualbatch.bench.result import NOT_INSTALLED, WRONG, BenchResult, Comparison, Peak, Row
from virtualbatch.bench.sweeps import SWEEPS

_MIB = 2**20
_READING = (
    "Time of an update over ours, also in the sweeps; medians of interleaved rounds. Ours is in "
    "milliseconds. A ratio below the project's goal is **bold**, with the goal. The first update "
    "of each is compared with that of the uncut batch: *wrong* means that it differs by more than "
    "rounding; the number is the difference relative to the update's length."
)


def page_of(result: BenchResult, plots: Sequence[Path]) -> str:
    """The text of the page.

    Args:
        result: the result to show.
        plots: plot files of its sweeps, in the folder of the page.
    """
    versions = ", ".join(f"{name} {found}" for name, found in result.versions.items() if found)
    parts = [
        "# Benchmarks",
        f"One run of `virtualbatch bench` on {result.machine}; {versions}.",
        "## Compared with the alternatives",
        _READING,
    ]
    for engine in dict.fromkeys(found.case.engine for found in result.comparisons):
        parts.append(_of_engine([f for f in result.comparisons if f.case.engine == engine]))
    for name, points in result.sweeps.items():
        parts.append(f"## By {SWEEPS[name].label}")
        parts += [f"![{plot.stem}]({plot.name})" for plot in plots if _draws(plot, name)]
        for model in dict.fromkeys(point.case.model for point in points):
            parts.append(_of_sweep(name, [p for p in points if p.case.model == model]))
        if result.peaks[name]:
            parts.append(_of_peaks(name, result.peaks[name]))
    if result.failures:
        parts += ["## Without a result", *(failure.splitlines()[0] for failure in result.failures)]
    return "\n\n".join(parts) + "\n"


def _draws(plot: Path, sweep: str) -> bool:
    return plot.stem.endswith(sweep.replace("_", "-"))


def _table(heading: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    heading = list(heading)
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _of_engine(found: Sequence[Comparison]) -> str:
    names = dict.fromkeys(row.name for comparison in found for row in comparison.rows)

    def cells(name: str) -> Iterator[str]:
        yield name
        for comparison in found:
            row = next((row for row in comparison.rows if row.name == name), None)
            yield "" if row is None else _cell(comparison, row)

    case = found[0].case
    cut = f"{case.engine}, {case.accumulation_steps} micro-batches of {case.microbatch_size}"
    heading = [cut, *(comparison.case.model for comparison in found)]
    return _table(heading, [list(cells(name)) for name in names])


def _cell(found: Comparison, row: Row) -> str:
    if row.milliseconds is None or row.times_ours is None:
        return NOT_INSTALLED
    times = row.times_ours[1]
    text = f"{row.milliseconds[1]:.2f} ms" if row.name == VIRTUALBATCH else f"{times:.2f}"
    least = asked(found.case.engine, found.case.model, row.name, row.role)
    if least is not None and times < least:
        text = f"**{text}** of {least:.2f}"
    return text + (f", *wrong* by {row.error:.0e}" if row.verdict == WRONG else "")


def _of_sweep(name: str, points: Sequence[Comparison]) -> str:
    rows = []
    for engine in dict.fromkeys(point.case.engine for point in points):
        line = [point for point in points if point.case.engine == engine]
        ours = [point.milliseconds(OURS) or 0.0 for point in line]
        for role, label in ((FLOOR, "floor"), (WHOLE, "whole batch at once")):
            others = [point.milliseconds(role) for point in line]
            rows.append(
                [f"{engine}: {label}"]
                + [f"{b / a:.2f}" if a and b else "" for a, b in zip(ours, others, strict=True)]
            )
        per_row = [a / point.case.rows for a, point in zip(ours, line, strict=True)]
        rows.append(
            [f"{engine}: our time per row, last = 1"]
            + [f"{time / per_row[-1]:.2f}" for time in per_row]
        )
    return _table([points[0].case.model, *_values(name, points)], rows)


def _of_peaks(name: str, found: Sequence[Peak]) -> str:
    values = _values(name, found)
    rows: dict[str, dict[str, str]] = {}
    for peak in found:
        mebibytes = NOT_INSTALLED if peak.peak_bytes is None else f"{peak.peak_bytes / _MIB:.1f}"
        line = rows.setdefault(f"{peak.case.engine}: {peak.name}", {})
        line[str(getattr(peak.case, name))] = mebibytes
    model = found[0].case.model
    return _table(
        [f"{model}: peak MiB of an update", *values],
        [[way, *(line.get(value, "") for value in values)] for way, line in rows.items()],
    )


def _values(name: str, points: Sequence[Comparison] | Sequence[Peak]) -> list[str]:
    return list(dict.fromkeys(str(getattr(point.case, name)) for point in points))
