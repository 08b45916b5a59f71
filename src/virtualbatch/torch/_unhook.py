"""Removes hooks by identity, because an interrupt may come before a handle is kept."""

from typing import Any


def unhook(hook: Any, *tables: Any) -> None:
    """Takes a hook out of the dictionaries that PyTorch keeps hooks in.

    Args:
        hook: the object that was registered.
        tables: dictionaries from numbers to hooks, or None. The first one has the hook. Others may
            have an entry with the number of the hook.
    """
    first = tables[0]
    for key in [key for key, found in (first or {}).items() if found is hook]:
        # The first table is changed last. If an interrupt comes before, the number is still known.
        for table in reversed(tables):
            table.pop(key, None)
