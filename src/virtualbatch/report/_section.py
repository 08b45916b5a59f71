"""The parts of a page, before they are HTML."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from markupsafe import Markup

from virtualbatch.certify.certificate import Finding

Tone = Literal["good", "bad", "plain"]


class Figure(NamedTuple):
    """A plot and what it shows.

    Fields:
        title: above it.
        svg: the element.
        caption: below it.
    """

    title: str
    svg: Markup
    caption: str


class Tile(NamedTuple):
    """A number that matters.

    Fields:
        value: with its unit.
        label: what it is of.
    """

    value: str
    label: str


class Table(NamedTuple):
    """All numbers.

    Fields:
        title: what they are.
        heading: one text per column.
        rows: one text per cell; the first is the row's name.
        chosen: number of the row that stands out, or None.
    """

    title: str
    heading: Sequence[str]
    rows: Sequence[Sequence[str]]
    chosen: int | None = None


class Section(NamedTuple):
    """One result.

    Fields:
        kind: what was done, in a word or two.
        verdict: what came out, in a line.
        tone: whether that is good.
        tiles: the numbers that matter.
        text: paragraphs below.
        findings: what is wrong or worth knowing.
        figures: plots.
        tables: all numbers.
    """

    kind: str
    verdict: str
    tone: Tone
    tiles: Sequence[Tile]
    text: Sequence[str]
    figures: Sequence[Figure]
    tables: Sequence[Table] = ()
    findings: Sequence[Finding] = ()
