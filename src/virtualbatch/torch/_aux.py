"""The aux of a window's micro-batches, merged for the whole batch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from virtualbatch.torch._microbatch import Microbatch
from virtualbatch.torch._plan.memory import ERRORS
from virtualbatch.torch._signals import held_back
from virtualbatch.window.aux import (
    MEAN,
    NOTHING,
    ROWS,
    AuxLeaf,
    AuxShapes,
    kinds,
    kinds_without_rows,
    summed_dtype,
)
from virtualbatch.window.shares import Shares, accumulator_dtype

_shapes = AuxShapes()


def detached(aux: Any) -> Any:
    """The aux of one micro-batch without its graph, which would keep the activations."""
    return pytree.tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, aux)


def merged_aux(
    loss_fn: Callable[[Any], Any],
    microbatches: Sequence[Microbatch],
    found: Sequence[Any],
    of_window: Shares,
) -> Any:
    """The aux of the whole batch.

    Args:
        loss_fn: returns (loss, aux).
        microbatches: the window's micro-batches, as the loss function saw them.
        found: their detached aux, in order.
        of_window: the shares of the window.

    Returns:
        The structure that the loss function gave. Averages are formed in float32 or wider and
        rounded once. Sums of integers of fewer than 32 bits are int32.

    Raises:
        TypeError: a leaf can be neither concatenated, summed nor averaged; or only a run on shapes
            alone can tell rows from classes, and the loss cannot run that way.
        ValueError: the structure differs between micro-batches.
    """
    if len(found) == 1:
        return found[0]
    flat = [pytree.tree_flatten(aux) for aux in found]
    leaves = [list(map(_leaf, leaves)) for leaves, _ in flat]
    structures = [structure for _, structure in flat]

    def merged(found_kinds: Sequence[str], shares: Sequence[float]) -> Any:
        columns = zip(*(leaves for leaves, _ in flat), strict=True)
        pairs = zip(columns, found_kinds, strict=True)
        return pytree.tree_unflatten([_merged(c, kind, shares) for c, kind in pairs], structures[0])

    rows = [microbatch.rows for microbatch in microbatches if microbatch.rows is not None]
    if not rows:
        return merged(kinds_without_rows(structures, leaves), of_window.of_rows_or_term())
    first, other = microbatches[0], rows[0] + 1

    def at_other() -> Sequence[AuxLeaf]:
        kinds_of_leaves = [(x.shape, x.dtype) if _is_tensor(x) else type(x) for x in first.leaves]
        key = (first.places, tuple(kinds_of_leaves), tuple(leaves[0]))
        return _shapes.of(
            loss_fn, key, lambda: list(map(_leaf, _fake_leaves(loss_fn, first, other)))
        )

    return merged(kinds(structures, leaves, rows, other, at_other), of_window.rows)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def _leaf(x: Any) -> AuxLeaf:
    if not _is_tensor(x):
        return AuxLeaf((), type(x).__name__)
    return AuxLeaf(tuple(x.shape[:1]), str(x.dtype).removeprefix("torch."), tuple(x.shape[1:]))


def _merged(column: Sequence[Any], kind: str, shares: Sequence[float]) -> Any:
    first = column[0]
    if kind == NOTHING:
        return None
    if kind == ROWS:
        return torch.cat(list(column))
    dtype = _leaf(first).dtype
    if kind != MEAN:
        wide = summed_dtype(dtype)
        counts = [_widened(leaf, wide) for leaf in column] if wide != dtype else list(column)
        return sum(counts[1:], counts[0])
    if not _is_tensor(first):
        return sum(leaf * share for leaf, share in zip(column, shares, strict=True))
    wide = getattr(torch, accumulator_dtype(dtype))
    parts = [leaf.to(wide) * share for leaf, share in zip(column, shares, strict=True)]
    return sum(parts[1:], parts[0]).to(first.dtype)


def _widened(leaf: Any, dtype: str) -> Any:
    # A number of NumPy may stand among tensors.
    return leaf.to(getattr(torch, dtype)) if _is_tensor(leaf) else leaf.astype(dtype)


def _fake_leaves(loss_fn: Callable[[Any], Any], microbatch: Microbatch, rows: int) -> list[Any]:
    # Autocast caches casts of parameters. Real casts must not be used in this fake run, and fake
    # casts must not be used after it.
    torch.clear_autocast_cache()
    # Fake tensors have no data, so nothing is computed. Parameters, buffers and generators do not
    # change.
    with (
        held_back(),
        torch.compiler.set_stance("force_eager"),
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
    ):
        fake = microbatch.with_rows(
            rows, lambda x: torch.empty((rows, *x.shape[1:]), dtype=x.dtype, device=x.device)
        )
        try:
            return pytree.tree_leaves(loss_fn(fake)[1])
        except Exception as error:
            if ERRORS.is_possible(error) or ERRORS.is_by_hand(error):
                raise
            raise TypeError(
                "With has_aux=True a loss function must run on shapes alone, with any number of "
                "rows: this shows which leaves of aux have one entry per row. Got "
                f"{type(error).__name__} with {rows} rows: {error}. Leave out .item() and "
                "branches on values, or pass a microbatch_size that does not divide the rows."
            ) from error
        finally:
            torch.clear_autocast_cache()
