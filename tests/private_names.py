"""Private names of a framework that our source uses, so that tests can name each of them."""

import ast
import re
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src/virtualbatch"
_PRIVATE = re.compile(r"_[a-z]\w*")
# What `typing.NamedTuple` documents.
_PUBLIC = {"_replace"}


def private_names(room):
    """Private attributes of anything but `self`, as attributes or in texts, in a folder of src."""
    found = set()
    for node in _nodes(room):
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id == "self"
            name = "" if own else node.attr
        else:
            name = getattr(node, "value", "")
        if isinstance(name, str) and _PRIVATE.fullmatch(name):
            found.add(name)
    return found - _PUBLIC


def private_imports(room, private):
    """What is imported from private modules, as "module.name".

    Args:
        room: a folder of src.
        private: pattern of the modules.
    """
    return {
        f"{node.module}.{alias.name}"
        for node in _nodes(room)
        if isinstance(node, ast.ImportFrom) and re.match(private, node.module or "")
        for alias in node.names
    }


def _nodes(room):
    for file in sorted((SOURCE / room).rglob("*.py")):
        yield from ast.walk(ast.parse(file.read_text()))
