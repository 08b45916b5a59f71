"""Checks that every leaf that a `rowwise` function returns has one entry per row.

Only shapes are checked. By chance, a first axis may have as many entries as there are rows. Engines
find that by trying another number of rows.
"""

from collections.abc import Iterable, Sequence
from typing import Any

# The fix for outputs whose structure changes.
_LACKING = "Return None for what a micro-batch lacks only if all lack it."


def check_entries(outputs: Iterable[tuple[str, Any]], rows: int | None) -> None:
    """Raises an error for outputs that do not have one entry per row.

    Args:
        outputs: pairs of the expression for a leaf, such as "output['z']", and the leaf: an array,
            a traced array, a description of an array, or None, which is allowed.
        rows: rows of the micro-batch of these outputs; None if a trace leaves them open. Then an
            error is raised only for leaves that cannot have rows.

    Raises:
        TypeError: a leaf is not an array.
        ValueError: a leaf has another number of entries.
    """
    for path, leaf in outputs:
        if leaf is None:
            continue
        if not hasattr(leaf, "shape"):
            raise TypeError(
                "What fn returns must be arrays with one entry per row, or None. "
                f"Got {path} of type {type(leaf).__name__}. "
                "Return it from a function of its own, or compute it outside."
            )
        shape = tuple(leaf.shape)
        if shape and (rows is None or shape[0] in (rows, None)):
            continue
        # A mean over rows may be as long as several views of them.
        is_joined = len(shape) > 1 and bool(rows) and shape[0] > rows and shape[0] % rows == 0
        raise ValueError(
            "What fn returns must have one entry per row. "
            f"Got {path} with shape {shape} for {_counted(rows)}. "
            + (
                f"Return the {shape[0] // rows} views as outputs of their own."
                if is_joined and rows != 1
                else "Return one entry per row, and reduce over rows in the loss."
            )
        )


def check_same_structure(first: Sequence[str], later: Sequence[str]) -> None:
    """Raises an error if the structure of outputs changes from one micro-batch to the next.

    Args:
        first: expressions for the leaves of the first micro-batch's outputs, such as "output['z']"
            or "output['z'] is None".
        later: the expressions of a later micro-batch.

    Raises:
        ValueError: they differ.
    """
    if list(first) != list(later):
        raise ValueError(
            "fn must return the same structure for every micro-batch. "
            f"Got {_listed(first)}, and later {_listed(later)}. {_LACKING}"
        )


def _counted(rows: int | None) -> str:
    if rows is None:
        return "any number of rows"
    return "1 row" if rows == 1 else f"{rows} rows"


def _listed(places: Sequence[str]) -> str:
    return ", ".join(places) if places else "nothing"
