"""The noise scale over training, and advice on the batch size, as sections."""

import math
from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from virtualbatch.noise.advice import Advice
from virtualbatch.noise.estimate import NoiseEstimate
from virtualbatch.report._axes import HEIGHT, plain_log_ticks
from virtualbatch.report._section import Figure, Section, Table, Tile
from virtualbatch.report._svg import LIGHT, drawing

# How far an interval may leave the estimates before it is cut off, as a factor.
_WIDEST = 8.0
_MOST_MARKED = 20


def noise_section(name: str, history: Sequence[tuple[int, NoiseEstimate]]) -> Section:
    """How noisy gradients were in training.

    Args:
        name: alone of its kind on the page.
        history: updates made, and the estimate then; at least one.
    """
    last = history[-1][1]
    svg = _over_updates(f"{name}-noise", history)
    interval = f"{last.confidence:.0%} interval"
    caption = f"Shaded: the {interval}; where it has no end it goes to the edge."
    return Section(
        kind="Noise scale",
        verdict="No signal was seen in the gradients yet"
        if math.isinf(last.scale)
        else f"Gradients are as much noise as signal at {_rows(last.scale)} rows",
        tone="plain",
        tiles=[
            Tile(_rows(last.scale), "rows: the noise scale at the end"),
            Tile(f"{_rows(last.low)} to {_rows(last.high)}", f"rows: its {interval}"),
            Tile(str(last.windows), "windows counted"),
        ],
        text=[],
        figures=[] if svg is None else [Figure("Noise scale over training", svg, caption)],
        tables=[
            Table(
                f"All {len(history)} estimates",
                ("updates", "noise scale", "from", "to", "windows"),
                [
                    (str(update), _rows(e.scale), _rows(e.low), _rows(e.high), str(e.windows))
                    for update, e in history
                ],
            )
        ],
    )


def advice_section(advice: Advice) -> Section:
    """What a noise scale and two times say of the batch size.

    Args:
        advice: to show.
    """
    rules = [str(rule) for rule in advice.rules]
    if rules:
        rules.insert(0, f"Should the batch become {_rows(advice.best_rows)} rows:")
    return Section(
        kind="Advice",
        verdict=advice.verdict,
        tone="plain",
        tiles=[
            Tile(_rows(advice.rows), "rows in the present batch"),
            Tile(_rows(advice.best_rows), "rows in the batch with the least time"),
            Tile(f"{_rows(advice.best_low)} to {_rows(advice.best_high)}", "rows: its interval"),
            Tile(f"{advice.time:.2f} times", "the best batch's time, with the present one"),
        ],
        text=rules,
        figures=[],
    )


def _over_updates(name: str, history: Sequence[tuple[int, NoiseEstimate]]) -> Markup | None:
    """The noise scale over training, with its interval.

    Args:
        name: of the figure, alone of its kind on the page.
        history: updates made, and the estimate then.

    Returns:
        The element; None if no estimate is finite and positive, so that there is nothing to draw.
    """
    scales = [estimate.scale for _, estimate in history if 0 < estimate.scale < math.inf]
    if not scales:
        return None
    low, high = min(scales) / _WIDEST, max(scales) * _WIDEST
    updates = [update for update, _ in history]
    with drawing(name, "Gradient noise scale over training.", HEIGHT) as found:
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
