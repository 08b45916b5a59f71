"""What a loss function gives beside its loss, put together again for the whole batch.

A leaf with one entry per row is concatenated, an integer leaf is summed, any other is averaged by
rows. Whether a leaf has one entry per row is judged by its shape at two numbers of rows, because
a shape of 10 may be ten rows or ten classes.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from virtualbatch.torch._batch import Microbatch
from virtualbatch.torch._plan.memory import ERRORS
from virtualbatch.window.shares import accumulator_dtype

# A loop asks the same question at every update, and the answer costs a run of the loss on shapes.
_shapes: weakref.WeakKeyDictionary[Any, dict[Any, list[Any]]] = weakref.WeakKeyDictionary()


def detached(aux: Any) -> Any:
    """The aux of one micro-batch without its graph, which would keep the activations."""
    return pytree.tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, aux)


def merged_aux(
    loss_fn: Callable[[Any], Any],
    microbatches: Sequence[Microbatch],
    found: Sequence[Any],
    shares: Sequence[float],
) -> Any:
    """The aux of the whole batch.

    Args:
        loss_fn: returns (loss, aux).
        microbatches: the window's micro-batches, as the loss function saw them.
        found: their detached aux, in order.
        shares: part of the window's rows that each micro-batch has.

    Returns:
        The structure that the loss function gave. Averages are formed in float32 or wider and
        rounded once.

    Raises:
        TypeError: a leaf can be neither concatenated, summed nor averaged, or the loss cannot be
            run on shapes alone where only that can tell rows from classes.
        ValueError: the structure differs between micro-batches.
    """
    if len(found) == 1:
        return found[0]
    flat = [pytree.tree_flatten(aux) for aux in found]
    structure = flat[0][1]
    if any(other != structure for _, other in flat):
        raise ValueError(
            "aux must have the same structure for every micro-batch. "
            "Got different ones. Return None for what a micro-batch lacks only if all lack it."
        )
    columns = list(zip(*(leaves for leaves, _ in flat), strict=True))
    rows = [microbatch.rows for microbatch in microbatches]
    per_row = [
        all(_length(leaf) == n for leaf, n in zip(column, rows, strict=True)) for column in columns
    ]
    if any(per_row) and len(set(rows)) == 1:
        lengths = _lengths_at(loss_fn, microbatches[0], rows[0] + 1, flat[0][0])
        per_row = [here and n == rows[0] + 1 for here, n in zip(per_row, lengths, strict=True)]
    leaves = [_merged(c, here, shares) for c, here in zip(columns, per_row, strict=True)]
    return pytree.tree_unflatten(leaves, structure)


def _length(leaf: Any) -> int | None:
    return leaf.shape[0] if isinstance(leaf, torch.Tensor) and leaf.dim() else None


def _merged(column: Sequence[Any], per_row: bool, shares: Sequence[float]) -> Any:
    first = column[0]
    if first is None:
        return None
    if per_row:
        return torch.cat(list(column))
    if isinstance(first, torch.Tensor):
        if first.is_floating_point() or first.is_complex():
            wide = getattr(torch, accumulator_dtype(str(first.dtype).removeprefix("torch.")))
            parts = [leaf.to(wide) * share for leaf, share in zip(column, shares, strict=True)]
            return sum(parts[1:], parts[0]).to(first.dtype)
        if first.dtype != torch.bool:
            return sum(column[1:], first)
    elif isinstance(first, float):
        return sum(leaf * share for leaf, share in zip(column, shares, strict=True))
    elif isinstance(first, int) and not isinstance(first, bool):
        return sum(column)
    kind = f"dtype {first.dtype}" if isinstance(first, torch.Tensor) else type(first).__name__
    raise TypeError(
        "A leaf of aux must have one entry per row, or be a number to sum or average. "
        f"Got {kind}. Cast it to an integer or a float."
    )


def _lengths_at(
    loss_fn: Callable[[Any], Any], microbatch: Microbatch, rows: int, leaves: Sequence[Any]
) -> list[int | None]:
    """First axes of the leaves of aux when the loss is run on shapes of another number of rows."""
    known = _known(loss_fn)
    key = (microbatch.rows, *(getattr(leaf, "shape", None) for leaf in leaves))
    if key not in known:
        known[key] = [_length(leaf) for leaf in _fake_leaves(loss_fn, microbatch, rows)]
    return known[key]


def _fake_leaves(loss_fn: Callable[[Any], Any], microbatch: Microbatch, rows: int) -> list[Any]:
    # Autocast keeps casts of parameters: true ones do not fit here, nor false ones afterwards.
    torch.clear_autocast_cache()
    # Tensors without data: nothing is computed, and parameters, buffers and generators stay.
    with (
        torch.compiler.set_stance("force_eager"),
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
    ):
        fake = microbatch.mapped(
            lambda x: torch.empty((rows, *x.shape[1:]), dtype=x.dtype, device=x.device)
        )
        try:
            return pytree.tree_leaves(loss_fn(fake)[1])
        except Exception as error:
            if ERRORS.is_possible(error):
                raise
            raise TypeError(
                "With has_aux=True a loss function must run on shapes alone, with any number of "
                "rows, which tells the leaves of aux that have one entry per row. "
                f"Got {type(error).__name__} with {rows} rows: {error}. "
                "Leave out .item() and branches on values, or pass a microbatch_size that does "
                "not divide the rows."
            ) from error
        finally:
            torch.clear_autocast_cache()


def _known(loss_fn: Any) -> dict[Any, list[Any]]:
    """What was found about aux of this loss function before; empty if it cannot be remembered."""
    # A bound method is a new object at every access, but its instance is not.
    owner = getattr(loss_fn, "__self__", loss_fn)
    try:
        return _shapes.setdefault(owner, {})
    except TypeError:  # not hashable, or without weak references
        return {}
