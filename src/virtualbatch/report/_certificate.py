"""A certificate as a section: the error of each layer against the tolerance."""

import math
import re
from collections.abc import Mapping

from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, NullLocator

from virtualbatch.certify.certificate import Certificate
from virtualbatch.report._axes import BAR, named_rows, rows_height
from virtualbatch.report._section import Figure, Section, Table, Tile
from virtualbatch.report._svg import LIGHT, SMALL, drawing

_MOST_LAYERS = 24

# The last part of a parameter's name: `.weight`, `/kernel` or `['kernel']`.
_LAST_PART = re.compile(r"(?<=.)([./][^./\[\]]+|\['[^']*'\])$")
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def certificate_section(name: str, certificate: Certificate) -> Section:
    """What a certificate says.

    Args:
        name: alone of its kind on the page.
        certificate: to show.
    """
    layers = len(_by_layer(certificate.parameters))
    figures, tables = [], []
    if certificate.parameters:
        caption = (
            "The largest error of the layer's parameters, in the certificate's own units. Left of "
            "the mark is rounding."
        )
        if layers > _MOST_LAYERS:
            caption += f" The other {layers - _MOST_LAYERS} layers have no larger ones."
        title = "Error of each layer" if layers <= _MOST_LAYERS else "Layers with the largest error"
        figures.append(Figure(title, _layer_errors(f"{name}-layers", certificate), caption))
        worst = _worst_first(certificate.parameters)
        tables.append(
            Table(
                f"All {len(worst)} parameters",
                ("parameter", "error"),
                [(parameter, _error(error)) for parameter, error in worst],
            )
        )
    return Section(
        kind="Certificate",
        verdict="Exact: accumulating gives the update of the whole batch"
        if certificate.exact
        else "Not exact: accumulating does not give the update of the whole batch",
        tone="good" if certificate.exact else "bad",
        tiles=[
            Tile(_error(certificate.max_error), "largest error of a parameter"),
            Tile(_error(certificate.tolerance), "tolerance, from rounding"),
            Tile(_error(certificate.loss_error), "error of the loss"),
            Tile(str(len(certificate.parameters)), "parameters compared"),
        ],
        findings=certificate.findings,
        text=certificate.notes,
        figures=figures,
        tables=tables,
    )


def _layer_errors(name: str, certificate: Certificate) -> Markup:
    """The largest error of each layer as a bar, against the tolerance.

    Args:
        name: of the figure, alone of its kind on the page.
        certificate: a certificate of at least one parameter.
    """
    tolerance = certificate.tolerance
    shown = _by_layer(certificate.parameters)[:_MOST_LAYERS]
    finite = [error for _, error in shown if 0 < error < math.inf] + [tolerance]
    low, high = min(finite) / 10, max(finite) * 10
    label = f"Largest error of each layer, against a tolerance of {tolerance:.1e}."
    with drawing(name, label, 65 + rows_height(len(shown))) as found:
        axes = found.axes
        named_rows(axes, [layer for layer, _ in shown], [_error(error) for _, error in shown])
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        for place, (_, error) in enumerate(shown):
            end = high if not math.isfinite(error) else max(error, low)
            colour = LIGHT["blue"] if error <= tolerance else LIGHT["red"]
            axes.barh(place, end - low, left=low, height=BAR, color=colour)
        for place in range(len(shown)):
            # Not through the names.
            axes.vlines(tolerance, place - 0.7 * BAR, place + 0.7 * BAR, color=LIGHT["ink"])
        axes.annotate(
            f"tolerance {tolerance:.1e}",
            (tolerance, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right" if math.log(high / tolerance) < math.log(tolerance / low) else "left",
            fontsize=SMALL,
        )
        axes.xaxis.set_major_formatter(FuncFormatter(_power_of_ten))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("relative error")
    return found.svg


def _power_of_ten(value: float, _: int) -> str:
    return "10" + f"{round(math.log10(value))}".translate(_SUPERSCRIPTS)


def _error(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.1e}" if value else "0"


def _by_layer(parameters: Mapping[str, float]) -> list[tuple[str, float]]:
    """Layers with the largest error of their parameters, the worst first."""
    layers: dict[str, float] = {}
    for name, error in _worst_first(parameters):
        layers.setdefault(_LAST_PART.sub("", name), error)
    return list(layers.items())


def _worst_first(parameters: Mapping[str, float]) -> list[tuple[str, float]]:
    # Not a number is worse than any.
    return sorted(parameters.items(), key=lambda item: (not math.isnan(item[1]), -item[1]))
