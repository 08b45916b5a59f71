"""What plots have in common: axes, keys and labels."""

from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from virtualbatch.report._svg import LIGHT, SMALL

HEIGHT = 290
# Of a row; its name is above it.
BAR = 0.3
_PIXELS_PER_ROW = 36
_LONGEST_NAME = 46


def note(axes: Axes, at: tuple[float, float], text: str, colour: str) -> None:
    """Small text above a point, whose x is a part of the width and whose y is data."""
    axes.annotate(
        text,
        at,
        xycoords=("axes fraction", "data"),
        xytext=(2, 5),
        textcoords="offset points",
        color=LIGHT[colour],
        fontsize=SMALL,
    )


def rows_height(number: int) -> int:
    """Pixels that `named_rows` needs."""
    return _PIXELS_PER_ROW * number + 20


def named_rows(axes: Axes, names: Iterable[str], values: Sequence[str]) -> None:
    """Rows from the top down, each with its name and its value above the bar."""
    for place, texts in enumerate(zip(names, values, strict=True)):
        for text, x, side in zip(texts, (0, 1), ("left", "right"), strict=True):
            axes.annotate(
                _short(text),
                (x, place),
                xycoords=("axes fraction", "data"),
                xytext=(0, 8),
                textcoords="offset points",
                ha=side,
                va="bottom",
            )
    axes.set_ylim(len(values) - 0.6, -0.95)
    axes.yaxis.set_major_locator(NullLocator())
    axes.grid(False)


def key(axes: Axes) -> None:
    """Names the lines above the plot, where nothing is drawn."""
    axes.legend(
        loc="lower left",
        borderaxespad=0.2,
        bbox_to_anchor=(-0.02, 1.0),
        ncols=3,
        frameon=False,
        fontsize=SMALL,
        handlelength=1.4,
        handletextpad=0.5,
        columnspacing=1.2,
    )


def plain_log_ticks(axes: Axes) -> None:
    """Ticks at round numbers, written out; call it when the limits are set."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}"))


def _short(name: str) -> str:
    """A name on one line that fits; its end tells more than its beginning."""
    # SVG knows no control characters.
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return clean if len(clean) <= _LONGEST_NAME else f"…{clean[1 - _LONGEST_NAME :]}"
