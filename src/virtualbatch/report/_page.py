"""Turns results into one page of HTML."""

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from virtualbatch import __version__
from virtualbatch.certify.certificate import Certificate
from virtualbatch.demo.result import DemoResult
from virtualbatch.noise.advice import Advice
from virtualbatch.noise.estimate import NoiseEstimate
from virtualbatch.plan.plan import Plan
from virtualbatch.report._certificate import certificate_section
from virtualbatch.report._demo import demo_section
from virtualbatch.report._noise import advice_section, noise_section
from virtualbatch.report._plan import plan_section
from virtualbatch.report._section import Section
from virtualbatch.report._svg import NARROW, PALETTE


def page(results: Sequence[Any]) -> str:
    """The page.

    Args:
        results: at least one result, of the kinds that `virtualbatch.report.write_html` takes.

    Raises:
        TypeError: a result is of another kind.
    """
    sections = [_section(f"p{number}", result) for number, result in enumerate(results)]
    # Names of layers and files come from the user's program, so all text is escaped.
    environment = Environment(
        loader=PackageLoader("virtualbatch.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html: str = environment.get_template("page.html").render(
        sections=sections,
        percent="{:.2%}".format,
        palette=PALETTE,
        narrow=NARROW,
        version=__version__,
    )
    return html


def _section(name: str, result: Any) -> Section:
    if isinstance(result, Plan):
        return plan_section(name, result)
    if isinstance(result, Certificate):
        return certificate_section(result)
    if isinstance(result, DemoResult):
        return demo_section(name, result)
    if isinstance(result, Advice):
        return advice_section(result)
    if _is_history(result):
        return noise_section(name, result)
    raise TypeError(
        "A report shows a Plan, a Certificate, an Advice, the demo's result, or pairs "
        f"(updates made, NoiseEstimate). Got {type(result).__name__}. Pass what plan, certify, "
        "advice or estimate returned."
    )


def _is_history(result: Any) -> bool:
    return (
        isinstance(result, Sequence)
        and len(result) > 0
        and all(
            isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], NoiseEstimate)
            for pair in result
        )
    )
