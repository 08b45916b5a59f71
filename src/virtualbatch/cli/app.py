"""The command line: `virtualbatch demo`, `plan`, `check`, `bench` and `doctor`.

No framework is imported here: the demo and the benchmarks run in child processes, and plans and
checks run in the user's program.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.status import Status

from virtualbatch import __version__
from virtualbatch.bench.contender import ALL_PEERS, LIST_PEERS
from virtualbatch.bench.parent import run_bench
from virtualbatch.bench.result import BenchResult
from virtualbatch.bench.settings import Settings as BenchSettings
from virtualbatch.bench.table import tables
from virtualbatch.cli.doctor import diagnose
from virtualbatch.cli.outputs import refuse_unwritable, unwritten, write
from virtualbatch.cli.peers import listing
from virtualbatch.cli.refusals import one_line, say
from virtualbatch.cli.target import load
from virtualbatch.demo.parent import run_demo
from virtualbatch.demo.result import Settings
from virtualbatch.plan.search import Search
from virtualbatch.report import html_of

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Keep your batch; name the size that fits. Exact gradient accumulation.",
)

# Output files need not be readable.
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", readable=False, help="Also write the result as JSON."),
]

HtmlFile = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", readable=False, help="Also write a page with plots."),
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
    with one_line():
        refuse_unwritable(json, html)
        settings = Settings(epochs=epochs, batch_size=batch_size, microbatch_size=microbatch_size)
        result = run_demo(settings, Console())
        write("--json", json, result.to_json)
        _report(html, lambda: html_of(result))
    if not result.weights_agree:
        raise typer.Exit(1)


@app.command()
def plan(
    target: TargetName,
    batch_size: Annotated[int, typer.Option(help="Rows of the batch to plan for, 2 or more.")],
    memory_limit: Annotated[
        str | None,
        typer.Option(help='Such as "2GiB", or "80%" of the memory left; default: all memory left.'),
    ] = None,
    json: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Find the micro-batch that fits and is fast, before anything is trained."""
    with one_line():
        if batch_size < 2:
            raise ValueError(
                "--batch-size must be 2 or more, because one row cannot be cut. "
                f"Got --batch-size {batch_size}. Pass the rows of one update."
            )
        refuse_unwritable(json, html, target=target)
        # With this allocator TensorFlow counts bytes on a CPU too. It reads the variable when it is
        # imported.
        os.environ.setdefault("TF_CPU_ALLOCATOR_USE_BFC", "true")
        program = load(target, batch_size)
        with _progress():
            result = program.plan(memory_limit)
        say(f"{result}\n\nWrite: {program.engine.line.format(result.microbatch_size)}")
        write("--json", json, result.to_json)
        _report(html, lambda: html_of(result))


@app.command("certify", help="The same as check: its name in Python.")
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
    with one_line():
        refuse_unwritable(json, html, target=target)
        result = load(target, batch_size).certify(microbatch_size)
        say(result)
        write("--json", json, result.to_json)
        _report(html, lambda: html_of(result))
    if not result.exact:
        raise typer.Exit(1)


@app.command()
def bench(
    engine: Annotated[
        list[str] | None, typer.Option(help="One engine; may be repeated. All that are installed.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="MLP, CNN, transformer, tokens or pairs; may be repeated."),
    ] = None,
    peers: Annotated[
        str,
        typer.Option(help="all or none; list only shows them and what is not installed."),
    ] = ALL_PEERS,
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds, of MLP and tokens.")] = False,
    page: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            readable=False,
            help="Also measure other sizes of micro-batches and models, and write a page of "
            "Markdown with plots beside it.",
        ),
    ] = None,
    json: JsonFile = None,
) -> None:
    """Measure accumulation against its alternatives, and check each result.

    The exit code is 1 if the update of virtualbatch differs from that of the uncut batch, or if a
    case ended without a result.
    """
    with one_line():
        refuse_unwritable(json, page=page)
        settings = BenchSettings(engine or (), model or (), peers, quick, sweeps=page is not None)
        if peers == LIST_PEERS:
            _refuse_to_write_a_list(json, page)
            Console().print(listing(settings))
            return
        with Console(stderr=True).status("measuring") as status:
            result = run_bench(settings, status.update)
        Console().print(tables(result))
        write("--json", json, result.to_json)
        if page is not None:
            _write_page(page, result)
    if result.failures or not result.ours_is_right:
        raise typer.Exit(1)


def _refuse_to_write_a_list(json: Path | None, page: Path | None) -> None:
    for option, file in (("--json", json), ("--page", page)):
        if file is not None:
            raise ValueError(
                f"--peers {LIST_PEERS} measures nothing, so there is nothing to write. "
                f"Got {option} {file}. Leave one of them out."
            )


def _write_page(page: Path, result: BenchResult) -> None:
    from virtualbatch.bench.page import page_of
    from virtualbatch.bench.plots import write_plots

    try:
        plots = write_plots(page.parent, result)
    except OSError as error:
        raise unwritten("--page", page, error) from error
    write("--page", page, lambda: page_of(result, plots))
    say(f"Page: {page}")


class _Shown(logging.Handler):
    """Shows the latest record in a status line."""

    def __init__(self, status: Status):
        super().__init__()
        self._status = status

    def emit(self, record: logging.LogRecord) -> None:
        self._status.update(record.getMessage())


@contextmanager
def _progress() -> Iterator[None]:
    """Shows the questions of a search in a terminal."""
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
    with one_line():
        refuse_unwritable(json)
        diagnosis = diagnose()
        say(diagnosis)
        write("--json", json, diagnosis.to_json)


def _report(html: Path | None, page: Callable[[], str]) -> None:
    if write("--html", html, page):
        say(f"Report: {html}")
