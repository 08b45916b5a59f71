"""A plan as a section of the page: memory and throughput against micro-batch size."""

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from virtualbatch.plan.plan import Plan, readable_bytes
from virtualbatch.plan.timing import ALIKE
from virtualbatch.report._axes import note
from virtualbatch.report._section import Figure, Section, Table, Tile
from virtualbatch.report._svg import LIGHT, NARROW, WIDE, drawing

# A limit this many times above all peaks is not drawn: it would flatten the line.
_FAR_ABOVE = 2.0
_MOST_TICKS = 8


def plan_section(name: str, plan: Plan) -> Section:
    """A plan with the sizes it compared.

    Args:
        name: the name of the section, unique on the page.
        plan: the plan to show.
    """
    chosen = next(row for row in plan.rows if row.microbatch_size == plan.microbatch_size)
    limit = readable_bytes(plan.memory_limit)
    tiles = [
        Tile(f"{plan.microbatch_size} rows", "in a micro-batch"),
        Tile(str(plan.accumulation_steps), "micro-batches in an update"),
    ]
    if chosen.peak_bytes is not None:
        tiles.append(Tile(readable_bytes(chosen.peak_bytes), f"peak memory, limit {limit}"))
    if chosen.seconds_per_batch is not None:
        tiles.append(Tile(_seconds(chosen.seconds_per_batch), "for the whole batch"))
    is_timed = any(row.seconds_per_batch for row in plan.rows)
    unit, scale = _memory_unit(max((row.peak_bytes or 0 for row in plan.rows), default=0))
    table = Table(
        f"All {len(plan.rows)} sizes",
        ("micro-batch (rows)", f"peak memory ({unit})", "source", "time of the whole batch (s)"),
        [
            (
                str(row.microbatch_size),
                "unknown" if row.peak_bytes is None else _memory_in(scale, row.peak_bytes),
                row.source,
                "not timed" if row.seconds_per_batch is None else f"{row.seconds_per_batch:.4g}",
            )
            for row in plan.rows
        ],
        chosen=plan.rows.index(chosen),
    )
    return Section(
        kind="Plan",
        verdict=f"Micro-batches of {plan.microbatch_size} rows fit{' and are fast' * is_timed}",
        tone="plain",
        tiles=tiles,
        text=[plan.reason],
        figures=_figures(name, plan),
        tables=[table],
    )


def _figures(name: str, plan: Plan) -> list[Figure]:
    """Plots of the known numbers. If there is only one, it is drawn for the full width too."""
    plots: list[tuple[str, Callable[[str, Plan, int], Markup], str]] = []
    if any(row.peak_bytes is not None for row in plan.rows):
        caption = "Filled points are measured or compiled, hollow points are predicted from them."
        plots.append(("Memory", _memory, caption))
    if any(row.seconds_per_batch for row in plan.rows):
        caption = (
            "Whole batches in a second. If several sizes are nearly as fast, the smallest is "
            "chosen."
        )
        plots.append(("Throughput", _throughput, caption))
    return [
        Figure(
            title,
            draw(f"{name}-{title}", plan, NARROW),
            caption,
            draw(f"{name}-{title}", plan, WIDE) if len(plots) == 1 else None,
        )
        for title, draw, caption in plots
    ]


def _memory_unit(largest: float) -> tuple[str, int]:
    """The unit in which `largest` is easy to read, and its bytes."""
    unit = readable_bytes(largest).split()[1]
    return unit, 1024 ** ("B", "KiB", "MiB", "GiB").index(unit)


def _memory_in(scale: int, peak: int) -> str:
    number = peak / scale
    # Small sizes need digits that large ones do not.
    return f"{number:.1f}" if number >= 10 else f"{number:.3g}"


