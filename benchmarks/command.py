"""What the scripts here share: their options, and a process of its own for each case."""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from virtualbatch.bench.children import result_of


def parser_of(doc: str | None, **defaults: float | str | Iterable[Any]) -> argparse.ArgumentParser:
    """The command line of a script.

    Args:
        doc: its docstring.
        defaults: of its options. Several names are what can be chosen from, and all by default.
    """
    parser = argparse.ArgumentParser(description=doc)
    for name, default in defaults.items():
        if isinstance(default, (float, int, str)):
            parser.add_argument(f"--{name}", type=type(default), default=default)
        else:
            choices = list(default)
            parser.add_argument(f"--{name}", nargs="*", default=choices, choices=choices)
    parser.add_argument("--json", type=Path, help="file for the figures")
    # The case that this process measures, see `apart`.
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    return parser


def apart(*case: str, seconds: float = 600, **variables: str) -> Any:
    """What this script tells of a case, started again with it after `--one`.

    Args:
        case: given beside the options of this process.
        seconds: after which it is ended.
        variables: of its environment, beside those of this process.
    """
    return result_of(", ".join(case), [*sys.argv, "--one", *case], seconds, variables)


def save(file: Path | None, results: Any) -> None:
    """Writes the figures, where a file was named."""
    if file:
        file.write_text(json.dumps(results, indent=2))
