"""`make mutants`: small wrong changes of the package, each of which the quick tier must catch.

Each mutant replaces one text of one file in a copy of `src`, and the quick tests that it names run
on that copy. Red is caught. Green means that those tests could not tell: then a test is missing, or
the line does nothing and goes.

Usage: python -m tests.mutants.run [--only TEXT] [--jobs 2]
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tests.run import PARTS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COPIES = ROOT / "build" / "mutants"
# A mutant that makes a loop endless is caught by the time that it takes.
SECONDS = 400


class Mutant(NamedTuple):
    """One wrong change.

    Fields:
        part: name of the list that holds it.
        name: what goes wrong, in words.
        file: below `src/virtualbatch`.
        old: text that stands in the file once.
        new: what it becomes.
        tests: files or folders of tests whose quick tier must turn red.
        backend: Keras' backend, for its mutants.
        engine: the engine on which the conformance suite runs, where `tests` names that.
    """

    part: str
    name: str
    file: str
    old: str
    new: str
    tests: list[str]
    backend: str | None = None
    engine: str | None = None


def mutants() -> list[Mutant]:
    """All mutants, list by list."""
    found: list[Mutant] = []
    for file in sorted(HERE.glob("*.toml")):
        entries: list[dict[str, Any]] = tomllib.loads(file.read_text())["mutant"]
        found += [Mutant(file.stem, **entry) for entry in entries]
    return found


def mutated(mutant: Mutant, text: str) -> str:
    """The text of a file with the mutant's change.

    Raises:
        ValueError: what is to be replaced does not stand in it exactly once.
    """
    count = text.count(mutant.old)
    if count != 1:
        raise ValueError(
            "A mutant replaces a text that stands once in its file. "
            f"Got {count} of {mutant.old!r} in {mutant.file} for {mutant.name!r}. Mend its list."
        )
    return text.replace(mutant.old, mutant.new)


def tried(number: int, mutant: Mutant) -> tuple[str, float]:
    """Runs the tests of a mutant on its copy.

    Returns:
        ("caught by ...", "caught by its time" or what else became of it, seconds).
    """
    copy = COPIES / str(number)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
    place = copy / "virtualbatch" / mutant.file
    place.write_text(mutated(mutant, place.read_text()))
    part = f"keras-{mutant.backend}" if mutant.backend else mutant.part
    given = PARTS[part].environment if part in PARTS else {}
    environment = os.environ | given | {"PYTHONPATH": str(copy)}
    engine = ["--engine", mutant.engine] if mutant.engine else []
    options = ["-x", "-q", "-m", "not thorough", "-p", "no:cacheprovider", "--tb=no"]
    start = time.perf_counter()
    try:
        child = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *mutant.tests, *engine],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "caught by its time", time.perf_counter() - start
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    seconds = time.perf_counter() - start
    if child.returncode == 1:
        failed = [
            line for line in child.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))
        ]
        return f"caught by {failed[0].split(' ')[1] if failed else 'an error'}", seconds
    if child.returncode == 0:
        return "NOT CAUGHT", seconds
    last = (child.stdout + child.stderr).strip().splitlines()[-3:]
    return f"NOT TRIED (pytest ended with {child.returncode}: {' | '.join(last)})", seconds


def main() -> None:
    """Tries all mutants, prints one line each, and fails if one was not caught."""
    parser = argparse.ArgumentParser(description="Tries small wrong changes of the package.")
    parser.add_argument("--only", default="", help="those whose part, name or file has this text")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    options = parser.parse_args()
    chosen = [
        (number, mutant)
        for number, mutant in enumerate(mutants())
        if options.only in f"{mutant.part} {mutant.name} {mutant.file} {mutant.backend}"
    ]
    begin = time.perf_counter()
    missed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = pool.map(lambda pair: tried(*pair), chosen)
        for (_, mutant), (outcome, seconds) in zip(chosen, outcomes, strict=True):
            missed += not outcome.startswith("caught")
            print(f"{mutant.part:10} {mutant.name}: {outcome} ({seconds:.0f} s)", flush=True)
    minutes = (time.perf_counter() - begin) / 60
    print(f"{len(chosen) - missed} of {len(chosen)} mutants caught in {minutes:.1f} minutes")
    raise SystemExit(1 if missed or not chosen else 0)


if __name__ == "__main__":
    main()
