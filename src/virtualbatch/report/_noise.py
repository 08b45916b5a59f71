"""The noise scale over training, and advice on the batch size, as sections of the page."""

import math
from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from virtualbatch.noise.advice import Advice
from virtualbatch.noise.estimate import NoiseEstimate
from virtualbatch.report._axes import plain_log_ticks
from virtualbatch.report._section import Figure, Section, Table, Tile
from virtualbatch.report._svg import LIGHT, NARROW, WIDE, drawing

# An interval is cut off at this many times above or below the estimates.
_WIDEST = 8.0
_MOST_MARKED = 20


def noise_section(name: str, history: Sequence[tuple[int, NoiseEstimate]]) -> Section:
    """The noise scale of the gradients during training.

    Args:
        name: the name of the section, unique on the page.
        history: pairs of the updates made and the estimate at that time; at least one.
    """
    last = history[-1][1]
    interval = f"{last.confidence:.0%} interval"
    caption = f"Shaded: the {interval}. It reaches the edge where it has no upper or lower end."
    figures = []
    if any(0 < estimate.scale < math.inf for _, estimate in history):
        narrow, wide = (_over_updates(f"{name}-noise", history, width) for width in (NARROW, WIDE))
        figures.append(Figure("Noise scale over training", narrow, caption, wide))
    return Section(
        kind="Noise scale",
        verdict="No signal was seen in the gradients yet"
        if math.isinf(last.scale)
        else f"Gradients are as much noise as signal at {_rows(last.scale)} rows",
        tone="plain",
        tiles=[
            Tile(f"{_rows(last.scale)} rows", "noise scale at the end"),
            Tile(f"{_rows(last.low)} to {_rows(last.high)}", f"its {interval}, rows"),
            Tile(str(last.windows), "windows counted"),
        ],
        text=[],
        figures=figures,
        tables=[
            Table(
                f"All {len(history)} estimates",
                (
                    "updates",
                    "noise scale (rows)",
                    "interval from (rows)",
                    "interval to (rows)",
                    "windows",
                ),
                [
                    (str(update), _rows(e.scale), _rows(e.low), _rows(e.high), str(e.windows))
                    for update, e in history
                ],
            )
        ],
    )


def advice_section(advice: Advice) -> Section:
    """Advice on the batch size, from a noise scale and two times.

    Args:
        advice: the advice to show.
    """
    rules = [str(rule) for rule in advice.rules]
    if rules:
        rules.insert(0, f"If you change the batch to {_rows(advice.best_rows)} rows:")
    return Section(
        kind="Advice",
        verdict=advice.verdict,
        tone="plain",
        tiles=[
            Tile(f"{_rows(advice.rows)} rows", "present batch"),
            Tile(f"{_rows(advice.best_rows)} rows", "fastest batch"),
            Tile(
                f"{_rows(advice.best_low)} to {_rows(advice.best_high)}",
                "interval of the fastest batch, rows",
            ),
            Tile(f"{advice.time:.2f} times", "time of the present batch over the fastest"),
        ],
        text=rules,
        figures=[],
    )


def _over_updates(name: str, history: Sequence[tuple[int, NoiseEstimate]], width: int) -> Markup:
    """The noise scale over training, with its interval.

    Args:
        name: the name of the figure, unique on the page.
        history: pairs of the updates made and the estimate at that time. At least one estimate is
            finite and positive.
        width: the width of the drawing.
    """
    scales = [estimate.scale for _, estimate in history if 0 < estimate.scale < math.inf]
    low, high = min(scales) / _WIDEST, max(scales) * _WIDEST
    updates = [update for update, _ in history]
    with drawing(name, "Gradient noise scale over training.", width) as found:
        axes = found.axes
        axes.fill_between(
            updates,
            [min(max(estimate.low, low), high) for _, estimate in history],
            [min(max(estimate.high, low), high) for _, estimate in history],
            color=LIGHT["blue"],
            alpha=0.16,
            linewidth=0,
        )
        axes.plot(
            updates,
            [e.scale if 0 < e.scale < math.inf else math.nan for _, e in history],
            color=LIGHT["blue"],
            marker="o" if len(history) <= _MOST_MARKED else "",
            markersize=4,
        )
        axes.set_yscale("log")
        ends = [end for _, e in history for end in (e.low, e.high) if low < end < high]
        axes.set_ylim(min([*ends, *scales]) / 1.3, max([*ends, *scales]) * 1.3)
        plain_log_ticks(axes)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
        axes.set_xlabel("updates")
        axes.set_ylabel("noise scale, rows")
    return found.svg


def _rows(number: float) -> str:
    if math.isinf(number):
        return "∞"
    return f"{number:.3g}" if number < 1000 else f"{number:.0f}"
