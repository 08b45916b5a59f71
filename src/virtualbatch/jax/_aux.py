"""The aux of a window's micro-batches, merged for the whole batch."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr, tree_flatten_with_path

from virtualbatch.jax._aux_trace import AuxTrace, leaves_of
from virtualbatch.jax._objective import Call, wide_dtype
from virtualbatch.jax._segment import Cut
from virtualbatch.window.aux import (
    KEEP,
    MAX,
    MEAN,
    ROWS,
    SUM,
    kind_of_dtype,
    kinds_without_rows,
    summed_dtype,
)
from virtualbatch.window.aux import kinds as kinds_of

WORDS = (KEEP, SUM, MEAN, MAX, ROWS)
# The dtypes that each word fits, by the beginning of the dtype's name.
_NUMBERS = ("int", "uint", "float", "bfloat", "complex")
_WHOLE = ("int", "uint", "bool", "key<")
_DTYPES = {SUM: _NUMBERS, MEAN: _NUMBERS[2:], MAX: (*_NUMBERS[:4], "bool")}


def kinds(call: Call, cut: Cut, auxes: Sequence[Any], rows: Sequence[int]) -> list[str]:
    """How each leaf of aux is merged.

    Args:
        call: the call.
        cut: the window.
        auxes: the aux of micro-batches, as arrays or as anything with shapes and dtypes.
        rows: the rows of each of those micro-batches; None where they are not known.

    Returns:
        One kind for each leaf.

    Raises:
        TypeError: a leaf can be neither kept, concatenated, summed nor averaged; or only a trace
            of the loss could show the kind, and the loss cannot be traced.
        ValueError: the structure differs between micro-batches, `aux_merge` does not fit it, or
            a leaf adds to a count that every micro-batch receives.
    """
    structures = [jax.tree.structure(found) for found in auxes]
    leaves = [leaves_of(found) for found in auxes]
    asked = _asked(call.aux_merge, auxes[0])
    for leaf, word in zip(leaves[0], asked, strict=True):
        if word is None and not leaf.length and not leaf.dtype.startswith(_WHOLE):
            kind_of_dtype(leaf.dtype)  # may refuse the leaf, such as a text, before a trace fails
    if call.aux_merge is not None and len(set(structures)) == 1:
        _check_shapes(asked, auxes)
    if None in rows:
        without = kinds_without_rows(structures, leaves)
        return [word or kind for word, kind in zip(asked, without, strict=True)]
    trace = AuxTrace(call, cut, leaves)
    # Twice as many rows: the number of devices, or of rows in a group, must divide them too.
    other = 2 * rows[0]
    origins_at = next((n for n in rows if n != rows[0]), other)
    judged = partial(_judged, trace, auxes[0], rows[0], origins_at)
    return kinds_of(structures, leaves, rows, other, lambda: trace.leaves(other), asked, judged)


def _judged(trace: AuxTrace, aux: Any, rows: int, other: int, number: int, dtype: str) -> str:
    """The kind of a leaf without one entry per row."""
    if not dtype.startswith(_WHOLE):
        return kind_of_dtype(dtype)
    origin = trace.origins(rows, other)[number]
    if not origin.batch and not origin.follows_rows:
        return KEEP
    if origin.counts_on and dtype.startswith(_NUMBERS):
        place = keystr(tree_flatten_with_path(aux)[0][number][0])
        raise ValueError(
            "An integer of aux must count the rows of this call, or be a state that no row "
            f"changes. Got aux{place}, which adds to an integer that every micro-batch receives. "
            "Return the count alone and add it outside; or name how it is merged: "
            'aux_merge="keep", "sum" or "max", or a prefix of aux with these. See '
            "docs/guides/state.md."
        )
    return kind_of_dtype(dtype)


def _asked(aux_merge: Any, aux: Any) -> list[str | None]:
    """The user's word for each leaf of aux; None for a leaf without a word."""
    found: list[str | None] = []

    def spread(word: str | None, part: Any) -> None:
        for path, leaf in tree_flatten_with_path(part)[0]:
            dtype = leaves_of(leaf)[0].dtype
            fits = word not in _DTYPES or dtype.startswith(_DTYPES[word])
            if not fits or (word == ROWS and not getattr(leaf, "shape", ())):
                raise TypeError(
                    f"aux_merge={word!r} must fit the leaf that it names. Got a leaf "
                    f"{keystr(path)} of {dtype}, shape {getattr(leaf, 'shape', ())}. Use "
                    '"keep" for it, or cast the leaf.'
                )
            found.append(word)

    try:
        jax.tree.map(spread, aux_merge, aux, is_leaf=lambda word: word is None)
    except ValueError as error:
        raise ValueError(
            "aux_merge must be one word for all of aux, or a prefix of aux with a word or None in "
            f"every place. Got {aux_merge!r}: {error}. Give each key of aux a word, or None."
        ) from error
    return found


