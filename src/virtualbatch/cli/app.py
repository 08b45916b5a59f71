"""The command line: `virtualbatch demo`, `plan`, `check`, `bench` and `doctor`.

No framework is imported here: the demo and the benchmarks run in child processes; plans and
checks are made in the user's own program.
"""

import importlib.util
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.status import Status

from virtualbatch import __version__
from virtualbatch.bench.contender import ALL_PEERS
from virtualbatch.bench.parent import run_bench
from virtualbatch.bench.settings import Settings as BenchSettings
from virtualbatch.bench.table import tables
from virtualbatch.cli.doctor import diagnose
from virtualbatch.cli.target import load
from virtualbatch.demo.parent import ChildFailure, run_demo
from virtualbatch.demo.result import Settings
from virtualbatch.plan.search import Search
from virtualbatch.report import Result, require_tools, write_html

# A bug must show Python's own traceback, and a mistake one plain line instead of a panel.
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Keep your batch; name the size that fits. Exact gradient accumulation.",
)

JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")
]

HtmlFile = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Also write a page with plots, to look at."),
]

TargetName = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="file.py:function or module:function; the function takes the rows of a batch and "
        "returns the arguments of an engine's plan as a dict.",
    ),
]


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Keep your batch; name the size that fits. Exact gradient accumulation."""
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def demo(
    epochs: Annotated[int, typer.Option(help="Passes over the training rows.")] = Settings.epochs,
    batch_size: Annotated[int, typer.Option(help="Rows of the large batch.")] = Settings.batch_size,
    microbatch_size: Annotated[
        int, typer.Option(help="Rows of the small batch and of one micro-batch.")
    ] = Settings.microbatch_size,
    json: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Train on real digits: small batches, the whole batch, the same batch accumulated."""
    _check_writable(json, html)
    try:
        settings = Settings(epochs=epochs, batch_size=batch_size, microbatch_size=microbatch_size)
        result = run_demo(settings, Console())
    except ValueError as mistake:
        _exit(mistake, code=2)
    except ChildFailure as failure:
        _exit(failure, code=1)
    if json is not None:
        json.write_text(result.to_json())
    _report(result, html)
    if not result.weights_agree:
        raise typer.Exit(1)


