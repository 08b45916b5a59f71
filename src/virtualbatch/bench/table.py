"""A benchmark's result as tables for the terminal; each fits 80 columns."""

from collections.abc import Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from virtualbatch.bench.asked import asked
from virtualbatch.bench.case import Case
from virtualbatch.bench.contender import FLOOR, OURS, PEER, WHOLE
from virtualbatch.bench.peers import pip_install
from virtualbatch.bench.result import (
    NOT_INSTALLED,
    WRONG,
    BenchResult,
    Comparison,
    Peak,
    Quartiles,
    Row,
)

_MIB = 2**20
_STYLES = {WRONG: "bold red", NOT_INSTALLED: "dim"}


def tables(result: BenchResult) -> Group:
    """All results as tables and lines."""
    found = [_comparison(comparison) for comparison in result.comparisons]
    for name, points in result.sweeps.items():
        found += [_sweep(name, list(line)) for _, line in groupby(points, lambda p: _of(p.case))]
    for name, peaks in result.peaks.items():
        found += [_memory(name, list(line)) for _, line in groupby(peaks, lambda p: _of(p.case))]
    parts: list[RenderableType] = [part for table in found for part in (table, "")]
    parts += [f"{engine}: not installed, not measured" for engine in result.absent_engines]
    # Text shows a failure as it is: the output of a process may look like markup.
    parts += [Text(failure) for failure in result.failures]
    versions = [f"{name} {version or NOT_INSTALLED}" for name, version in result.versions.items()]
    return Group(*parts, f"{result.machine}; {', '.join(versions)}")


def headed(title: str, caption: str | None = None) -> Table:
    """A table without columns and without a frame.

    Args:
        title: the text above the table.
        caption: the text below the table.
    """
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def _add_figures(table: Table, headings: Sequence[str]) -> None:
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)


def _comparison(found: Comparison) -> Table:
    case = found.case
    scaled = f" x {case.scale}" if case.scale > 1 else ""
    table = headed(
        f"{_of(case)}{scaled}: {case.accumulation_steps} micro-batches of {case.microbatch_size}",
        "Medians of an update; x ours with quartiles. Right: as the uncut batch.",
    )
    # Only this column may wrap, between words.
    table.add_column("way")
    _add_figures(table, ("ms", "x ours", "asked", "result"))
    for row in found.rows:
        table.add_row(
            row.name
            if row.package is None
            else f"{row.name} ({NOT_INSTALLED}: {pip_install(row.package)})",
            "-" if row.milliseconds is None else f"{row.milliseconds[1]:.2f}",
            _spread(row.times_ours),
            _asked(case, row),
            _correctness(row),
            style=_STYLES.get(row.verdict),
        )
    return table


def _of(case: Case) -> str:
    return f"{case.engine}, {case.model}"


def _spread(found: Quartiles | None) -> str:
    if found is None:
        return "-"
    low, median, high = map(_short, found)
    return f"{median} {low}-{high}"


def _short(times: float) -> str:
    """A ratio in at most five characters, if it is below 100,000."""
    return f"{times:.{2 if times < 10 else 1 if times < 100 else 0}f}"


def _asked(case: Case, row: Row) -> str:
    least = asked(case.engine, case.model, row.name, row.role)
    if least is None or row.times_ours is None:
        return ""
    return f"{least:.2f}" + ("" if row.times_ours[1] >= least else " MISSED")


def _correctness(row: Row) -> str:
    if row.verdict == NOT_INSTALLED:
        return "-"
    return row.verdict + (f" {row.error:.0e}" if row.error is not None else "")


def _sweep(name: str, line: Sequence[Comparison]) -> Table:
    table = headed(f"{_of(line[0].case)}: ms of an update, by {name}")
    _add_figures(table, (name, "rows", "ours", "us a row", "floor", "whole", "peer"))
    for comparison in line:
        case = comparison.case
        ours, floor, whole, peer = (
            comparison.milliseconds(role) for role in (OURS, FLOOR, WHOLE, PEER)
        )
        table.add_row(
            str(getattr(case, name)),
            str(case.rows),
            _number(ours),
            _number(ours and ours * 1e3 / case.rows),
            _number(floor),
            _number(whole),
            _number(peer),
        )
    return table


def _number(found: float | None) -> str:
    return "-" if found is None else f"{found:.2f}"


def _memory(name: str, line: Sequence[Peak]) -> Table:
    table = headed(
        f"{_of(line[0].case)}: peak MiB of an update, by {name}",
        "Above what the process holds between updates; a process each.",
    )
    table.add_column("way")
    _add_figures(table, (name, "rows", "MiB"))
    for peak in line:
        table.add_row(
            peak.name,
            str(getattr(peak.case, name)),
            str(peak.case.rows),
            NOT_INSTALLED if peak.peak_bytes is None else f"{peak.peak_bytes / _MIB:.1f}",
        )
    return table
