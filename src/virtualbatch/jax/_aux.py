"""The aux of a window's micro-batches, put together again for the whole batch."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from virtualbatch.jax._batch import Cut, is_array, map_arrays, specs
from virtualbatch.jax._objective import Call, wide_dtype
from virtualbatch.window.aux import ROWS, SUM, AuxLeaf, kinds_without_rows
from virtualbatch.window.aux import kinds as kinds_of


def kinds(call: Call, cut: Cut, auxes: Sequence[Any], rows: Sequence[int]) -> list[str]:
    """How each leaf of aux is put together.

    Args:
        call: the call.
        cut: the window.
        auxes: aux of micro-batches; arrays, or anything else with their shapes and dtypes.
        rows: rows of each of those micro-batches; None where they cannot be told.

    Returns:
        One kind for each leaf.

    Raises:
        TypeError: a leaf can be neither concatenated, summed nor averaged, or the loss cannot be
            traced where only that can tell rows from classes.
        ValueError: the structure differs between micro-batches.
    """
    structures = [jax.tree.structure(found) for found in auxes]
    leaves = [_leaves(found) for found in auxes]
    if None in rows:
        return kinds_without_rows(structures, leaves)
    # Twice as many, because devices and groups of rows may divide the rows.
    other = 2 * rows[0]
    return kinds_of(structures, leaves, rows, other, lambda: _leaves(_abstract(call, cut, other)))


def routed(kinds: Sequence[str], shares: Any, index: Any, aux: Any) -> tuple[list[Any], list[Any]]:
    """One micro-batch's leaves of aux: (what is summed over the window, what is concatenated)."""
    sums: list[Any] = []
    rows: list[Any] = []
    if not kinds:
        return sums, rows
    share = jnp.asarray(shares)[index]
    for kind, leaf in zip(kinds, jax.tree.leaves(aux), strict=True):
        if kind == ROWS:
            rows.append(leaf)
        elif kind == SUM:
            sums.append(jnp.asarray(leaf))
        else:
            wide = jnp.asarray(leaf).astype(wide_dtype(leaf))
            sums.append(wide * share.astype(wide.dtype))
    return sums, rows


def joined(
    kinds: Sequence[str], example: Any, cut: Cut, sums: Sequence[Any], rows: Sequence[Any]
) -> Any:
    """The aux of the whole batch.

    Args:
        kinds: kind of each leaf.
        example: aux of one micro-batch, for its structure and dtypes.
        cut: the window.
        sums: the window's sums, for the leaves that are summed or averaged.
        rows: for each leaf with one entry per row, its pieces by segment: an array of shape
            (micro-batches, rows, ...).
    """
    given, pieces = iter(sums), iter(rows)
    leaves, structure = jax.tree.flatten(example)
    result = []
    for kind, leaf in zip(kinds, leaves, strict=True):
        if kind == ROWS:
            result.append(_in_order(next(pieces), cut))
        else:
            result.append(next(given).astype(jnp.result_type(leaf)))
    return jax.tree.unflatten(structure, result)


def _in_order(pieces: Sequence[Any], cut: Cut) -> Any:
    """Pieces of the segments as rows in the caller's order."""
    found = []
    for number, piece in enumerate(pieces):
        if cut.interleaved and number == 0:
            piece = jnp.moveaxis(piece, 0, 1)
        found.append(_merged_axes(piece))
    return found[0] if len(found) == 1 else jnp.concatenate(found)


def _merged_axes(piece: Any) -> Any:
    """Axes 0 and 1 as one; where the type knows its sharding, that of whichever is sharded."""
    shape = (piece.shape[0] * piece.shape[1], *piece.shape[2:])
    sharding = jax.typeof(piece).sharding
    spec: Sequence[Any] = getattr(sharding, "spec", ())
    if all(entry is None for entry in spec):
        return piece.reshape(shape)
    first = spec[0] if spec[1] is None else spec[1]
    return jnp.reshape(piece, shape, out_sharding=sharding.update(spec=P(first, *spec[2:])))


def _leaves(found: Any) -> list[AuxLeaf]:
    return [
        AuxLeaf(tuple(getattr(x, "shape", ())[:1]), str(jnp.result_type(x)))
        if hasattr(x, "dtype") or isinstance(x, int | float | complex)
        else AuxLeaf((), type(x).__name__)
        for x in jax.tree.leaves(found)
    ]


def _abstract(call: Call, cut: Cut, rows: int) -> Any:
    """The aux of a micro-batch with another number of rows, without data."""
    microbatch = specs(cut, rows)

    def aux(arrays: Sequence[Any]) -> Any:
        given = iter(arrays)
        return call.terms(call.arguments(map_arrays(lambda _: next(given), microbatch)))[1]

    try:
        return jax.eval_shape(aux, [x for x in jax.tree.leaves(microbatch) if is_array(x)])
    except (TypeError, ValueError) as error:
        raise TypeError(
            "With has_aux=True a loss function must be traceable with any number of rows, "
            "which tells the leaves of aux that have one entry per row. "
            f"Got {type(error).__name__} with {rows} rows: {error}. "
            "Use JAX operations instead of branches on values and of a fixed number of rows."
        ) from error