def _check_shapes(asked: Sequence[str | None], auxes: Sequence[Any]) -> None:
    shapes = [[getattr(leaf, "shape", ()) for leaf in jax.tree.leaves(aux)] for aux in auxes]
    for word, first, *others in zip(asked, *shapes, strict=True):
        if word not in (None, ROWS) and any(shape != first for shape in others):
            raise ValueError(
                f"A leaf of aux with aux_merge={word!r} must have the same shape for every "
                f'micro-batch. Got {first} and {others[-1]}. Use "rows" for a leaf that is as '
                "long as a micro-batch."
            )


def routed(kinds: Sequence[str], shares: Any, index: Any, aux: Any) -> tuple[list[Any], list[Any]]:
    """One micro-batch's leaves of aux: (leaves to merge over the window, leaves to concatenate)."""
    merged: list[Any] = []
    rows: list[Any] = []
    if not kinds:
        return merged, rows
    share = jnp.asarray(shares)[index]
    for kind, leaf in zip(kinds, jax.tree.leaves(aux), strict=True):
        if kind == ROWS:
            rows.append(leaf)
        elif kind == KEEP:
            merged.append(leaf)
        elif kind == MEAN:
            wide = jnp.asarray(leaf).astype(wide_dtype(leaf))
            merged.append(wide * share.astype(wide.dtype))
        else:
            merged.append(jnp.asarray(leaf, _wide(leaf) if kind == SUM else None))
    return merged, rows


def _wide(leaf: Any) -> Any:
    """The dtype in which a leaf is summed over the window."""
    dtype = jnp.result_type(leaf)
    return wide_dtype(leaf) if jnp.issubdtype(dtype, jnp.inexact) else summed_dtype(str(dtype))


def merged_kinds(kinds: Sequence[str]) -> list[str]:
    """The kinds of the leaves that are not concatenated."""
    return [kind for kind in kinds if kind != ROWS]


def joined(
    kinds: Sequence[str], example: Any, cut: Cut, merged: Sequence[Any], rows: Sequence[Any]
) -> Any:
    """The aux of the whole batch.

    Args:
        kinds: the kind of each leaf.
        example: the aux of one micro-batch, for its structure and dtypes.
        cut: the window.
        merged: the merged values of the leaves that are not concatenated.
        rows: for each leaf with one entry per row, one array per segment, of shape
            (micro-batches, rows, ...).
    """
    given, pieces = iter(merged), iter(rows)
    leaves, structure = jax.tree.flatten(example)
    result = []
    for kind, leaf in zip(kinds, leaves, strict=True):
        if kind == ROWS:
            result.append(in_order(next(pieces), cut))
        elif kind == KEEP:
            result.append(next(given))
        else:
            dtype = jnp.result_type(leaf)
            result.append(next(given).astype(summed_dtype(str(dtype)) if kind == SUM else dtype))
    return jax.tree.unflatten(structure, result)


def in_order(pieces: Sequence[Any], cut: Cut) -> Any:
    """Joins the arrays of all segments into rows in the caller's order."""
    found = []
    for number, piece in enumerate(pieces):
        if cut.interleaved and number == 0:
            piece = jnp.moveaxis(piece, 0, 1)
        found.append(_merged_axes(piece))
    return found[0] if len(found) == 1 else jnp.concatenate(found)


def _merged_axes(piece: Any) -> Any:
    """Merges axes 0 and 1. If the type has a sharding, the new axis is sharded as the old ones."""
    shape = (piece.shape[0] * piece.shape[1], *piece.shape[2:])
    sharding = jax.typeof(piece).sharding
    spec: Sequence[Any] = getattr(sharding, "spec", ())
    if all(entry is None for entry in spec):
        return piece.reshape(shape)
    first = spec[0] if spec[1] is None else spec[1]
    return jnp.reshape(piece, shape, out_sharding=sharding.update(spec=P(first, *spec[2:])))
