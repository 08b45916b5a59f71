"""The example of a notebook runs in a kernel, and its results are shown as HTML."""

import re
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "notebook.py"
# Of a percent script; the brackets name the kind of a cell that is not code.
CELL = re.compile(r"^# %%(?: \[(\w+)\])?\n", re.MULTILINE)


def cells(script: str) -> list[tuple[str, str]]:
    """Kind ("code" or "markdown") and text of each cell of a percent script."""
    before, *parts = CELL.split(script)
    if before.strip():
        raise ValueError(f"A percent script starts with a cell. Got {before!r} before the first.")
    return [
        (kind, re.sub(r"^# ?", "", text, flags=re.MULTILINE)) if kind else ("code", text)
        for kind, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def test_cells_of_a_percent_script() -> None:
    found = cells("# %% [markdown]\n# # Title\n#\n# text\n\n# %%\na = 1\na\n# %%\n# why\na\n")
    assert found == [
        ("markdown", "# Title\n\ntext\n\n"),
        ("code", "a = 1\na\n"),
        ("code", "# why\na\n"),
    ]
    with pytest.raises(ValueError, match=re.escape(r"Got 'import os\n' before the first")):
        cells("import os\n# %%\n")


def html_of_the_result(cell: Any) -> str:
    """The HTML of what the cell's last line gave, or an empty text."""
    results = [output for output in cell.outputs if output.output_type == "execute_result"]
    return results[0].data.get("text/html", "") if results else ""


@pytest.mark.thorough("it starts a kernel")
# Of the event loop and the sockets of Jupyter's packages.
@pytest.mark.filterwarnings("default")
def test_the_notebook_shows_its_results(tmp_path: Path) -> None:
    # Here, because other tests of this file need none of them.
    import nbclient
    from nbformat import v4

    make = {"code": v4.new_code_cell, "markdown": v4.new_markdown_cell}
    notebook = v4.new_notebook(
        cells=[make[kind](text.strip()) for kind, text in cells(EXAMPLE.read_text())]
    )
    # A cell that raises ends it with an error.
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    _, setup, plan, certificate, noise, report = notebook.cells
    assert setup.outputs == []
    assert "memory limit 976.6 KiB" in html_of_the_result(plan)
    assert "<b>exact: largest error" in html_of_the_result(certificate)
    assert "noise scale" in html_of_the_result(noise)
    page = html_of_the_result(report)
    assert page.startswith("<iframe")
    for kind in ("Plan", "Certificate", "Noise scale"):
        assert f"&quot;kind&quot;&gt;{kind}&lt;" in page
