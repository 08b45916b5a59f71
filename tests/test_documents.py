"""Every python block of README.md and docs/, every docstring example, every example file runs.

The blocks of one page share one namespace and run in order, in a process of their own and in an
empty folder. A block that cannot run starts with ```python no-run; it must still be Python.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MAX_EXAMPLE_LINES = 60

BLOCK = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)

# `virtualbatch bench` imports a peer's module only where that peer is installed.
DOCTESTS = """
import doctest, importlib, importlib.util, pkgutil, virtualbatch
peers = {"accelerate", "lightning", "transformers"}
absent = {f"torch_{peer}" for peer in peers if importlib.util.find_spec(peer) is None}
names = [module.name for module in pkgutil.walk_packages(virtualbatch.__path__, "virtualbatch.")]
results = [
    doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    for name in ["virtualbatch", *names]
    if name.split(".")[-1] not in {"__main__", *absent}
]
raise SystemExit(sum(result.failed for result in results))
"""


def runnable_program(page: str) -> str:
    """The page's python blocks, each line where the page has it, so that errors name it."""
    program = [""] * (page.count("\n") + 1)
    for block in BLOCK.finditer(page):
        language, *marks = block["info"].split() or [""]
        if language != "python":
            continue
        if "no-run" in marks:
            compile(block["code"], "a block marked no-run", "exec")
            continue
        first = page.count("\n", 0, block.start("code"))
        lines = block["code"].splitlines()
        program[first : first + len(lines)] = lines
    return "\n".join(program)


def run_in(folder: Path, *arguments: str | Path) -> None:
    """Runs Python in `folder`; raises with what it printed when it fails."""
    child = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    if child.returncode != 0:
        raise AssertionError(
            f"{arguments[-1]} ended with exit code {child.returncode}\n"
            f"{child.stdout[-3000:]}\n{child.stderr[-3000:]}"
        )


def run_page(page: Path, folder: Path) -> None:
    program = folder / f"{page.stem}_blocks.py"
    program.write_text(runnable_program(page.read_text()))
    run_in(folder, program)


def check_example(example: Path, folder: Path) -> None:
    num_lines = len(example.read_text().splitlines())
    if num_lines > MAX_EXAMPLE_LINES:
        raise AssertionError(
            f"{example.name} has {num_lines} lines, {MAX_EXAMPLE_LINES} are allowed"
        )
    run_in(folder, example)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page: Path, tmp_path: Path) -> None:
    run_page(page, tmp_path)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example(example: Path, tmp_path: Path) -> None:
    check_example(example, tmp_path)


def test_there_are_examples() -> None:
    assert {"keras_fit.py", "tensorflow_loop.py", "pandas_frame.py"} <= {
        example.name for example in EXAMPLES
    }


def test_docstring_examples(tmp_path: Path) -> None:
    run_in(tmp_path, "-c", DOCTESTS)


PAGE = """\
```bash
not python
```

```python
rows = 3
```
text
```python no-run
rows = rows + a_name_that_is_nowhere
```

```python
assert rows == {rows}
```
"""


def test_blocks_of_one_page_share_a_namespace(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.format(rows=3))
    run_page(page, tmp_path)


def test_a_failing_block_fails_at_its_line_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.format(rows=4))
    with pytest.raises(AssertionError, match=r"line 14(.|\n)*AssertionError"):
        run_page(page, tmp_path)


def test_a_block_that_does_not_run_must_be_python() -> None:
    with pytest.raises(SyntaxError):
        runnable_program("```python no-run\nrows = = 3\n```\n")


def test_a_long_example_fails(tmp_path: Path) -> None:
    example = tmp_path / "long.py"
    example.write_text("pass\n" * (MAX_EXAMPLE_LINES + 1))
    with pytest.raises(AssertionError, match="61 lines, 60 are allowed"):
        check_example(example, tmp_path)


def test_a_failing_example_fails(tmp_path: Path) -> None:
    example = tmp_path / "failing.py"
    example.write_text("raise ValueError('wrong by a row')")
    with pytest.raises(AssertionError, match="wrong by a row"):
        check_example(example, tmp_path)
