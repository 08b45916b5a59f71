"""Reports: results as one HTML page with plots, that needs nothing else.

The page holds its styles and its plots, no script, and asks no network. Jinja2 and matplotlib make
it; both come with the extra `report` and are imported when a page is written, not before.
"""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from virtualbatch.atomic_write import write_whole
from virtualbatch.certify.certificate import Certificate
from virtualbatch.demo.result import DemoResult
from virtualbatch.noise.advice import Advice
from virtualbatch.noise.estimate import NoiseEstimate
from virtualbatch.plan.plan import Plan

__all__ = ["write_html"]

NEEDED = ("jinja2", "matplotlib")

Result = Plan | Certificate | DemoResult | Advice | Sequence[tuple[int, NoiseEstimate]]


def write_html(file: str | Path, *results: Result) -> None:
    """Writes one self-contained HTML page.

    Equal results give equal pages, byte for byte: no date is in them.

    Args:
        file: to write.
        *results: shown in this order: a `Plan`, a `Certificate`, an `Advice`, the result of the
            demo, or the noise scale over training as pairs (updates made, `NoiseEstimate`).

    Raises:
        ModuleNotFoundError: jinja2 or matplotlib is not installed.
        TypeError: a result is something else.
        ValueError: there is no result.
        OSError: the file cannot be written; what stood there is as it was.

    Example:
        >>> from virtualbatch import Plan, PlanRow
        >>> row = PlanRow(32, 2**20, measured=True, seconds_per_batch=0.5)
        >>> plan = Plan(32, 4, memory_limit=2**21, reason="32 fits.", rows=(row,))
        >>> write_html("plan.html", plan)  # doctest: +SKIP
    """
    if not isinstance(file, str | os.PathLike):
        raise TypeError(f"file must be a path. Got file={file!r}. Pass for example 'plan.html'.")
    write_whole(file, html_of(*results))


def html_of(*results: Result) -> str:
    """The page that `write_html` writes.

    Args:
        *results: as `write_html` takes them.
    """
    require_tools()
    if not results:
        raise ValueError(
            "write_html needs a result. Got none. Pass for example what plan or certify returned."
        )
    from virtualbatch.report._page import page

    return page(results)


def require_tools() -> None:
    """Refuses where a page could not be written.

    Raises:
        ModuleNotFoundError: jinja2 or matplotlib is not installed.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"A report needs {' and '.join(NEEDED)}. Got no {' and no '.join(missing)}. "
            'Run: pip install "virtualbatch[report]"'
        )
