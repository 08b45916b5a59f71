"""The demo as a section: loss over updates and over time, and peak memory."""

from collections.abc import Sequence
from itertools import accumulate

from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, NullLocator

from virtualbatch.demo.result import DemoResult, RunResult
from virtualbatch.plan.plan import readable_bytes
from virtualbatch.report._axes import BAR, HEIGHT, key, named_rows, plain_log_ticks, rows_height
from virtualbatch.report._section import Figure, Section, Table, Tile
from virtualbatch.report._svg import LIGHT, drawing


def demo_section(name: str, result: DemoResult) -> Section:
    """What the demo shows.

    Args:
        name: alone of its kind on the page.
        result: to show.
    """
    settings, whole, accumulated = result.settings, result.whole, result.accumulated
    averaged = _updates_averaged(result)
    memory = accumulated.peak_memory_bytes / max(whole.peak_memory_bytes, 1)
    figures = [
        Figure(
            "Loss over updates",
            _losses(f"{name}-updates", result, "updates"),
            "The accumulated batch makes the updates of the whole one, so their lines are one. "
            f"Small batches are noisy: faint is each, bold the mean of the {averaged} around it.",
        ),
        Figure(
            "Loss over time",
            _losses(f"{name}-time", result, "time"),
            "What the clock said at the end of each update; tracing comes before the first, and "
            "reading each loss is counted.",
        ),
        Figure(
            "Peak memory",
            _memory(f"{name}-memory", result),
            f"While training, above what the process held before ({whole.peak_memory_method}).",
        ),
    ]
    differences = (f"{result.small_difference:.1e}", "", f"{result.accumulated_difference:.1e}")
    table = Table(
        "The three runs",
        ("run", "updates", "train loss", "test accuracy", "time", "peak memory", "from whole"),
        [
            (
                title,
                str(run.updates),
                f"{run.train_loss:.4f}",
                f"{run.test_accuracy:.1%}",
                f"{run.fit_seconds:.1f} s",
                readable_bytes(run.peak_memory_bytes),
                difference,
            )
            for title, run, difference in zip(
                _titles(result), result.runs, differences, strict=True
            )
        ],
    )
    trains = "trains" if result.weights_agree else "does NOT train"
    return Section(
        kind="Demo",
        verdict=f"Accumulated from {settings.microbatch_size}, the batch of {settings.batch_size} "
        f"{trains} to the weights of the whole batch",
        tone="good" if result.weights_agree else "bad",
        tiles=[
            Tile(f"{memory:.0%}", "of the whole batch's peak memory"),
            Tile(f"{accumulated.fit_seconds / whole.fit_seconds:.2f} times", "of its time"),
            Tile(f"{result.accumulated_difference:.1e}", "largest difference of a weight"),
            Tile(f"{accumulated.test_accuracy:.1%}", "test accuracy"),
        ],
        text=[result.conclusion],
        figures=figures,
        tables=[table],
    )


def _losses(name: str, result: DemoResult, over: str) -> Markup:
    """Training loss of the three runs.

    Args:
        name: of the figure, alone of its kind on the page.
        result: of the demo.
        over: "updates" or "time".
    """
    settings = result.settings
    smooth = _smooth(result.small.losses, _updates_averaged(result))
    with drawing(name, f"Training loss of the three runs over {over}.", HEIGHT) as found:
        axes = found.axes
        small, whole, accumulated = (_abscissa(run, over) for run in result.runs)
        axes.plot(small, result.small.losses, color=LIGHT["orange"], alpha=0.25, linewidth=1)
        axes.plot(
            small,
            smooth,
            color=LIGHT["orange"],
            label=f"small, {settings.microbatch_size}",
        )
        axes.plot(
            whole,
            result.whole.losses,
            color=LIGHT["grey"],
            linewidth=6,
            label=f"whole, {settings.batch_size}",
        )
        axes.plot(
            accumulated,
            result.accumulated.losses,
            "o-",
            color=LIGHT["blue"],
            markersize=3,
            linewidth=1.5,
            label=f"{settings.batch_size} accumulated",
        )
        axes.set_yscale("log")
        losses = [*smooth, *result.whole.losses, *result.accumulated.losses]
        # A loss may vanish, and a logarithm has no place for that.
        drawn = [loss for loss in losses if loss > 0]
        axes.set_ylim(min(drawn) / 2, max(drawn) * 1.3)
        plain_log_ticks(axes)
        if over == "updates":
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel("updates")
        else:
            axes.set_xlim(left=0)
            axes.set_xlabel("seconds since training began")
        axes.set_ylabel("training loss")
        key(axes)
    return found.svg


def _memory(name: str, result: DemoResult) -> Markup:
    """Peak memory of the three runs as bars.

    Args:
        name: of the figure, alone of its kind on the page.
        result: of the demo.
    """
    peaks = [run.peak_memory_bytes for run in result.runs]
    with drawing(name, "Peak memory of the three runs.", rows_height(len(peaks))) as found:
        axes = found.axes
        named_rows(axes, _titles(result), [readable_bytes(peak) for peak in peaks])
        colours = [LIGHT[colour] for colour in ("orange", "grey", "blue")]
        axes.barh(range(len(peaks)), peaks, height=BAR, color=colours)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(NullLocator())
        axes.spines["bottom"].set_visible(False)
    return found.svg


def _titles(result: DemoResult) -> tuple[str, str, str]:
    settings = result.settings
    return (
        f"small batches of {settings.microbatch_size}",
        f"whole batches of {settings.batch_size}",
        f"{settings.batch_size} accumulated from {settings.microbatch_size}",
    )


def _updates_averaged(result: DemoResult) -> int:
    """Small batches that have the rows of a large one."""
    return -(-result.settings.batch_size // result.settings.microbatch_size)


def _abscissa(run: RunResult, over: str) -> Sequence[float]:
    return run.seconds if over == "time" else range(1, len(run.losses) + 1)


def _smooth(values: Sequence[float], length: int) -> list[float]:
    """The mean of so many values around each; of fewer at both ends, so that none is shifted."""
    sums = [0.0, *accumulate(values)]
    found = []
    for place in range(len(values)):
        reach = min(length // 2, place, len(values) - 1 - place)
        found.append((sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1))
    return found
