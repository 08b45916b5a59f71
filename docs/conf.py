"""The site: `make docs` builds it in build/docs.

The reference is read from the source without importing it, so no framework need be installed.
"""

import ast
import shutil
import tomllib
from pathlib import Path
from typing import Any

from docutils import nodes

_ROOT = Path(__file__).parents[1]
_PROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]


def _without_overloads(source: str) -> str:
    """A module with one signature a function: overloads repeat it for each form of result."""
    lines = source.splitlines(keepends=True)
    for node in reversed(ast.parse(source).body):
        decorators = node.decorator_list if isinstance(node, ast.FunctionDef) else []
        if any(ast.unparse(decorator) == "overload" for decorator in decorators):
            del lines[decorators[0].lineno - 1 : node.end_lineno]
    return "".join(lines)


def _copy(source: Path, copied: Path) -> Path:
    """The package as the reference reads it."""
    shutil.rmtree(copied, ignore_errors=True)
    for file in source.rglob("*.py"):
        target = copied / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_without_overloads(file.read_text()))
    return copied


project = _PROJECT["name"]
author = _PROJECT["authors"][0]["name"]
extensions = ["myst_parser", "autoapi.extension", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
# The same names in single backquotes as in the docstrings; those that are public become links.
default_role = "py:obj"

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
copybutton_exclude = ".linenos, .gp, .go"

myst_heading_anchors = 4

autoapi_dirs = [
    str(_copy(_ROOT / "src" / "virtualbatch", _ROOT / "build" / "reference" / "virtualbatch"))
]
autoapi_ignore = [f"*/virtualbatch/{room}/*" for room in ("bench", "demo", "cli")]
autoapi_generate_api_docs = False
autoapi_add_toctree_entry = False
autoapi_options = ["members", "imported-members", "private-members"]
autoapi_own_page_level = "function"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
maximum_signature_line_length = 76
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Fields", "params_style"), "Source"]
suppress_warnings = [
    # Private constants and modules of frameworks; what the reference names is resolved, or fails.
    "autoapi.python_import_resolution",
]


def _short(app: Any, env: Any, node: nodes.Element, contnode: nodes.Element) -> Any:
    """A type that has no page here, such as `Callable`, without the module that it is from."""
    if node.get("refdomain") == "py" and node.get("reftype") == "class":
        return nodes.Text(node["reftarget"].rpartition(".")[2])
    return None


def setup(app: Any) -> None:
    """Sphinx calls it."""
    app.connect("missing-reference", _short)
