"""An example that is killed (SIGKILL) and started again, until it comes to its end.

    python -m tests.lives examples/resume_jax.py FOLDER SEED KILLS file

Each life is a process, forked from one that has imported what the example imports. It ends at or
soon after some line of the example, some call of its loss, or some file that is written or moved:
inside a window, between two of them, or inside a checkpoint. The first life, in a folder of its
own, is not killed.
"""

import ast
import functools
import importlib
import json
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
_COUNTED = "counted: "
_MOVES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}


class Life(NamedTuple):
    """What became of one start of an example.

    Fields:
        status: 0, or minus the signal that ended it.
        output: what it printed.
    """

    status: int
    output: str

    @property
    def begins_after(self) -> int:
        """Updates that it found in a checkpoint; 0 also where it died before it could tell."""
        found = re.search(r"begins after (\d+) updates", self.output)
        return int(found[1]) if found else 0

    @property
    def end(self) -> str:
        """Its last line, which tells updates and weights."""
        return self.output.rstrip().rpartition("\n")[2]


class Point(NamedTuple):
    """Where a life ends.

    Fields:
        where: "line" of the example, "loss" or "file".
        number: the how-manieth of them.
        delay: seconds that pass from there.
    """

    where: str
    number: int
    delay: float


def lives(
    example: Path, folder: Path, seed: int | None, kills: int, wheres: Sequence[str]
) -> list[Life]:
    """One life that nobody kills; and those in another folder, of which the last comes to its end.

    Args:
        example: the program.
        folder: where it runs.
        seed: of the points at which it is killed; None: once, at the last one, where
            nothing is left to do but to tell the end.
        kills: how often, unless it comes to its end before.
        wheres: at what it is killed, in turn; see `Point`.
    """
    whole, counted = _life(example, folder / "whole", None, wheres)
    found = [whole]
    if whole.status != 0:
        return found
    draw = random.Random(seed)
    for kill in range(kills):
        where = wheres[kill % len(wheres)]
        if seed is None:
            number, delay = counted[where], 0.0
        else:
            # Late enough for a checkpoint, and early enough for several lives.
            number = draw.randint(counted[where] // 4, counted[where] // 2)
            delay = draw.choice([0.0, draw.uniform(0.0, 0.004)])
        point = Point(where, number, delay)
        found.append(_life(example, folder / "killed", point, wheres)[0])
        if found[-1].status != -signal.SIGKILL:
            return found
    found.append(_life(example, folder / "killed", None, wheres)[0])
    return found


def lives_of_a_process(
    example: Path, folder: Path, seed: int | None, kills: int, where: str, **variables: str
) -> list[Life]:
    """The same, forked from a new process, for frameworks that a fork does not survive.

    Args:
        example: see `lives`.
        folder: see there.
        seed: see there.
        kills: see there.
        where: at what it is killed.
        variables: of the environment.
    """
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    child = subprocess.run(
        [sys.executable, "-m", "tests.lives", example, folder, json.dumps(seed), str(kills), where],
        cwd=ROOT,
        env=os.environ | path | variables,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    if child.returncode != 0:
        raise AssertionError(f"{child.stdout[-2000:]}\n{child.stderr[-4000:]}")
    return [Life(*life) for life in json.loads(child.stdout.splitlines()[-1])]


def assert_resumed(found: Sequence[Life]) -> None:
    """Raises unless lives that were killed led to the end of one that was not, to the bit."""
    whole, *killed = found
    shown = "\n".join(f"{life.status}: {life.output}" for life in found)
    assert whole.status == 0, shown
    assert len(killed) > 1, shown
    last = killed[-1]
    assert last.status == 0, shown
    assert "updates, weights" in whole.end, shown
    assert last.end == whole.end, shown
    assert any(life.begins_after for life in killed), f"nothing was resumed\n{shown}"


def _life(
    example: Path, folder: Path, point: Point | None, wheres: Sequence[str]
) -> tuple[Life, dict[str, int]]:
    """Forks a process that runs the example, and waits for it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile("w+") as output:
        with warnings.catch_warnings():
            # Threads of libraries are idle here, and a child starts its own.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            _run(example, folder, point, wheres, output.fileno())
        _, status = os.waitpid(child, 0)
        output.seek(0)
        text, _, counted = output.read().partition(_COUNTED)
    return Life(os.waitstatus_to_exitcode(status), text), json.loads(counted or "{}")


def _run(
    example: Path, folder: Path, point: Point | None, wheres: Sequence[str], output: int
) -> None:
    """Runs the example in this process, and ends the process."""
    status = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.chdir(folder)
        warnings.resetwarnings()
        warnings.simplefilter("ignore")
        counted = _count(example, point, wheres)
        runpy.run_path(str(example), run_name="__main__")
        sys.settrace(None)
        print(f"{_COUNTED}{json.dumps(counted)}", flush=True)
        status = 0
    except BaseException:
        sys.settrace(None)
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
    finally:
        # Nothing of the parent's runs at the end of this process, such as its other tests.
        os._exit(status)


def _count(example: Path, point: Point | None, wheres: Sequence[str]) -> dict[str, int]:
    """Counts what happens in this process from here on, and kills it at a point."""
    counted = dict.fromkeys(wheres, 0)

    def happens(where: str) -> None:
        counted[where] += 1
        if point is not None and (where, counted[where]) == point[:2]:
            _kill_after(point.delay)

    if "line" in wheres:

        def line(frame: Any, event: str, _: Any) -> Callable[..., Any]:
            if event == "line":
                happens("line")
            return line

        file = str(example)
        sys.settrace(lambda frame, *_: line if frame.f_code.co_filename == file else None)
    if "loss" in wheres:
        functional = importlib.import_module("torch.nn.functional")
        cross_entropy = functional.cross_entropy

        @functools.wraps(cross_entropy)
        def heard(*args: Any, **more: Any) -> Any:
            happens("loss")
            return cross_entropy(*args, **more)

        functional.cross_entropy = heard
    if "file" in wheres:

        def audit(event: str, args: Any) -> None:
            # Of `open` the flags, which are of no use in words.
            if event in _MOVES or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)):
                happens("file")

        sys.addaudithook(audit)
    return counted


def _kill_after(seconds: float) -> None:
    """Kills this process; meanwhile it goes on, also where no Python runs."""

    def kill() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    if seconds:
        threading.Thread(target=kill, daemon=True).start()
    else:
        kill()


def _import_like(example: Path) -> None:
    for statement in ast.parse(example.read_text()).body:
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                importlib.import_module(alias.name)
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            importlib.import_module(statement.module)


if __name__ == "__main__":
    program, place = (Path(argument).resolve() for argument in sys.argv[1:3])
    _import_like(program)
    print(json.dumps(lives(program, place, *map(json.loads, sys.argv[3:5]), sys.argv[5:])))
