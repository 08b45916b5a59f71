"""Turns a matplotlib figure into SVG inside a page, in the page's light and dark colours."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure


class Colour(NamedTuple):
    """A colour of the page by its role.

    Fields:
        name: the name of the CSS variable.
        light: the colour on a light page, as #rrggbb. Figures are drawn in these colours. Then each
            colour is replaced by its CSS variable, so no two roles may share a colour.
        dark: the colour on a dark page.
    """

    name: str
    light: str
    dark: str


# Nearly everybody can tell blue from orange. Each has a contrast of 4.5 to 1 with its page.
PALETTE = (
    Colour("page", "#ffffff", "#15181d"),
    Colour("panel", "#f6f7f9", "#1c2026"),
    Colour("ink", "#1c2430", "#e6e9ee"),
    Colour("quiet", "#5b6675", "#a0a9b6"),
    Colour("line", "#dde2e8", "#343b45"),
    Colour("blue", "#1f6299", "#74b3ea"),
    Colour("orange", "#a8560c", "#eba35a"),
    Colour("grey", "#9aa5b2", "#6c7887"),
    Colour("green", "#1f7a4a", "#63c793"),
    Colour("red", "#b3261e", "#f28b82"),
)
LIGHT = {colour.name: colour.light for colour in PALETTE}
_VARIABLES = {colour.light: f"var(--{colour.name})" for colour in PALETTE}

# NARROW is the width of a plot on a phone or in half of the page, WIDE of one across the page. A
# desktop shows both at the same scale, so their texts are equally large.
NARROW = 440
WIDE = 900
SMALL = 12
_HEIGHT = 290

_SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 13.0,
    "text.color": LIGHT["ink"],
    "axes.edgecolor": LIGHT["line"],
    "axes.labelcolor": LIGHT["quiet"],
    "axes.labelpad": 7.0,
    "axes.labelsize": SMALL,
    "axes.facecolor": "none",
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LIGHT["line"],
    "grid.linewidth": 1.0,
    "xtick.color": LIGHT["line"],
    "xtick.labelcolor": LIGHT["quiet"],
    "xtick.labelsize": SMALL,
    "ytick.color": LIGHT["line"],
    "ytick.labelcolor": LIGHT["quiet"],
    "ytick.labelsize": SMALL,
    "ytick.major.size": 0.0,
    "ytick.minor.size": 0.0,
    "xtick.minor.size": 0.0,
    "lines.linewidth": 2.0,
    "lines.markersize": 7.0,
    "lines.solid_capstyle": "round",
}
# Metadata is left out, because a date or a program name would make equal reports differ.
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


class Drawing:
    """A figure with one pair of axes; see `drawing`.

    Attributes:
        axes: the axes to draw on.
        svg: the SVG element, once the block has ended.
    """

    axes: Axes
    svg: Markup


@contextmanager
def drawing(name: str, label: str, width: int) -> Iterator[Drawing]:
    """Draws a figure with the page's fonts and colours. Sets `svg` at the end of the block.

    Args:
        name: the name of the figure, unique on the page. Its ids derive from the name.
        label: what the figure shows, for screen readers.
        width: `NARROW` or `WIDE`.
    """
    found = Drawing()
    with matplotlib.rc_context(_SETTINGS | {"svg.hashsalt": f"{name}-{width}"}):
        # At 72 dots per inch a point is a pixel.
        figure = Figure(figsize=(width / 72, _HEIGHT / 72), dpi=72, layout="constrained")
        found.axes = figure.add_subplot()
        yield found
        file = io.BytesIO()
        with warnings.catch_warnings():
            # Matplotlib measures text with this font, but the browser shows it in its own.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure.savefig(file, format="svg", transparent=True, metadata=_NO_METADATA)
    found.svg = _themed(file.getvalue(), label)


def _themed(svg: bytes, label: str) -> Markup:
    """The SVG as an element of an HTML page, coloured by the page's variables."""
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        # HTML writes these names without namespaces.
        element.tag = element.tag.rpartition("}")[2]
        for key in list(element.attrib):
            element.set(key.rpartition("}")[2], element.attrib.pop(key))
        if element.tag == "g":
            # The ids of groups are the same in all figures, and nothing refers to them.
            element.attrib.pop("id", None)
        if "style" in element.attrib:
            element.set("style", _style(element.attrib["style"]))
    # A style sheet in a figure would apply to the whole page.
    for definitions in root.findall("defs"):
        for rule in definitions.findall("style"):
            definitions.remove(rule)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": label,
    }
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _style(style: str) -> str:
    """Inline CSS with the page's colours and font."""
    declarations = (part.strip().partition(": ") for part in style.split(";"))
    return "; ".join(
        f"{key}: {_VARIABLES.get(value, value)}"
        for key, _, value in declarations
        if key and key != "font-family"
    )
