"""A window outside a trace: un-jitted micro-batches, one after another.

Shares are numbers on the host here, so a micro-batch without weight is not differentiated.
"""

from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp

from virtualbatch.jax._aux import joined, kinds, merged_kinds, routed
from virtualbatch.jax._float8 import largest, put_together, seen, split
from virtualbatch.jax._merge import merged
from virtualbatch.jax._objective import Call, wide_dtype
from virtualbatch.jax._segment import Cut
from virtualbatch.jax._stats import part_of, stats_of
from virtualbatch.jax._weights import part
from virtualbatch.window.shares import Shares


def run_eager(
    call: Call,
    cut: Cut,
    shares: Shares,
    accumulator_dtype: Any,
    stats: bool,
    losses: list[dict[Any, Any]] | None = None,
) -> tuple[Any, Any, Any, Any]:
    """The loss, aux, gradients and statistics of a window, outside a trace.

    Args:
        call: the call.
        cut: the window.
        shares: the shares of the window.
        accumulator_dtype: the dtype of the sums; None for promote(parameter dtype, float32).
        stats: whether statistics are asked for.
        losses: receives, for each micro-batch, the terms that count, by name.

    Returns:
        (loss, aux, gradients, stats). aux is None without has_aux. stats is None if not asked for.
    """
    alone = cut.count == 1
    total: Any = None
    dtypes: Any = None
    auxes = []
    new_values: list[list[Any]] = []
    norms: list[Any] = []
    for index, microbatch in enumerate(cut.microbatches()):
        args = call.arguments(microbatch, None if alone else index)
        counting = part(shares, index)
        count: dict[Any, Any] = {}
        if counting is not None:
            names, factors, factor = counting
            terms, aux, gradients = call.gradients(args, names, factors)
            auxes.append(aux)
            dtypes = _dtypes(terms, gradients)
            count = {name: terms[name] for name in names or terms}
            loss = [
                terms[name].astype(wide_dtype(terms[name])) * factors.get(name, 1.0)
                for name in count
            ]
            added, new = split(gradients)
            new_values.append(seen(new))
            found = (reduce(jnp.add, loss), added)
            total = _accumulated(total, found, factor, accumulator_dtype)
            if stats:
                share = float(shares.of_rows_or_term()[index])
                norms.append(_norm(added, factor, share, accumulator_dtype))
        elif call.has_aux:
            auxes.append(call.terms(args)[1])
        if losses is not None:
            losses.append(count)
    if total is None:
        terms, gradients, new = _without_weight(call, call.arguments(cut.segments[0].get(0)))
        dtypes, new_values = _dtypes(terms, gradients), [new]
        total = jax.tree.map(jnp.zeros_like, (next(iter(terms.values())), split(gradients)[0]))
    loss, added = total
    gradients = put_together(dtypes[1], added, reduce(largest, new_values))
    aux = _merged_aux(call, cut, shares, auxes)
    mean_square = sum(norms, jnp.zeros(()))
    of_window = stats_of(split(gradients)[0], shares, mean_square, None) if stats else None
    return loss.astype(dtypes[0]), aux, gradients, of_window


def _without_weight(call: Call, args: Any) -> tuple[Any, Any, list[Any]]:
    """Types of terms and gradients, and new values, of a window whose weights are all 0."""
    terms, _, gradients = jax.eval_shape(lambda: call.gradients(args, None))
    if not split(gradients)[1]:
        return terms, gradients, []
    return terms, gradients, seen(split(call.gradients(args, None)[2])[1])


def _dtypes(terms: dict[Any, Any], gradients: Any) -> tuple[Any, Any]:
    return jnp.result_type(*terms.values()), jax.tree.map(lambda x: x.dtype, gradients)


def _accumulated(total: Any, found: Any, factor: float, dtype: Any) -> Any:
    """The sum so far plus factor times a micro-batch's results, formed in the dtype of the sums."""
    return _scaled(found, factor, dtype) if total is None else _added(total, found, factor, dtype)


@partial(jax.jit, static_argnums=2)
def _scaled(found: Any, factor: Any, dtype: Any) -> Any:
    loss, gradients = found
    wide = jax.tree.map(lambda x: x.astype(wide_dtype(x, dtype)) * factor, gradients)
    return loss * factor, wide


@partial(jax.jit, static_argnums=3)
def _norm(gradients: Any, factor: Any, share: Any, dtype: Any) -> Any:
    return part_of(_scaled((jnp.zeros(()), gradients), factor, dtype)[1], share)


# No other code holds the sum so far, so it is added to in place.
@partial(jax.jit, static_argnums=3, donate_argnums=0)
def _added(total: Any, found: Any, factor: Any, dtype: Any) -> Any:
    return jax.tree.map(jnp.add, total, _scaled(found, factor, dtype))


def _merged_aux(call: Call, cut: Cut, shares: Shares, auxes: list[Any]) -> Any:
    if not call.has_aux:
        return None
    if len(auxes) == 1:
        return auxes[0]
    found = kinds(call, cut, auxes, cut.rows)
    parts = shares.of_rows_or_term() if None in cut.rows else shares.rows
    routes = [routed(found, parts, index, aux) for index, aux in enumerate(auxes)]
    ways = merged_kinds(found)
    values = reduce(lambda a, b: merged(ways, a, b), [values for values, _ in routes])
    pieces = []
    for column in zip(*(r for _, r in routes), strict=True):
        given = iter(column)
        pieces.append(
            [jnp.stack([next(given) for _ in range(segment.count)]) for segment in cut.segments]
        )
    return joined(found, auxes[0], cut, values, pieces)
