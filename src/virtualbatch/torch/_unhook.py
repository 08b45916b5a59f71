"""Removes hooks by identity, because an interrupt may come before a handle is kept."""

from typing import Any


def unhook(hook: Any, *tables: Any) -> None:
    """Takes a hook out of the dictionaries that PyTorch keeps hooks in.

    Args:
        hook: the very object that was registered.
        tables: hooks by number, or None for none; the first of them has the hook, others may have
            something by its number.
    """
    first = tables[0]
    for key in [key for key, found in (first or {}).items() if found is hook]:
        # The first one last: cut before that, the number is still known.
        for table in reversed(tables):
            table.pop(key, None)
