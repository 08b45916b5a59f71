"""The site: what `make docs` cannot see, and what must be seen without it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.cli import app
from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("**/*.md"))]
PACKAGE = ROOT / "src" / "virtualbatch"
PUBLIC = ["keras", "torch", "tensorflow", "jax", "transformers", "lightning", "report"]
MAX_LINES = 250
MAX_START_LINES = 60
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as MyST and code hosts make them."""
    headings = re.findall(r"^#+ +(.*)$", FENCED.sub("", page), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in plain}


def broken_links(page: Path) -> Iterator[str]:
    """Relative links of a page that lead nowhere."""
    for target, anchor in re.findall(
        r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", FENCED.sub("", page.read_text())
    ):
        if "://" in target:
            continue
        file = page.parent / target if target else page
        known = anchors(file.read_text()) if file.suffix == ".md" and file.is_file() else {anchor}
        if not file.exists() or (anchor and anchor not in known):
            yield f"{page.name}: {target}#{anchor}"


def public_names(source: str) -> list[str]:
    """What a module's `__all__` lists."""
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            return list(ast.literal_eval(statement.value))
    raise AssertionError("no __all__")


def missing(reference: str, module: str, names: list[str]) -> list[str]:
    """Public names without a directive of their own."""
    return [
        name
        for name in names
        if not re.search(
            rf"^\.\. autoapi(function|class|data):: {module}\.{name}$", reference, re.MULTILINE
        )
    ]


def test_links_lead_somewhere() -> None:
    assert [broken for page in PAGES for broken in broken_links(page)] == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b`\n[x](#a-b) [x](#c) [x](none.md) ![x](page.md#a-b)\n```\n[x](no)\n```\n"
    )
    assert list(broken_links(page)) == ["page.md: #c", "page.md: none.md#"]


def unlisted(folder: Path) -> list[str]:
    """Pages of a folder that its index links nowhere a reader of plain Markdown would see."""
    index = FENCED.sub("", (folder / "index.md").read_text())
    pages = sorted(page.name for page in folder.glob("*.md") if page.name != "index.md")
    return [name for name in pages if f"]({name})" not in index]


def test_each_index_links_its_pages() -> None:
    folders = sorted(index.parent for index in DOCS.glob("*/index.md"))
    assert len(folders) == 7
    assert {folder.name: unlisted(folder) for folder in folders if unlisted(folder)} == {}


def test_a_page_that_only_a_toctree_names_is_found(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.md").write_text("")
    (tmp_path / "index.md").write_text("[A](a.md)\n```{toctree}\na\nb\n```\n")
    assert unlisted(tmp_path) == ["b.md"]


@pytest.mark.parametrize("engine", ["", *PUBLIC])
def test_the_reference_has_every_public_name(engine: str) -> None:
    module = ".".join(["virtualbatch", *filter(None, [engine])])
    names = public_names((PACKAGE / engine / "__init__.py").read_text())
    if engine:
        # The neutral ones, which an engine hands on.
        names = [name for name in names if name not in {"Window"} | _handed_on(engine)]
    reference = (DOCS / "reference" / f"{engine or 'virtualbatch'}.rst").read_text()
    assert missing(reference, module, names) == []


def _handed_on(engine: str) -> set[str]:
    """Public names that an engine has from the neutral rooms."""
    tree = ast.parse((PACKAGE / engine / "__init__.py").read_text())
    return {
        alias.name
        for statement in tree.body
        if isinstance(statement, ast.ImportFrom)
        and re.match(r"virtualbatch\.(window|plan|certify|noise)\.", statement.module or "")
        for alias in statement.names
    }


def test_a_name_without_a_place_in_the_reference_is_found() -> None:
    assert public_names('__all__ = ["a", "ab"]') == ["a", "ab"]
    assert missing(".. autoapifunction:: m.ab\n", "m", ["a", "ab"]) == ["a"]


def test_pages_are_short() -> None:
    lines = {page: page.read_text().count("\n") for page in PAGES}
    assert {page.name: n for page, n in lines.items() if n > MAX_LINES} == {}
    starts = [page for page in PAGES if page.parent.name == "start"]
    assert len(starts) == 5
    assert {page.name: lines[page] for page in starts if lines[page] > MAX_START_LINES} == {}


def test_the_page_of_the_commands_is_what_they_say() -> None:
    """`typer virtualbatch.cli.app utils docs --name virtualbatch --title "Command line"`."""
    page = DOCS / "reference" / "command_line.md"
    asked = ["virtualbatch.cli.app", "utils", "docs", "--name", "virtualbatch"]
    written = CliRunner().invoke(app, [*asked, "--title", "Command line"])
    assert "virtualbatch bench" in written.output
    assert page.read_text().split() == written.output.split()
