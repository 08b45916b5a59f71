"""A measured figure stands in one place: a page of docs/measured/, and a few of them in README too.

README's figures are compared with the page that their row or paragraph links. Pages on how to use
the library hold no tables of figures, and no row of figures stands twice in docs/.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
WITHOUT_FIGURES = ["start", "guides", "recipes", "coming_from"]

USES = sorted(page for folder in WITHOUT_FIGURES for page in (DOCS / folder).glob("*.md"))

FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`]*`")
MODELS = {"mlp", "cnn", "transformer", "tokens"}
LINK = re.compile(r"\]\((docs/measured/\w+\.md)")
# A count of rows or updates is no figure: it has neither a unit nor a decimal point.
FIGURE = re.compile(
    r"(?<![\w.,])(?:\d+(?:\.\d+)?e[-+]\d+|\d[\d,]*(?:\.\d+)? (?:%|times|ms|s|MiB)(?!\w)|\d+\.\d+)"
)
TIMED = re.compile(r"\d ?(?:us|ms|s|KiB|MiB|GiB|MB|GB|times)\b")
NUMBER = re.compile(r"\**~?\d+\.\d+|\**\d+(?:\.\d+)? %|\**\d+(?:\.\d+)?e[-+]?\d+")


def section(page: str, heading: str) -> str:
    """What stands under a heading of the second level."""
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    if not found:
        raise AssertionError(f"no section {heading}")
    return found[1]


def units(text: str) -> Iterator[str]:
    """Rows of tables, and paragraphs."""
    for paragraph in re.split(r"\n{2,}", text):
        if paragraph.lstrip().startswith("|"):
            yield from paragraph.strip().splitlines()
        else:
            yield paragraph


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in CODE.sub("", row).strip().strip("|").split("|")]


def occurs(figure: str, page: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(figure)}(?![\w]|\.\d)", page) is not None


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9_][\w.=]*", text.lower()))


def rows(page: str) -> Iterator[tuple[list[str], list[str]]]:
    """The head of the table and the cells, of each row of a page's tables."""
    for lines in re.findall(r"(?:^\|.*\n?)+", FENCED.sub("", page), re.MULTILINE):
        head, *others = (
            [cell.strip() for cell in row.split("|")[1:-1]] for row in lines.split("\n")
        )
        yield from ((head, row) for row in others if row)


def stands(figure: str, unit: str, page: str) -> bool:
    """Whether a row of the page, on what the unit is about, has the figure for a model it names."""
    named = words(unit)
    for head, row in rows(page):
        subject = words(row[0].split(",")[0])
        if 2 * len(subject & named) < max(len(subject), 1):
            continue
        models = [name for name in head if words(name) & MODELS]
        asked = [name for name in models if words(name) & named]
        for name, cell in zip(head, row, strict=True):
            if occurs(figure, cell) and not (asked and name in models and name not in asked):
                return True
    return False


def unmeasured(text: str) -> Iterator[str]:
    """Figures of a text that the page which they link does not hold, or that link none."""
    for unit in units(text):
        pages = [(ROOT / link).read_text() for link in LINK.findall(unit)]
        for figure in FIGURE.findall(CODE.sub("", unit)):
            if not any(stands(figure, unit, page) for page in pages):
                yield figure


def unlike(table: str, measured: str) -> Iterator[str]:
    """Errors in per cent that are not, to one digit, among the measured ones."""
    for row in table.splitlines():
        for percent in re.findall(r"(\d+(?:\.\d+)?) %(?! or less)", row):
            if not occurs(f"{float(percent) / 100:.0e}", measured):
                yield f"{percent} %"


def rows_of_figures(page: str) -> Iterator[str]:
    """Rows of tables with a time or an amount of memory, or with two numbers that were measured."""
    for row in FENCED.sub("", page).splitlines():
        if row.lstrip().startswith("|"):
            found = cells(row)
            if (
                any(TIMED.search(cell) for cell in found)
                or sum(bool(NUMBER.match(cell)) for cell in found) >= 2
            ):
                yield row.strip()


def repeated(pages: list[str]) -> list[str]:
    """Rows of figures that stand on two pages, or twice on one."""
    rows = Counter(row for page in pages for row in rows_of_figures(page))
    return [row for row, times in rows.items() if times > 1]


def test_the_figures_of_the_readme_are_measured() -> None:
    assert list(unmeasured(section(README.read_text(), "Measured"))) == []


def test_the_errors_in_the_readme_are_measured() -> None:
    page = README.read_text()
    table = page[page.index("| in | the option | is off by |") :].split("\n\n")[0]
    assert list(unlike(table, (DOCS / "measured" / "peers.md").read_text())) == []


@pytest.mark.parametrize("page", USES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_a_page_for_users_has_no_table_of_figures(page: Path) -> None:
    assert list(rows_of_figures(page.read_text())) == []


def test_no_row_of_figures_stands_twice() -> None:
    assert repeated([page.read_text() for page in sorted(DOCS.glob("**/*.md"))]) == []


def test_a_doctored_figure_is_found() -> None:
    measured = section(README.read_text(), "Measured")
    first = FIGURE.findall(CODE.sub("", measured))[0]
    assert list(unmeasured(measured.replace(first, "7.77e-77"))) == ["7.77e-77"]
    assert list(unmeasured("It takes 3.21 times as long.")) == ["3.21 times"]
    assert list(unmeasured("| 12 rows | `3.21` | 17 |")) == []
    with pytest.raises(AssertionError, match="no section"):
        section("# A page\n", "Measured")


def test_a_figure_belongs_to_its_row_and_model() -> None:
    page = (
        "| torch | MLP | CNN |\n| --- | --- | --- |\n"
        "| Accelerate, compiled | 1.50 | **1.02** of 1.2 |\n| Lightning | 1.82 | 1.12 |\n"
    )
    assert stands("1.02", "`Accelerate`, a CNN", page)
    assert stands("1.50", "Accelerate", page)
    assert not stands("1.50", "Accelerate, a CNN", page)
    assert not stands("1.82", "Accelerate", page)


def test_a_figure_is_no_part_of_another() -> None:
    assert [occurs("1.05", page) for page in ("| 1.05 |", "11.05", "1.052", "1.05.")] == [
        *(True, False, False, True)
    ]


def test_a_doctored_error_is_found() -> None:
    assert list(unlike("| Keras | 30 % |\n| ours | 9 % or less |", "by 5e-01")) == ["30 %"]
    assert list(unlike("| Keras | 50 % |", "by 5e-01")) == []


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ("| MLP | 3.6 ms |", True),
        ("| MLP | 1.14 | **0.59** |", True),
        ("| MLP | 18 % | 2e-7 |", True),
        ("| a size | `2 GiB`, `1.14`, `1.15` |", False),
        ("| up to 8 shapes | 2 |", False),
        ("```\n| 3 ms |\n```", False),
    ],
)
def test_what_a_row_of_figures_is(row: str, found: bool) -> None:
    assert bool(list(rows_of_figures(row))) is found


def test_a_row_that_stands_twice_is_found() -> None:
    row = "| MLP | 1.14 | 0.59 |"
    assert repeated([row, f"{row}\n| CNN | 1.15 | 0.60 |", "| a | b |\n| a | b |"]) == [row]
