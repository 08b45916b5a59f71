"""The parent of the demo: starts the runs, shows their progress and compares their weights."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from virtualbatch.demo.result import MODES, DemoResult, RunResult, Settings

CHILD = ("-m", "virtualbatch.demo.digits")
NEEDED = ("tensorflow", "keras", "sklearn")

_CHILD_ENVIRONMENT = {
    "KERAS_BACKEND": "tensorflow",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    # glibc keeps freed blocks. With this setting, blocks of 64 KiB and more return to the system at
    # once, so the peak shows only memory in use.
    "MALLOC_MMAP_THRESHOLD_": "65536",
}
_LINES_OF_STDERR = 20


class ChildFailure(RuntimeError):
    """A run's process ended without a result."""


def run_demo(settings: Settings, console: Console, child: tuple[str, ...] = CHILD) -> DemoResult:
    """Trains three times, each in its own process, and prints the table and the conclusion.

    Args:
        settings: the settings that all runs share.
        console: shows the progress and the table.
        child: arguments for Python that start a child.

    Returns:
        The figures.

    Raises:
        ValueError: a package that the demo needs is not installed.
        ChildFailure: a run ended without a result.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"The demo needs {', '.join(NEEDED)}. Got no {', '.join(missing)}. "
            'Run: pip install "virtualbatch[demo]"'
        )
    with (
        tempfile.TemporaryDirectory(prefix="virtualbatch-demo-") as folder,
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("epochs"),
            TimeElapsedColumn(),
            console=console,
            # Redrawing must not take time from the run that is being measured.
            refresh_per_second=2,
        ) as progress,
    ):
        runs = {}
        for mode in MODES:
            task = progress.add_task(_title(mode, settings), total=settings.epochs)
            runs[mode] = run_child(
                mode,
                settings,
                _weights_file(folder, mode),
                on_epoch=partial(_show_epoch, progress, task),
                child=child,
            )
        result = DemoResult(
            settings,
            runs["small"],
            runs["whole"],
            runs["accumulated"],
            small_difference=_largest_difference(folder, "small", "whole"),
            accumulated_difference=_largest_difference(folder, "accumulated", "whole"),
        )
    console.print(_table(result))
    console.print(result.conclusion)
    return result


def run_child(
    mode: str,
    settings: Settings,
    weights: Path,
    on_epoch: Callable[[int], object],
    child: tuple[str, ...] = CHILD,
) -> RunResult:
    """One run in its own process.

    Args:
        mode: one of `virtualbatch.demo.result.MODES`.
        settings: the settings that all runs share.
        weights: the file to which the child writes its weights.
        on_epoch: called with the number of finished epochs.
        child: arguments for Python that start a child.

    Returns:
        The child's figures.

    Raises:
        ChildFailure: the child ended without a result. Its text has the exit code and last lines.
    """
    command = [sys.executable, *child, "--mode", mode, "--weights", str(weights)]
    for field, value in asdict(settings).items():
        command += ["--" + field.replace("_", "-"), str(value)]
    result: RunResult | None = None
    with tempfile.TemporaryFile("w+") as stderr:
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | _CHILD_ENVIRONMENT,
        ) as process:
            try:
                for line in process.stdout or ():
                    event = _event(line)
                    if event.get("event") == "epoch":
                        on_epoch(event["epoch"])
                    elif event.get("event") == "result":
                        del event["event"]
                        result = RunResult(**event)
                process.wait()
            finally:
                # Without this, an interrupt would wait for the end of the training.
                process.kill()
        if process.returncode != 0 or result is None:
            stderr.seek(0)
            lines = stderr.read().splitlines()[-_LINES_OF_STDERR:]
            raise ChildFailure(
                f'The run "{_title(mode, settings)}" ended without a result. '
                f"Got exit code {process.returncode}. Its last lines:\n" + "\n".join(lines)
            )
    return result


def _show_epoch(progress: Progress, task: TaskID, epoch: int) -> None:
    progress.update(task, completed=epoch)


def _event(line: str) -> dict[str, Any]:
    # Frameworks may print to stdout too. Such lines are skipped.
    if not line.startswith('{"event"'):
        return {}
    event: dict[str, Any] = json.loads(line)
    return event


def _weights_file(folder: str, mode: str) -> Path:
    return Path(folder) / f"{mode}.npz"


def _largest_difference(folder: str, mode: str, other: str) -> float:
    with (
        np.load(_weights_file(folder, mode)) as ours,
        np.load(_weights_file(folder, other)) as theirs,
    ):
        return max(float(np.abs(ours[name] - theirs[name]).max()) for name in theirs.files)


def _title(mode: str, settings: Settings) -> str:
    return {
        "small": f"(a) small, {settings.microbatch_size}",
        "whole": f"(b) whole, {settings.batch_size}",
        "accumulated": f"(c) {settings.batch_size} from {settings.microbatch_size}",
    }[mode]


def _table(result: DemoResult) -> Table:
    table = Table(
        caption="Each run in a process of its own. Time: of fit, tracing included. Peak memory: "
        "of fit, above what Python, the framework, the data and the built model held before "
        f"({result.whole.peak_memory_method}). Weights: largest difference from (b).",
        caption_justify="left",
    )
    table.add_column("run", no_wrap=True)
    for heading in (
        "updates",
        "train\nloss",
        "test\naccuracy",
        "time",
        "peak\nmemory",
        "weights\nfrom (b)",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    differences = (result.small_difference, 0.0, result.accumulated_difference)
    for run, difference in zip(result.runs, differences, strict=True):
        table.add_row(
            _title(run.mode, result.settings),
            f"{run.updates}",
            f"{run.train_loss:.4f}",
            f"{run.test_accuracy:.1%}",
            f"{run.fit_seconds:.1f} s",
            f"{run.peak_memory_bytes / 2**20:.0f} MiB",
            "-" if run is result.whole else f"{difference:.1e}",
        )
    return table
