"""Parts that all plots share: notes, legends and ticks."""

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from virtualbatch.report._svg import LIGHT, SMALL


def note(axes: Axes, at: tuple[float, float], text: str, colour: str) -> None:
    """Writes small text above a point. x is a share of the width, y is in data units."""
    axes.annotate(
        text,
        at,
        xycoords=("axes fraction", "data"),
        xytext=(2, 5),
        textcoords="offset points",
        color=LIGHT[colour],
        fontsize=SMALL,
    )


def key(axes: Axes) -> None:
    """Puts the legend above the plot."""
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
    """Puts ticks at round numbers and writes them in full. Set the limits of the axis first."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}"))
