"""Plots of a benchmark's sweeps for its page: time and memory against the cut and the width."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from virtualbatch.atomic_write import write_whole
from virtualbatch.bench.contender import FLOOR, OURS, PEER, VIRTUALBATCH, WHOLE, WHOLE_BATCH
from virtualbatch.bench.result import BenchResult, Comparison
from virtualbatch.bench.sweeps import SWEEPS, peer_along

_LINES = {
    OURS: ("virtualbatch", "#1f6299", "o-"),
    FLOOR: ("floor", "#9aa5b2", "--"),
    WHOLE: ("whole batch at once", "#1f7a4a", "s:"),
    PEER: ("peer", "#a8560c", "^-"),
}
_MIB = 2**20
_SETTINGS = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dde2e8",
    "lines.markersize": 4.0,
}


def write_plots(folder: Path, result: BenchResult) -> list[Path]:
    """Writes a PNG of times and a PNG of memory for each sweep that has such results.

    Args:
        folder: a folder that exists.
        result: a result with sweeps.

    Returns:
        The files that were written.
    """
    written = []
    with matplotlib.rc_context(_SETTINGS):
        for name in result.sweeps:
            for kind, draw in (("time", _times), ("memory", _peaks)):
                panels = list(draw(result, name))
                if panels:
                    file = folder / f"bench-{kind}-{name.replace('_', '-')}.png"
                    image = BytesIO()
                    _drawn(panels).savefig(image, dpi=110)
                    write_whole(file, image.getvalue())
                    written.append(file)
    return written


def _times(result: BenchResult, name: str) -> Iterable[Callable[[Axes], None]]:
    found = result.sweeps[name]
    for engine, model in dict.fromkeys((each.case.engine, each.case.model) for each in found):
        points = [each for each in found if (each.case.engine, each.case.model) == (engine, model)]
        yield partial(_time_panel, name, points)


def _time_panel(name: str, points: Sequence[Comparison], axes: Axes) -> None:
    case = points[0].case
    for role in _LINES:
        pairs = [
            (getattr(point.case, name), milliseconds)
            for point in points
            if (milliseconds := point.milliseconds(role)) is not None
        ]
        _line(axes, role, pairs, peer_along(case.engine))
    _dressed(axes, f"{case.engine}, {case.model}", SWEEPS[name].label, "ms an update")


def _peaks(result: BenchResult, name: str) -> Iterable[Callable[[Axes], None]]:
    for engine in dict.fromkeys(peak.case.engine for peak in result.peaks[name]):
        yield partial(_memory_panel, name, result, engine)


def _memory_panel(name: str, result: BenchResult, engine: str, axes: Axes) -> None:
    found = [peak for peak in result.peaks[name] if peak.case.engine == engine]
    peer = peer_along(engine)
    for role, way in ((OURS, VIRTUALBATCH), (WHOLE, WHOLE_BATCH), (PEER, peer)):
        pairs = [
            (getattr(peak.case, name), peak.peak_bytes / _MIB)
            for peak in found
            if peak.name == way and peak.peak_bytes is not None
        ]
        _line(axes, role, pairs, peer)
    _dressed(axes, f"{engine}, {found[0].case.model}", SWEEPS[name].label, "peak MiB")


def _line(axes: Axes, role: str, pairs: Sequence[tuple[int, float]], peer: str) -> None:
    if not pairs:
        return
    label, colour, style = _LINES[role]
    xs, ys = zip(*pairs, strict=True)
    axes.plot(xs, ys, style, color=colour, label=peer.split(",")[0] if role == PEER else label)


def _dressed(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.legend(frameon=False, fontsize=7)


def _drawn(panels: Sequence[Callable[[Axes], None]]) -> Figure:
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.1 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, draw in zip(grid, panels, strict=False):
        draw(axes)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return figure
