"""A window inside a trace: one `lax.scan` over its equal micro-batches, one more call for the rest.

The program of a micro-batch is traced once per shape. Its results give the shapes of the sums.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import jaxpr_as_fun

from virtualbatch.jax._arrays import is_array
from virtualbatch.jax._aux import joined, kinds, merged_kinds, routed
from virtualbatch.jax._convolution import with_fast_convolutions
from virtualbatch.jax._float8 import largest, put_together, seen, split
from virtualbatch.jax._merge import filled, merged, nothing, over_devices
from virtualbatch.jax._objective import Call, wide_dtype
from virtualbatch.jax._segment import Cut, Segment
from virtualbatch.jax._stats import part_of, stats_of
from virtualbatch.jax._weights import groups, scaled
from virtualbatch.window.aux import MAX, SUM
from virtualbatch.window.shares import Shares


class _Micro(NamedTuple):
    """A micro-batch's share of the loss and the gradients, in the dtype of the sums, and its aux.

    Fields:
        loss: the share of the loss.
        gradients: the leaves of gradients, without new values.
        new_values: leaves that are new values instead of gradients (see `_float8`).
        norm: the part of the statistics; None if statistics are not asked for.
        aux: the aux of the micro-batch.
    """

    loss: Any
    gradients: list[Any]
    new_values: list[Any]
    norm: Any
    aux: Any


class _Traced(NamedTuple):
    """A segment with the program of its micro-batches.

    Fields:
        segment: the micro-batches.
        offset: the number of micro-batches in the window before this segment.
        run: (number in the window, number in the segment) -> _Micro.
        outputs: abstract _Micro.
    """

    segment: Segment
    offset: int
    run: Callable[[Any, Any], _Micro]
    outputs: _Micro


def run_compiled(
    call: Call, cut: Cut, shares: Shares, accumulator_dtype: Any, axis_name: Any, stats: bool
) -> tuple[tuple[Any, Any, Any, Any], list[str]]:
    """The loss, aux, gradients and statistics of a window, inside a trace.

    Args:
        call: the call.
        cut: the window.
        shares: the shares of the window.
        accumulator_dtype: the dtype of the sums; None for promote(parameter dtype, float32).
        axis_name: mesh axes over which the batch is spread, or None.
        stats: whether statistics are asked for.

    Returns:
        ((loss, aux, gradients, stats), kinds). aux is None without has_aux. stats is None if not
        asked for. Kinds say how leaves of aux are merged; empty if nothing is merged.
    """
    alone = cut.count == 1
    groups_of_terms = groups(shares)
    # Several segments may have micro-batches of the same shape.
    again = len(cut.segments) > len({segment.rows for segment in cut.segments})
    call = call.traced_once() if again or len(groups_of_terms) > 1 else call
    dtypes: dict[str, Any] = {}

    def step(index: Any, microbatch: Any) -> _Micro:
        args = call.arguments(microbatch, None if alone else index)
        parts, of_terms = [], []
        for names in groups_of_terms:
            terms, aux, gradients = call.gradients(args, names)
            dtypes["loss"] = jnp.result_type(*terms.values())
            dtypes["gradients"] = jax.tree.map(lambda x: x.dtype, gradients)
            found = [terms[name].astype(wide_dtype(terms[name])) for name in names or terms]
            added, new_values = split(gradients)
            wide = [x.astype(wide_dtype(x, accumulator_dtype)) for x in added]
            parts.append(scaled((reduce(jnp.add, found), wide), shares, names, index))
            of_terms.append(seen(new_values))
        loss, gradients = reduce(partial(jax.tree.map, jnp.add), parts)
        norm = part_of(gradients, jnp.asarray(shares.of_rows_or_term())[index]) if stats else None
        return _Micro(loss, gradients, reduce(largest, of_terms), norm, aux)

    aux_kinds: list[str] = []
    if alone and axis_name is None:
        loss, gradients, new_values, norm, aux = step(0, cut.segments[0].get(0))
    else:
        traced = _traced(cut, step)
        outputs = traced[0].outputs
        if call.has_aux:
            rows_of = [entry.segment.rows for entry in traced]
            aux_kinds = kinds(call, cut, [entry.outputs.aux for entry in traced], rows_of)

        parts = shares.of_rows_or_term() if None in cut.rows else shares.rows

        def route(index: Any, found: _Micro) -> tuple[list[Any], list[Any]]:
            of_aux, rows = routed(aux_kinds, parts, index, found.aux)
            return [*jax.tree.leaves(found._replace(aux=None)), *of_aux], rows

        def of_kind(kind: str, results: Any) -> list[str]:
            return [kind] * len(jax.tree.leaves(results))

        ways = [
            *of_kind(SUM, (outputs.loss, outputs.gradients)),
            *of_kind(MAX, outputs.new_values),
            *of_kind(SUM, outputs.norm),
            *merged_kinds(aux_kinds),
        ]
        total, rows = _folded(traced, route, ways)
        total = total if axis_name is None else over_devices(ways, total, axis_name)
        own = jax.tree.structure(outputs._replace(aux=None))
        loss, gradients, new_values, norm, _ = own.unflatten(total[: own.num_leaves])
        aux = joined(aux_kinds, outputs.aux, cut, total[own.num_leaves :], rows)
    gradients = put_together(dtypes["gradients"], gradients, new_values)
    found = stats_of(split(gradients)[0], shares, norm, axis_name) if stats else None
    return (loss.astype(dtypes["loss"]), aux, gradients, found), aux_kinds


def _traced(cut: Cut, step: Callable[[Any, Any], _Micro]) -> list[_Traced]:
    result, offset = [], 0
    for segment in cut.segments:
        number = jax.ShapeDtypeStruct((), jnp.int32)
        program, outputs = jax.make_jaxpr(
            lambda i, k, segment=segment: step(i, segment.get(k)), return_shape=True
        )(number, number)
        program = with_fast_convolutions(program)

        def run(i: Any, k: Any, program: Any = program, outputs: Any = outputs) -> _Micro:
            found = jaxpr_as_fun(program)(_number(i), _number(k))
            return jax.tree.unflatten(jax.tree.structure(outputs), _as_arrays(found, outputs))

        result.append(_Traced(segment, offset, run, outputs))
        offset += segment.count
    return result


def _as_arrays(found: Sequence[Any], outputs: Any) -> list[Any]:
    # A program returns a Python number for a result that does not depend on its arguments.
    return [
        x if is_array(x) else jnp.asarray(x, like.dtype)
        for x, like in zip(found, jax.tree.leaves(outputs), strict=True)
    ]


def _after(
    total: list[Any], add: Callable[[Any], tuple[list[Any], list[Any]]]
) -> tuple[list[Any], list[Any]]:
    """Adds a micro-batch inside the program, after the sums so far are complete.

    Otherwise XLA would run the forward pass of a remainder at the same time as the micro-batches
    before it, and keep both in memory. Only a branch whose condition XLA cannot predict must wait.

    Args:
        total: the sums so far.
        add: sums so far -> (sums with the micro-batch, its rows).
    """
    # Arrays that are sharded by type are left out: a single entry of them would have no sharding.
    numbers = [x for x in total if x.size and _is_whole(x)]
    first = [jnp.real(_first(x)) for x in numbers]
    # Never true, but XLA does not know that.
    never = jnp.isneginf(jnp.abs(sum(first)))

    def nothing(total: Any) -> tuple[Any, list[Any]]:
        return total, [filled(x, 0) for x in jax.eval_shape(add, total)[1]]

    def branched(total: Any) -> tuple[Any, list[Any]]:
        found: tuple[Any, list[Any]] = lax.cond(never, nothing, add, total)
        return found

    # Under `shard_map` a branch may change a type. Then the micro-batch is added without a branch.
    return branched(total) if _types(branched, total) == _types(add, total) else add(total)


def _first(x: Any) -> Any:
    if not jax.sharding.get_abstract_mesh().auto_axes:
        return jnp.ravel(x)[0]
    # `ravel` would gather an array that is spread over devices.
    return lax.squeeze(lax.slice(x, (0,) * x.ndim, (1,) * x.ndim), range(x.ndim))


def _is_whole(x: Any) -> bool:
    is_number = not jnp.issubdtype(x.dtype, jax.dtypes.extended)
    return is_number and all(entry is None for entry in jax.typeof(x).sharding.spec)


def _types(fn: Callable[[Any], Any], total: Any) -> list[Any]:
    found: list[Any] = []
    jax.eval_shape(lambda x: found.extend(map(jax.typeof, jax.tree.leaves(fn(x)))), total)
    return found


def _number(index: Any) -> Any:
    return jnp.asarray(index, jnp.int32)


def _folded(
    traced: Sequence[_Traced],
    route: Callable[[Any, _Micro], tuple[list[Any], list[Any]]],
    ways: Sequence[str],
) -> tuple[list[Any], list[list[Any]]]:
    """Runs the micro-batches one after another.

    Args:
        traced: the segments.
        route: (number in the window, results) -> (values to merge, values to concatenate).
        ways: how each value is merged.

    Returns:
        The merged values; and for each leaf that is concatenated, one array per segment, of shape
        (micro-batches, rows, ...).
    """
    total: list[Any] | None = None
    pieces: list[list[Any]] = []
    for segment, offset, run, _ in traced:

        def one(k: Any, offset: int = offset, run: Any = run) -> tuple[list[Any], list[Any]]:
            return route(offset + k, run(offset + k, k))

        def add(total: list[Any], k: Any = 0, one: Any = one) -> tuple[list[Any], list[Any]]:
            found, rows = one(k)
            return merged(ways, total, found), rows

        if segment.count == 1:
            total, rows = one(0) if total is None else _after(total, add)
            pieces.append([row[None] for row in rows])
            continue
        if total is None:
            # Made from the types of the results. Under shard_map they say which axes a value varies
            # over.
            total = nothing(ways, jax.eval_shape(lambda one=one: one(0)[0]))
        total, stacked = lax.scan(add, total, jnp.arange(segment.count, dtype=jnp.int32))
        pieces.append(stacked)
    return total or [], [list(leaf) for leaf in zip(*pieces, strict=True)]
