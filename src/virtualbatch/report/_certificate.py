"""A certificate as a section of the page: the error of each layer, and the tolerance."""

import math
import re
from collections.abc import Mapping

from virtualbatch.certify.certificate import Certificate
from virtualbatch.report._section import Bar, Bars, Section, Table, Tile

_MOST_LAYERS = 24
_MOST_TICKS = 6

# The last part of a parameter's name: `.weight`, `/kernel` or `['kernel']`.
_LAST_PART = re.compile(r"(?<=.)([./][^./\[\]]+|\['[^']*'\])$")
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def certificate_section(certificate: Certificate) -> Section:
    """A certificate with its findings and errors.

    Args:
        certificate: the certificate to show.
    """
    layers = len(_by_layer(certificate.parameters))
    figures, tables = [], []
    if certificate.parameters:
        caption = (
            "The largest error of the layer's parameters, relative to the parameter's largest "
            "gradient, or for a training loop to the change by its updates. Errors left of the "
            "mark are rounding."
        )
        if layers > _MOST_LAYERS:
            caption += f" The other {layers - _MOST_LAYERS} layers have no larger errors."
        title = "Error of each layer" if layers <= _MOST_LAYERS else "Layers with the largest error"
        figures.append(_layer_errors(title, certificate, caption))
        worst = _worst_first(certificate.parameters)
        tables.append(
            Table(
                f"All {len(worst)} parameters",
                ("parameter", "relative error"),
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


def _layer_errors(title: str, certificate: Certificate, caption: str) -> Bars:
    """The largest error of each layer on a logarithmic axis, with the tolerance.

    Args:
        title: the title of the plot.
        certificate: a certificate with at least one parameter.
        caption: the caption of the plot.
    """
    tolerance = certificate.tolerance
    shown = _by_layer(certificate.parameters)[:_MOST_LAYERS]
    finite = [error for _, error in shown if 0 < error < math.inf] + [tolerance]
    # Take logarithms: a tenth of the smallest number could be rounded to 0.
    low, high = math.log10(min(finite)) - 1, math.log10(max(finite)) + 1

    def place(error: float) -> float:
        if not math.isfinite(error):
            return 1.0
        return (math.log10(error) - low) / (high - low) if error > 0 else 0.0

    powers = range(math.ceil(low), math.floor(high) + 1)
    step = -(-len(powers) // _MOST_TICKS)
    return Bars(
        title,
        f"Largest error of each layer, against a tolerance of {tolerance:.1e}.",
        [
            Bar(
                _on_one_line(layer),
                _error(error),
                place(error),
                "blue" if error <= tolerance else "red",
            )
            for layer, error in shown
        ],
        caption,
        mark=(place(tolerance), f"tolerance {tolerance:.1e}"),
        ticks=[((power - low) / (high - low), _power_of_ten(power)) for power in powers[::step]],
        axis="relative error",
    )


def _power_of_ten(power: int) -> str:
    return "10" + str(power).translate(_SUPERSCRIPTS)


def _on_one_line(name: str) -> str:
    """The name without control characters, which HTML does not allow."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)


def _error(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.1e}" if value else "0"


def _by_layer(parameters: Mapping[str, float]) -> list[tuple[str, float]]:
    """(layer, largest error of its parameters), the largest error first."""
    layers: dict[str, float] = {}
    for name, error in _worst_first(parameters):
        layers.setdefault(_LAST_PART.sub("", name), error)
    return list(layers.items())


def _worst_first(parameters: Mapping[str, float]) -> list[tuple[str, float]]:
    # NaN counts as the largest error.
    return sorted(parameters.items(), key=lambda item: (not math.isnan(item[1]), -item[1]))