def _memory(name: str, plan: Plan, width: int) -> Markup:
    """Peak memory against micro-batch size, with the limit and the choice.

    Args:
        name: the name of the figure, unique on the page.
        plan: a plan with at least one known peak.
        width: the width of the drawing.
    """
    known = {
        row.microbatch_size: (row.peak_bytes, row.measured)
        for row in plan.rows
        if row.peak_bytes is not None
    }
    largest = max(peak for peak, _ in known.values())
    is_near = plan.memory_limit <= _FAR_ABOVE * largest
    top = max(largest, plan.memory_limit) if is_near else largest
    unit, scale = _memory_unit(top)
    limit = f"limit {readable_bytes(plan.memory_limit)}"
    with drawing(name, f"Peak memory against micro-batch size; {limit}.", width) as found:
        axes = found.axes
        _size_axis(axes, list(known))
        axes.set_ylim(0, 1.2 * top / scale)
        axes.set_ylabel(f"peak memory, {unit}")
        if is_near:
            axes.axhline(plan.memory_limit / scale, color=LIGHT["red"], dashes=(5, 3))
            note(axes, (0, plan.memory_limit / scale), limit, "red")
        else:
            note(axes, (0, axes.get_ylim()[1]), f"{limit}, far above", "red")
        axes.plot(
            list(known), [peak / scale for peak, _ in known.values()], color=LIGHT["blue"], zorder=2
        )
        for size, (peak, measured) in known.items():
            inside = LIGHT["blue"] if measured else LIGHT["page"]
            axes.plot(
                size, peak / scale, "o", color=LIGHT["blue"], markerfacecolor=inside, zorder=3
            )
        if plan.microbatch_size in known:
            chosen, _ = known[plan.microbatch_size]
            is_close = is_near and chosen <= plan.memory_limit < chosen + 0.2 * top
            text = f"{plan.microbatch_size} rows: {readable_bytes(chosen)}"
            _choose(axes, plan.microbatch_size, chosen / scale, text, below=is_close)
    return found.svg


def _throughput(name: str, plan: Plan, width: int) -> Markup:
    """Throughput against micro-batch size, with the choice.

    Args:
        name: the name of the figure, unique on the page.
        plan: a plan with at least one timed size.
        width: the width of the drawing.
    """
    timed = {
        row.microbatch_size: 1 / row.seconds_per_batch for row in plan.rows if row.seconds_per_batch
    }
    best = max(timed.values())
    with drawing(name, "Throughput against micro-batch size.", width) as found:
        axes = found.axes
        _size_axis(axes, list(timed))
        axes.set_ylim(0, 1.2 * best)
        axes.set_ylabel("throughput, batches/s")
        axes.axhspan(best / (1 + ALIKE), best, color=LIGHT["green"], alpha=0.2, linewidth=0)
        text = f"shaded: within {ALIKE:.0%} of the fastest"
        note(axes, (0, axes.get_ylim()[1]), text, "green")
        axes.plot(list(timed), list(timed.values()), "o-", color=LIGHT["blue"])
        if plan.microbatch_size in timed:
            speed = timed[plan.microbatch_size]
            _choose(
                axes, plan.microbatch_size, speed, f"{plan.microbatch_size} rows: {speed:.3g}/s"
            )
    return found.svg


def _size_axis(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    first, last = math.log2(min(sizes)), math.log2(max(sizes))
    powers = range(math.floor(first), math.ceil(last) + 1)
    ticks = [2**power for power in powers][:: -(-len(powers) // _MOST_TICKS)]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.set_xlim(2 ** (first - 0.5), 2 ** (last + 0.5))
    axes.set_xlabel("rows of a micro-batch")


def _choose(axes: Axes, size: int, y: float, text: str, below: bool = False) -> None:
    """Marks the chosen size. The label goes to the side that has room."""
    axes.plot(size, y, "o", markersize=16, markerfacecolor="none", color=LIGHT["orange"])
    axes.plot(size, y, "o", color=LIGHT["orange"])
    low, high = axes.get_xlim()
    is_right = size**2 > low * high
    axes.annotate(
        text,
        (size, y),
        xytext=(10 if is_right else -10, -26 if below else 14),
        textcoords="offset points",
        ha="right" if is_right else "left",
        color=LIGHT["orange"],
        fontweight="bold",
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
