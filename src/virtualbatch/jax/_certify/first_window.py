"""The check of a loss at its first window: JAX's part of `certify.first_window`."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from virtualbatch.certify.certificate import Certificate
from virtualbatch.certify.first_window import conclude, prove
from virtualbatch.certify.proven import NO_ROWS
from virtualbatch.certify.randomness import HostRandom
from virtualbatch.certify.trial import Distance, Trial, UntriedError, rows_of_part
from virtualbatch.jax._arrays import is_array, of_arrays, on_host
from virtualbatch.jax._batch import chosen, cut_batch
from virtualbatch.jax._certify.certificate import certificate
from virtualbatch.jax._compiled_quickly import compiled_quickly
from virtualbatch.jax._objective import Call
from virtualbatch.jax._plan.memory import ERRORS
from virtualbatch.jax._remembered import remembered
from virtualbatch.jax._rows import rows_of
from virtualbatch.jax._segment import Cut
from virtualbatch.jax._weights import part, window_shares
from virtualbatch.jax._window import Program, positions
from virtualbatch.plan.out_of_memory import in_words
from virtualbatch.window.shares import Shares
from virtualbatch.window.window import Window


def prove_first_window(
    program: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    cut: Cut,
    shares: Shares,
    weight_takes: str,
    is_rowwise: bool = False,
) -> None:
    """Tries the law on rows of a batch, outside a trace, if its loss has not been tried before.

    Args:
        program: the loss and its options.
        args: positional arguments, the batch among them.
        kwargs: keyword arguments.
        cut: the micro-batches of the window.
        shares: the shares of the micro-batches.
        weight_takes: the arguments of the user's weight function, as code.
        is_rowwise: as in `Trial`.

    Raises:
        ValueError: micro-batches of this loss do not add up to their batch.
    """
    if cut.count == 1:
        return
    known = remembered(program.fun).proven
    sizes = [n for n in cut.rows if n is not None]
    if len(sizes) < cut.count:
        cannot_try(program, NO_ROWS)
        return
    lacking = shares.empty_and_full()
    leaves, tree = jax.tree.flatten((args, kwargs))
    kinds = tuple((x.dtype.name, x.ndim) if is_array(x) else None for x in leaves)
    structure = (program.has_aux, repr(program.argnums), tree, kinds, lacking is None)
    seen = known.seen(program.fun, program.weight, structure)
    if seen is not None:
        seen.check_sizes(sizes)
        return
    trial = _JaxTrial(program, args, kwargs, sizes, weight_takes)
    trial.is_rowwise = is_rowwise
    if lacking is not None and not isinstance(args[program.batch_argnum], Window):
        trial.empty, trial.full = (rows_of_part(sizes, k) for k in lacking)
    host = HostRandom()
    try:
        reason = prove(trial, lambda error: in_words(error, ERRORS))
    finally:
        host.restore()
    conclude(known, program.fun, program.weight, structure, trial, reason)


def cannot_try(program: Program, reason: str) -> None:
    """Logs, once for each loss, that the law cannot be tried.

    Args:
        program: the loss and its options.
        reason: why.
    """
    known = remembered(program.fun).proven
    known.tell_once(program.fun, program.weight, reason)


class _JaxTrial(Trial):
    """See `virtualbatch.certify.trial.Trial`."""

    # Only one pair: without jit, each operation is compiled for each number of rows.
    pairs = ((3, 4),)

    def __init__(
        self,
        program: Program,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        sizes: Sequence[int],
        weight_takes: str,
    ):
        # Every part gets the given keys unchanged, because the whole batch gets them too.
        self._program = program._replace(stats=False, key_argnum=None)
        self._args, self._kwargs = args, dict(kwargs)
        self._weight_takes = weight_takes
        batch = args[program.batch_argnum]
        self._source = max(batch, key=_rows) if isinstance(batch, Window) else batch
        self.rows = _rows(self._source)
        self.sizes = sizes
        self.width = sum(x.size for x in jax.tree.leaves(self._source) if is_array(x)) // self.rows

    def leaves(self, rows: Sequence[int]) -> Mapping[str, np.ndarray]:
        """See `Trial`."""
        batch = self._some(rows)[self._program.batch_argnum]
        found = tree_flatten_with_path(batch)[0]
        return {keystr(path): on_host(leaf) for path, leaf in found if is_array(leaf)}

    def distance(self, a: Sequence[int], b: Sequence[int]) -> Distance:
        """See `Trial`."""
        parts = [self._some(rows) for rows in (a, [*a, *b], b)]
        position, weight = self._program.batch_argnum, self._program.weight
        both = Window([parts[0][position], parts[2][position]])
        shares = window_shares(cut_batch(both, None, None, compiled=False), weight)
        call = self._program.call(self._args, self._kwargs, shares.terms)
        gradients_of = partial(_gradients, call)
        host = HostRandom()
        try:
            # One program for each number of rows is less to compile than each operation alone.
            found = _run(call, of_arrays(gradients_of, compiled_quickly), parts, shares)
        except (TypeError, IndexError):  # as JAX says that a loss needs values
            found = _run(call, gradients_of, parts, shares)
        sizes, losses, dtypes = found
        if host.has_moved():
            raise UntriedError("it draws random numbers by Python or NumPy")
        differentiated = [self._args[k] for k in positions(self._program.argnums)]
        dtypes += [x.dtype for x in jax.tree.leaves(differentiated) if is_array(x)]
        epsilon = max(float(jnp.finfo(d).eps) for d in dtypes if jnp.issubdtype(d, jnp.inexact))
        return Distance.of(sizes, shares.of_rows_or_term(), losses, {}, epsilon)

    def certificate(self, rows: Sequence[int], size: int) -> Certificate:
        """See `Trial`."""
        args = self._some(rows)
        return certificate(self._program, args, self._kwargs, size, None, self._weight_takes)

    def _some(self, rows: Sequence[int]) -> tuple[Any, ...]:
        args = list(self._args)
        index = np.asarray(rows)
        args[self._program.batch_argnum] = chosen(self._source, index)
        return tuple(args)


def _run(
    call: Call,
    gradients_of: Callable[..., tuple[dict[Any, Any], Any]],
    parts: Sequence[tuple[Any, ...]],
    shares: Shares,
) -> tuple[list[float], list[dict[Any, float]], list[Any]]:
    """Sizes and losses for `Distance.of`, and the dtypes of the losses.

    Args:
        call: the call.
        gradients_of: `_gradients` of the call, compiled or not.
        parts: the arguments of the first part, of the whole, and of the second part.
        shares: the shares of the two parts.
    """
    total: Any = None
    sizes, losses, dtypes = [], [], []
    for k, args in enumerate(parts):
        # The first part, minus the whole, plus the second part.
        counting = (None, {}, -1.0) if k == 1 else part(shares, k // 2)
        if counting is None:
            terms, _ = call.terms(args)
        else:
            terms, gradients = gradients_of(args, call.kwargs, *counting[:2])
            scaled = jax.tree.map(lambda x, f=counting[2]: _wide(x) * f, gradients)
            total = scaled if total is None else jax.tree.map(jnp.add, total, scaled)
        losses.append({name: float(value) for name, value in terms.items()})
        dtypes += [value.dtype for value in terms.values()]
        sizes.append(_largest(total))
    return sizes, losses, dtypes


def _gradients(
    call: Call, args: Any, kwargs: Any, names: Sequence[Any] | None, factors: Mapping[Any, Any]
) -> tuple[dict[Any, Any], Any]:
    """The terms of a loss, and gradients; see `Call.gradients`."""
    terms, _, gradients = call._replace(kwargs=kwargs).gradients(args, names, factors)
    return terms, gradients


def _rows(batch: Any) -> int:
    return rows_of(batch, "batch")


def _wide(x: Any) -> Any:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _largest(gradients: Any) -> float:
    """The largest number in some gradients; NaN if one is not a number."""
    found = [float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(gradients) if x.size]
    return float(np.max(found)) if found else 0.0
