"""Every python block of README.md and docs/, every docstring example, every example file runs.

The blocks of one page share one namespace and run in order, in an empty folder. A block that cannot
run starts with ```python no-run; it must still be Python. Programs of one Keras backend follow each
other in one process: to load the frameworks takes longer than most programs do.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tests.tiers import tiered

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("**/*.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# What they train runs in the quick tier all the same: tests/torch/test_ddp_example.py.
SLOW_EXAMPLES = {"torch_ddp.py"}
# They run where they are killed and started again: in test_resume.py of their frameworks.
RESUMED = sorted((ROOT / "examples").glob("resume_*.py"))
HERE = [file for file in EXAMPLES if file not in RESUMED]
QUICK = [README, "docstrings", *(file for file in HERE if file.name not in SLOW_EXAMPLES)]
MAX_EXAMPLE_LINES = 60

BLOCK = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
BACKEND = re.compile(r'^os\.environ\["KERAS_BACKEND"\] = "(\w+)"$', re.MULTILINE)
# A framework asks for its devices once.
DEVICES = re.compile(r"set_logical_device_configuration|xla_force_host_platform_device_count")

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
if failed := sum(result.failed for result in results):
    raise AssertionError(f"{failed} docstring examples failed")
"""
# Each program is __main__ for as long as it runs; the first that fails ends the process.
RUN = """
import os, pathlib, runpy, sys
for program in sys.argv[1:]:
    folder = pathlib.Path("in " + pathlib.Path(program).name).absolute()
    folder.mkdir()
    before = os.getcwd()
    os.chdir(folder)
    runpy.run_path(program, run_name="__main__")
    os.chdir(before)
    if "keras" in sys.modules:
        # It numbers the names that it gives.
        sys.modules["keras"].backend.clear_session()
    print(f"\\nran {program}", flush=True)
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


def program_of(source: Path | str, folder: Path) -> Path:
    """The file to run for a page, for an example, or for the docstrings."""
    if source == "docstrings":
        program, text = folder / "docstrings.py", DOCTESTS
    elif source.suffix == ".md":
        # Pages of two folders may share a name.
        name = f"{source.parent.name}_{source.stem}_blocks.py"
        program, text = folder / name, runnable_program(source.read_text())
    else:
        return source
    program.write_text(text)
    return program


def run(sources: Sequence[Path | str], folder: Path) -> Callable[[Path | str], None]:
    """Runs programs in one process.

    Returns:
        A function that raises, with what was printed, where a program did not run to its end.
    """
    programs = {source: program_of(source, folder) for source in sources}
    child = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, programs.values())],
        cwd=folder,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=1000,
        check=False,
    )
    ran = re.findall(r"^ran (.*)$", child.stdout, re.MULTILINE)

    def assert_ran(source: Path | str) -> None:
        if str(programs[source]) not in ran:
            raise AssertionError(
                f"{source} did not run to its end: exit code {child.returncode} after {ran}\n"
                f"{child.stdout[-3000:]}\n{child.stderr[-3000:]}"
            )

    return assert_ran


def process_of(source: Path | str) -> str:
    """The process that a program runs in: of its Keras backend, of devices that it makes, or ""."""
    text = source.read_text() if isinstance(source, Path) else ""
    if source in EXAMPLES and DEVICES.search(text):
        return source.name
    found = BACKEND.search(text)
    return found[1] if found else ""


@pytest.fixture(scope="session")
def assert_runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path | str], None]:
    """Runs what this session of pytest is asked for; raises where it fails."""
    asked = [
        item.callspec.params["source"]
        for item in request.session.items
        if "assert_runs" in getattr(item, "fixturenames", ())
    ]
    ran: dict[str, Callable[[Path | str], None]] = {}

    def check(source: Path | str) -> None:
        process = process_of(source)
        if process not in ran:
            together = [other for other in asked if process_of(other) == process]
            ran[process] = run(together, tmp_path_factory.mktemp("programs"))
        ran[process](source)

    return check


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "source",
    tiered([README, "docstrings", *HERE, *DOCS], QUICK, "pages of docs, and launchers"),
    ids=lambda source: str(source.relative_to(ROOT)) if isinstance(source, Path) else source,
)
def test_program(source: Path | str, assert_runs: Callable[[Path | str], None]) -> None:
    assert_runs(source)


def check_length(example: Path) -> None:
    num_lines = len(example.read_text().splitlines())
    if num_lines > MAX_EXAMPLE_LINES:
        raise AssertionError(
            f"{example.name} has {num_lines} lines, {MAX_EXAMPLE_LINES} are allowed"
        )


def test_examples_are_short() -> None:
    for example in EXAMPLES:
        check_length(example)


def test_there_are_examples() -> None:
    assert {"keras_fit.py", "tensorflow_loop.py", "pandas_frame.py"} <= {
        example.name for example in EXAMPLES
    }


def test_examples_that_resume_are_killed_elsewhere() -> None:
    tests = "".join(file.read_text() for file in (ROOT / "tests").glob("*/test_resume.py"))
    assert [file.name for file in RESUMED if f'"{file.name}"' not in tests] == []


def test_blocks_that_do_not_run_are_python() -> None:
    for page in (README, *DOCS):
        runnable_program(page.read_text())


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
assert __import__("os").listdir() == []
```
"""


def page_with(folder: Path, name: str, rows: int) -> Path:
    page = folder / name
    page.write_text(PAGE.format(rows=rows))
    return page


def test_blocks_of_one_page_share_a_namespace_and_pages_do_not(tmp_path: Path) -> None:
    page = page_with(tmp_path, "page.md", 3)
    other = tmp_path / "other.md"
    other.write_text(
        '```python\nassert "rows" not in globals()\nassert __name__ == "__main__"\n```\n'
    )
    assert_ran = run([page, other], tmp_path)
    assert_ran(page)
    assert_ran(other)


def test_a_failing_block_fails_at_its_line_of_the_page(tmp_path: Path) -> None:
    right, wrong = page_with(tmp_path, "right.md", 3), page_with(tmp_path, "wrong.md", 4)
    after = page_with(tmp_path, "after.md", 3)
    assert_ran = run([right, wrong, after], tmp_path)
    assert_ran(right)
    for page in (wrong, after):
        with pytest.raises(AssertionError, match=r"line 14(.|\n)*AssertionError"):
            assert_ran(page)


def test_a_block_that_does_not_run_must_be_python() -> None:
    with pytest.raises(SyntaxError):
        runnable_program("```python no-run\nrows = = 3\n```\n")


def test_a_long_example_fails(tmp_path: Path) -> None:
    example = tmp_path / "long.py"
    example.write_text("pass\n" * (MAX_EXAMPLE_LINES + 1))
    with pytest.raises(AssertionError, match="61 lines, 60 are allowed"):
        check_length(example)


def test_a_failing_example_fails(tmp_path: Path) -> None:
    example = tmp_path / "failing.py"
    example.write_text("raise ValueError('wrong by a row')")
    with pytest.raises(AssertionError, match="wrong by a row"):
        run([example], tmp_path)(example)


def test_an_example_that_asks_for_a_backend_or_devices_has_a_process_of_its_own() -> None:
    assert process_of(ROOT / "examples" / "keras_jax.py") == "jax"
    assert process_of(ROOT / "examples" / "tensorflow_mirrored.py") == "tensorflow_mirrored.py"
    assert process_of(README) == process_of("docstrings") == ""
