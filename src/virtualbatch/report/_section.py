"""The parts of a page, before they are HTML."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from markupsafe import Markup

from virtualbatch.certify.certificate import Finding

Tone = Literal["good", "bad", "plain"]


class Figure(NamedTuple):
    """A plot of lines.

    Fields:
        title: shown above the plot.
        svg: the SVG element, for a phone or for half of the page.
        caption: shown below the plot.
        wide: the same plot for the whole width of the page; None if another stands beside it.
    """

    title: str
    svg: Markup
    caption: str
    wide: Markup | None = None


class Bar(NamedTuple):
    """One bar.

    Fields:
        name: what is measured.
        value: the measurement as text, with its unit.
        share: the length of the bar, from 0 to 1.
        colour: a name in the palette.
    """

    name: str
    value: str
    share: float
    colour: str


class Bars(NamedTuple):
    """A plot of bars. It is HTML, so it takes any width and its text keeps its size.

    Fields:
        title: shown above the plot.
        label: what the plot shows, for screen readers.
        bars: the bars, from top to bottom.
        caption: shown below the plot.
        mark: (place, name) of a line across all bars; the place is from 0 to 1.
        ticks: (place, name) of each tick on the axis.
        axis: the name of the axis, with its unit.
    """

    title: str
    label: str
    bars: Sequence[Bar]
    caption: str
    mark: tuple[float, str] | None = None
    ticks: Sequence[tuple[float, str]] = ()
    axis: str = ""


class Tile(NamedTuple):
    """A number that matters.

    Fields:
        value: the number with its unit.
        label: what the number is.
    """

    value: str
    label: str


class Table(NamedTuple):
    """All numbers.

    Fields:
        title: what the numbers are.
        heading: one text per column, with the unit in brackets.
        rows: one text per cell; the first is the row's name.
        chosen: the index of the row that is highlighted, or None.
    """

    title: str
    heading: Sequence[str]
    rows: Sequence[Sequence[str]]
    chosen: int | None = None


class Section(NamedTuple):
    """One result.

    Fields:
        kind: the kind of the result, in a word or two.
        verdict: the result in one line.
        tone: whether the result is good.
        tiles: the numbers that matter.
        text: paragraphs below the tiles.
        figures: plots.
        tables: all numbers.
        findings: what is wrong or worth knowing.
    """

    kind: str
    verdict: str
    tone: Tone
    tiles: Sequence[Tile]
    text: Sequence[str]
    figures: Sequence[Figure | Bars]
    tables: Sequence[Table] = ()
    findings: Sequence[Finding] = ()
