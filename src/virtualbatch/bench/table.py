"""A benchmark's result as tables for the terminal."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from virtualbatch.bench.asked import asked
from virtualbatch.bench.case import Case
from virtualbatch.bench.contender import FLOOR, OURS, PEER, WHOLE
from virtualbatch.bench.result import NOT_INSTALLED, WRONG, BenchResult, Comparison, Quartiles, Row

_MIB = 2**20
_STYLES = {WRONG: "bold red", NOT_INSTALLED: "dim"}


def tables(result: BenchResult) -> Group:
    """All that was measured."""
    parts: list[RenderableType] = [_comparison(found) for found in result.comparisons]
    parts += [_sweep(name, found) for name, found in result.sweeps.items()]
    parts += [_memory(name, result) for name, found in result.peaks.items() if found]
    parts += [f"{engine}: not installed, not measured" for engine in result.absent_engines]
    # What a process printed may look like markup.
    parts += [Text(failure) for failure in result.failures]
    versions = [f"{name} {version or NOT_INSTALLED}" for name, version in result.versions.items()]
    return Group(*parts, f"{result.machine}; {', '.join(versions)}")


def _comparison(found: Comparison) -> Table:
    table = Table(
        title=f"{_named(found.case)}: {found.case.accumulation_steps} micro-batches of "
        f"{found.case.microbatch_size}",
        caption="Medians of an update, quartiles in brackets. Right: as the uncut batch updates.",
        caption_justify="left",
        title_justify="left",
    )
    table.add_column("way", min_width=20)
    for heading in ("ms", "x our time", "asked", "result"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in found.rows:
        table.add_row(
            row.name if row.package is None else f"{row.name} (pip install {row.package})",
            "-" if row.milliseconds is None else f"{row.milliseconds[1]:.2f}",
            _spread(row.times_ours),
            _verdict(found.case, row),
            _correctness(row),
            style=_STYLES.get(row.verdict),
        )
    return table


def _named(case: Case) -> str:
    return f"{case.engine}, {case.model}" + (f" x {case.scale}" if case.scale > 1 else "")


def _spread(found: Quartiles | None) -> str:
    if found is None:
        return "-"
    low, median, high = found
    return f"{median:.2f} ({low:.2f}-{high:.2f})"


def _verdict(case: Case, row: Row) -> str:
    least = asked(case.engine, case.model, row.name, row.role)
    if least is None or row.times_ours is None:
        return ""
    return f">= {least:.2f}" + ("" if row.times_ours[1] >= least else " MISSED")


def _correctness(row: Row) -> str:
    if row.verdict == NOT_INSTALLED:
        return NOT_INSTALLED
    return row.verdict + (f" {row.error:.0e}" if row.error is not None else "")


def _sweep(name: str, found: Sequence[Comparison]) -> Table:
    table = Table(title=f"ms of an update, by {name}", title_justify="left")
    for heading in ("engine, model", name, "rows", "ours", "us a row", "floor", "whole", "peer"):
        table.add_column(heading, justify="left" if heading.startswith("engine") else "right")
    for comparison in found:
        case = comparison.case
        ours, floor, whole, peer = (
            comparison.milliseconds(role) for role in (OURS, FLOOR, WHOLE, PEER)
        )
        table.add_row(
            f"{case.engine}, {case.model}",
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


def _memory(name: str, result: BenchResult) -> Table:
    table = Table(
        title=f"peak MiB of an update, by {name}",
        caption="Above what the process holds between updates; a process each.",
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("engine, model", name, "rows", "way", "MiB"):
        table.add_column(heading, justify="right" if heading in (name, "rows", "MiB") else "left")
    for peak in result.peaks[name]:
        case = peak.case
        table.add_row(
            f"{case.engine}, {case.model}",
            str(getattr(case, name)),
            str(case.rows),
            peak.name,
            NOT_INSTALLED if peak.peak_bytes is None else f"{peak.peak_bytes / _MIB:.1f}",
        )
    return table