@app.command()
def plan(
    target: TargetName,
    batch_size: Annotated[int, typer.Option(help="Rows of the batch to plan for, 2 or more.")],
    memory_limit: Annotated[
        str | None,
        typer.Option(help='Such as "2GiB", or "80%" of what is left; all of that if left out.'),
    ] = None,
    json: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Find the micro-batch that fits and is fast, before anything is trained."""
    if batch_size < 2:
        _exit(
            "--batch-size must be 2 or more, because one row cannot be cut. "
            f"Got --batch-size {batch_size}. Pass the rows of one update.",
            code=2,
        )
    _check_writable(json, html)
    # With this allocator TensorFlow counts its bytes on a CPU too. It is chosen at the import.
    os.environ.setdefault("TF_CPU_ALLOCATOR_USE_BFC", "true")
    try:
        found = load(target, batch_size)
        with _progress():
            result = found.plan(memory_limit)
    except (ValueError, TypeError, MemoryError) as mistake:
        _exit(mistake, code=2)
    print(result)
    print(f"\nWrite: {found.engine.line.format(result.microbatch_size)}")
    if json is not None:
        json.write_text(result.to_json())
    _report(result, html)


@app.command()
def check(
    target: TargetName,
    batch_size: Annotated[int, typer.Option(min=2, help="Rows of the batch.")],
    microbatch_size: Annotated[int, typer.Option(min=1, help="Rows of one micro-batch.")],
    json: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Prove that accumulation gives the gradient of the whole batch, or name what breaks it.

    The exit code is 0 if it is exact, 1 if it is not, 2 if it could not be run.
    """
    _check_writable(json, html)
    try:
        found = load(target, batch_size).certify(microbatch_size)
    except (ValueError, TypeError, MemoryError) as mistake:
        _exit(mistake, code=2)
    except Exception:
        # Python's own exit code for an error is 1, which here would say that it is not exact.
        traceback.print_exc()
        raise typer.Exit(2) from None
    print(found)
    if json is not None:
        json.write_text(found.to_json())
    _report(found, html)
    if not found.exact:
        raise typer.Exit(1)


@app.command()
def bench(
    engine: Annotated[
        list[str] | None, typer.Option(help="One engine; may be repeated. All that are installed.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="MLP, CNN, transformer or tokens; may be repeated.")
    ] = None,
    peers: Annotated[str, typer.Option(help="all or none.")] = ALL_PEERS,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few rounds of the two fastest models.")
    ] = False,
    page: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also measure along the size of the cut, and write a page of Markdown with plots "
            "beside it.",
        ),
    ] = None,
    json: JsonFile = None,
) -> None:
    """Measure accumulation beside what one would use instead, and check each result.

    The exit code is 1 if our own update was not that of the uncut batch, or a case ended without
    a result.
    """
    _check_writable(json, page=page)
    try:
        settings = BenchSettings(engine or (), model or (), peers, quick, sweeps=page is not None)
        with Console(stderr=True).status("measuring") as status:
            result = run_bench(settings, status.update)
    except ValueError as mistake:
        _exit(mistake, code=2)
    Console().print(tables(result))
    if json is not None:
        json.write_text(result.to_json())
    if page is not None:
        from virtualbatch.bench.page import page_of
        from virtualbatch.bench.plots import write_plots

        page.write_text(page_of(result, write_plots(page.parent, result)))
        print(f"Page: {page}")
    if result.failures or not result.ours_is_right:
        raise typer.Exit(1)


class _Shown(logging.Handler):
    """Shows the latest record in a status line."""

    def __init__(self, status: Status):
        super().__init__()
        self._status = status

    def emit(self, record: logging.LogRecord) -> None:
        self._status.update(record.getMessage())


@contextmanager
def _progress() -> Iterator[None]:
    """Shows what a search asks, where somebody is looking."""
    logger = logging.getLogger(Search.__module__)
    with Console(stderr=True).status("planning") as status:
        handler = _Shown(status)
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(logging.NOTSET)


@app.command()
def doctor(json: JsonFile = None) -> None:
    """Show what is installed, the devices, the memory limits, and what to run next."""
    _check_writable(json)
    diagnosis = diagnose()
    print(diagnosis)
    if json is not None:
        json.write_text(diagnosis.to_json())


def _check_writable(json: Path | None, html: Path | None = None, page: Path | None = None) -> None:
    """Refuses a file that could not be written, before minutes are spent on its content."""
    for option, file, example in (
        ("--json", json, "result.json"),
        ("--html", html, "report.html"),
        ("--page", page, "benchmarks.md"),
    ):
        if file is None:
            continue
        if not file.parent.is_dir():
            _exit(
                f"{option} must name a file in an existing folder. Got {option} {file}. "
                f"Run: mkdir -p {file.parent}",
                code=2,
            )
        if file.is_dir():
            _exit(
                f"{option} must name a file. Got the folder {file}. Pass {file}/{example}", code=2
            )
    if html is not None:
        try:
            require_tools()
        except ModuleNotFoundError as mistake:
            _exit(mistake, code=2)
    if page is not None and importlib.util.find_spec("matplotlib") is None:
        _exit('Plots need matplotlib. Got none. Run: pip install "virtualbatch[report]"', code=2)


def _report(result: Result, html: Path | None) -> None:
    if html is not None:
        write_html(html, result)
        print(f"Report: {html}")


def _exit(message: object, code: int) -> NoReturn:
    print(f"Error: {message}", file=sys.stderr)
    raise typer.Exit(code)
