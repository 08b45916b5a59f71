"""The demo as a section of the page: loss over updates and over time, and peak memory."""

from collections.abc import Sequence
from itertools import accumulate

from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, NullLocator

from virtualbatch.demo.result import DemoResult, RunResult
from virtualbatch.plan.plan import readable_bytes
from virtualbatch.report._axes import key, plain_log_ticks
from virtualbatch.report._section import Bar, Bars, Figure, Section, Table, Tile
from virtualbatch.report._svg import LIGHT, NARROW, drawing


def demo_section(name: str, result: DemoResult) -> Section:
    """The demo's three runs side by side.

    Args:
        name: the name of the section, unique on the page.
        result: the result to show.
    """
    settings, whole, accumulated = result.settings, result.whole, result.accumulated
    averaged = _updates_averaged(result)
    memory = accumulated.peak_memory_bytes / max(whole.peak_memory_bytes, 1)
    figures: list[Figure | Bars] = [
        Figure(
            "Loss over updates",
            _losses(f"{name}-updates", result, "updates"),
            "The accumulated batch makes the same updates as the whole batch, so their lines "
            "coincide. Small batches are noisy: the faint line shows each update, the bold line "
            f"the mean of the {averaged} updates around it.",
        ),
        Figure(
            "Loss over time",
            _losses(f"{name}-time", result, "time"),
            "Time at the end of each update. It includes tracing, before the first update, and "
            "reading each loss.",
        ),
        _memory(result),
    ]
    differences = (f"{result.small_difference:.1e}", "", f"{result.accumulated_difference:.1e}")
    table = Table(
        "The three runs",
        (
            "run",
            "updates",
            "training loss",
            "test accuracy",
            "time (s)",
            "peak memory (MiB)",
            "largest weight difference",
        ),
        [
            (
                title,
                str(run.updates),
                f"{run.train_loss:.4f}",
                f"{run.test_accuracy:.1%}",
                f"{run.fit_seconds:.1f}",
                f"{run.peak_memory_bytes / 2**20:.1f}",
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
            Tile(
                f"{accumulated.fit_seconds / whole.fit_seconds:.2f} times", "the whole batch's time"
            ),
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
        name: the name of the figure, unique on the page.
        result: the result of the demo.
        over: "updates" or "time".
    """
    settings = result.settings
    smooth = _smooth(result.small.losses, _updates_averaged(result))
    with drawing(name, f"Training loss of the three runs over {over}.", NARROW) as found:
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
        # A logarithmic axis has no place for a loss of zero.
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


def _memory(result: DemoResult) -> Bars:
    """Peak memory of the three runs."""
    peaks = [run.peak_memory_bytes for run in result.runs]
    largest = max(*peaks, 1)
    return Bars(
        "Peak memory",
        "Peak memory of the three runs.",
        [
            Bar(title, readable_bytes(peak), max(peak, 0) / largest, colour)
            for title, peak, colour in zip(
                _titles(result), peaks, ("orange", "grey", "blue"), strict=True
            )
        ],
        f"During training, above what the process held before ({result.whole.peak_memory_method}).",
    )


def _titles(result: DemoResult) -> tuple[str, str, str]:
    settings = result.settings
    return (
        f"small batches of {settings.microbatch_size}",
        f"whole batches of {settings.batch_size}",
        f"{settings.batch_size} accumulated from {settings.microbatch_size}",
    )


def _updates_averaged(result: DemoResult) -> int:
    """The number of small batches that have as many rows as one large batch."""
    return -(-result.settings.batch_size // result.settings.microbatch_size)


def _abscissa(run: RunResult, over: str) -> Sequence[float]:
    return run.seconds if over == "time" else range(1, len(run.losses) + 1)


def _smooth(values: Sequence[float], length: int) -> list[float]:
    """The mean of the `length` values around each value.

    Near both ends it takes fewer values, as many before as after, so that the line is not shifted.
    """
    sums = [0.0, *accumulate(values)]
    found = []
    for place in range(len(values)):
        reach = min(length // 2, place, len(values) - 1 - place)
        found.append((sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1))
    return found
