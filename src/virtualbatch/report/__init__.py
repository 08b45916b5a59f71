"""Reports: results as one HTML page with plots.

The page is one file with its styles and plots inside. It runs no script and loads nothing. The
extra `report` installs jinja2 and matplotlib, which are imported only when a page is made.
"""

import importlib.util
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from virtualbatch.atomic_write import write_whole
from virtualbatch.certify.certificate import Certificate
from virtualbatch.demo.result import DemoResult
from virtualbatch.noise.advice import Advice
from virtualbatch.noise.estimate import NoiseEstimate
from virtualbatch.plan.plan import Plan

__all__ = ["Report", "write_html"]

NEEDED = ("jinja2", "matplotlib")

Result = Plan | Certificate | DemoResult | Advice | Sequence[tuple[int, NoiseEstimate]]

# The height is fixed, because only a script could fit the frame to its page.
_FRAME_HEIGHT = 640


class Report:
    """Results as one page, to look at in a notebook.

    As the last line of a cell it shows the page in a frame, so that the page's styles and the
    notebook's do not mix. `write_html` writes the same page to a file.

    Args:
        *results: as for `write_html`.

    Attributes:
        html: the page.

    Raises:
        ModuleNotFoundError: jinja2 or matplotlib is not installed.
        TypeError: a result is something else.
        ValueError: there is no result.

    Example:
        >>> from virtualbatch import Plan, PlanRow
        >>> row = PlanRow(32, 2**20, measured=True, seconds_per_batch=0.5)
        >>> plan = Plan(32, 4, memory_limit=2**21, reason="32 fits.", rows=(row,))
        >>> Report(plan).html[:15]  # doctest: +SKIP
        '<!doctype html>'
    """

    def __init__(self, *results: Result):
        self.html = html_of(*results)

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{escape(self.html)}" sandbox="" title="Report of virtualbatch" '
            f'style="width: 100%; height: {_FRAME_HEIGHT}px; border: 0"></iframe>'
        )


def write_html(file: str | Path, *results: Result) -> None:
    """Writes one self-contained HTML page.

    Equal results give equal pages, byte for byte, because a page holds no date.

    Args:
        file: path of the page.
        *results: shown in this order. Each is a `Plan`, a `Certificate`, an `Advice`, the result
            of the demo, or a list of pairs (updates made, `NoiseEstimate`).

    Raises:
        ModuleNotFoundError: jinja2 or matplotlib is not installed.
        TypeError: a result is something else.
        ValueError: there is no result.
        OSError: the file cannot be written; a file that was there is unchanged.

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
    """The page as text.

    Args:
        *results: as for `write_html`.
    """
    require_tools()
    if not results:
        raise ValueError(
            "A report needs a result. Got none. Pass for example what plan or certify returned."
        )
    from virtualbatch.report._page import page

    return page(results)


def require_tools() -> None:
    """Raises an error if a page cannot be made.

    Raises:
        ModuleNotFoundError: jinja2 or matplotlib is not installed.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"A report needs {' and '.join(NEEDED)}. Got no {' and no '.join(missing)}. "
            'Run: pip install "virtualbatch[report]"'
        )
