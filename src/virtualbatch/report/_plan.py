"""A plan as a section: memory and throughput against micro-batch size."""

import math
from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from virtualbatch.plan.plan import NEARLY_AS_FAST, Plan, readable_bytes
from virtualbatch.report._axes import HEIGHT, note
from virtualbatch.report._section import Figure, Section, Table, Tile
from virtualbatch.report._svg import LIGHT, drawing

# A limit that is further above all peaks than this would press them to the bottom.
_FAR_ABOVE = 2.0
_MOST_TICKS = 8


def plan_section(name: str, plan: Plan) -> Section:
    """What a plan says.

    Args:
        name: alone of its kind on the page.
        plan: to show.
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
    figures = []
    is_timed = any(row.seconds_per_batch for row in plan.rows)
    if any(row.peak_bytes is not None for row in plan.rows):
        caption = "Filled: measured or compiled. Hollow: predicted from those."
        figures.append(Figure("Memory", _memory(f"{name}-memory", plan), caption))
    if is_timed:
        caption = (
            "Of the whole batch. Where several sizes are nearly as fast, the smallest is taken."
        )
        figures.append(Figure("Throughput", _throughput(f"{name}-speed", plan), caption))
    table = Table(
        f"All {len(plan.rows)} sizes",
        ("micro-batch", "peak memory", "known how", "s per batch"),
        [
            (
                str(row.microbatch_size),
                "unknown" if row.peak_bytes is None else readable_bytes(row.peak_bytes),
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
        figures=figures,
        tables=[table],
    )


def _memory(name: str, plan: Plan) -> Markup:
    """Peak memory against micro-batch size, with the limit and the choice.

    Args:
        name: of the figure, alone of its kind on the page.
        plan: at least one of its peaks is known.
    """
    known = {
        row.microbatch_size: (row.peak_bytes, row.measured)
        for row in plan.rows
        if row.peak_bytes is not None
    }
    largest = max(peak for peak, _ in known.values())
    is_near = plan.memory_limit <= _FAR_ABOVE * largest
    top = max(largest, plan.memory_limit) if is_near else largest
    unit = readable_bytes(top).split()[1]
    scale = 1024 ** ("B", "KiB", "MiB", "GiB").index(unit)
    limit = f"limit {readable_bytes(plan.memory_limit)}"
    with drawing(name, f"Peak memory against micro-batch size; {limit}.", HEIGHT) as found:
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


def _throughput(name: str, plan: Plan) -> Markup:
    """Throughput against micro-batch size, with the choice.

    Args:
        name: of the figure, alone of its kind on the page.
        plan: at least one of its sizes was timed.
    """
    timed = {
        row.microbatch_size: 1 / row.seconds_per_batch for row in plan.rows if row.seconds_per_batch
    }
    best = max(timed.values())
    with drawing(name, "Throughput against micro-batch size.", HEIGHT) as found:
        axes = found.axes
        _size_axis(axes, list(timed))
        axes.set_ylim(0, 1.2 * best)
        axes.set_ylabel("batches per second")
        axes.axhspan(best / NEARLY_AS_FAST, best, color=LIGHT["green"], alpha=0.2, linewidth=0)
        text = f"shaded: within {NEARLY_AS_FAST - 1:.0%} of the fastest"
        note(axes, (0, axes.get_ylim()[1]), text, "green")
        axes.plot(list(timed), list(timed.values()), "o-", color=LIGHT["blue"])
        if plan.microbatch_size in timed:
            speed = timed[plan.microbatch_size]
            _choose(axes, plan.microbatch_size, speed, f"{plan.microbatch_size} rows: {speed:.3g}")
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
    """Marks the choice, and names it on the side where there is room."""
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
