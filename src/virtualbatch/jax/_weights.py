"""Weights of a window before its first forward, and the shares that follow from them.

Un-jitted, the weights of all micro-batches come to the host in one copy and are checked there;
under a trace they stay on the device and are not read.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from virtualbatch.jax._batch import Cut
from virtualbatch.window.shares import shares
from virtualbatch.window.terms import check_steady_weights, weight_terms
from virtualbatch.window.tree import rank


class Shares(NamedTuple):
    """Shares of every micro-batch of a window.

    Fields:
        rows: part of the window's rows; a float64 vector of NumPy.
        terms: term name -> the same for that term's weight, a vector of NumPy or traced; None for
            a term that does not depend on the rows, whose shares are those of the rows. None
            altogether when all terms weigh by rows.
    """

    rows: Any
    terms: dict[Any, Any] | None

    def scaled(self, value: Any, names: Sequence[Any] | None, index: Any) -> Any:
        """A micro-batch's loss and gradients, in the buffer's dtype, times their share.

        Args:
            value: pytree of arrays.
            names: the group of terms that they belong to, as `groups` gives it.
            index: number of the micro-batch.
        """
        vector = None if self.terms is None or names is None else self.terms[names[0]]
        share = jnp.asarray(self.rows if vector is None else vector)[index]

        def times(x: Any) -> Any:
            product = x * share.astype(x.dtype)
            # 0 times NaN is NaN.
            return product if vector is None else jnp.where(share > 0, product, 0)

        return jax.tree.map(times, value)

    def of_rows_or_term(self) -> Any:
        """The shares of each micro-batch as one: of its only term, or of its rows."""
        found = [] if self.terms is None else list(self.terms.values())
        return self.rows if len(found) != 1 or found[0] is None else found[0]

    def groups(self) -> list[list[Any] | None]:
        """Names of terms that are differentiated together; None for all of them.

        A term that can be empty stands alone: its gradient may be NaN and has to be left out.
        """
        if self.terms is None:
            return [None]
        steady = [name for name, found in self.terms.items() if found is None]
        alone: list[list[Any] | None] = [
            [n] for n, found in self.terms.items() if found is not None
        ]
        # Without any name the loss is still asked for its own, which are then refused.
        return ([steady] if steady else []) + alone or [None]

    def part(self, index: int) -> tuple[list[Any] | None, dict[Any, float], float] | None:
        """What to differentiate of a micro-batch, where shares can be read.

        Returns:
            (names, factors, largest): the terms that are not empty, None for all; the ratio of
            their shares to the largest one where it is not 1; that share. None if all are empty.
        """
        if self.terms is None:
            return None, {}, float(self.rows[index])
        parts = {
            name: float((self.rows if found is None else found)[index])
            for name, found in self.terms.items()
        }
        names = [name for name, share in parts.items() if share]
        if not names:
            return None
        # Only the ratio goes through the backward pass, where half precision would round a share.
        largest = max(parts.values())
        return names, {n: parts[n] / largest for n in names if parts[n] != largest}, largest


def host_shares(cut: Cut, weight: Callable[[Any], Any] | None) -> Shares:
    """Shares of a window whose values can be read.

    Args:
        cut: the window.
        weight: micro-batch -> what the loss was divided by: a scalar >= 0, or a dict of them by
            term name, None marking a term that does not depend on the rows.

    Returns:
        The shares, float64 vectors of NumPy.

    Raises:
        ValueError: a weight is negative, not finite, not a scalar, or names differ between
            micro-batches.
    """
    rows = np.asarray(shares([float(n) for n in cut.rows]))
    if weight is None:
        return Shares(rows, None)
    found = [_checked(weight(microbatch)) for microbatch in cut.microbatches()]
    for terms in found:
        check_steady_weights(terms, found[0])
    names = [name for name, value in found[0].items() if value is not None]
    table = jax.device_get([[terms[name] for name in names] for terms in found])
    result: dict[Any, Any] = dict.fromkeys(found[0])
    for k, name in enumerate(names):
        result[name] = np.asarray(shares([float(row[k]) for row in table]))
    return Shares(rows, result)


def traced_shares(cut: Cut, weight: Callable[[Any], Any] | None, axis_name: Any) -> Shares:
    """Shares of a window inside a trace.

    Args:
        cut: the window.
        weight: as in `host_shares`.
        axis_name: mesh axes over which the batch is spread, whose weights count too; or None.

    Returns:
        The shares. Those of weights are formed in float32 or wider, and are all 0 where the
        window's total is 0.

    Raises:
        ValueError: a weight is not a scalar, or names differ between micro-batches.
    """
    replicas = 1 if axis_name is None else lax.axis_size(axis_name)
    rows = np.asarray(shares([float(n) for n in cut.rows])) / replicas
    if weight is None:
        return Shares(rows, None)
    first: dict[Any, Any] = {}

    def one(microbatch: Any) -> list[Any]:
        terms = _checked(weight(microbatch))
        first.update(terms if not first else {})
        check_steady_weights(terms, first)
        return [_wide(terms[name]) for name in first if first[name] is not None]

    pieces = []
    for segment in cut.segments:
        if segment.count == 1:
            pieces.append([value[None] for value in one(segment.get(0))])
        else:
            index = jnp.arange(segment.count)
            pieces.append(lax.map(lambda i, segment=segment: one(segment.get(i)), index))
    result: dict[Any, Any] = dict.fromkeys(first)
    names = [name for name in first if first[name] is not None]
    for name, vectors in zip(names, zip(*pieces, strict=True), strict=True):
        weights = jnp.concatenate(vectors)
        total = jnp.sum(weights)
        total = total if axis_name is None else lax.psum(total, axis_name)
        result[name] = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 0)
    return Shares(rows, result)


def _checked(weight: Any) -> dict[Any, Any]:
    terms = weight_terms(weight)
    for name, value in terms.items():
        if value is None and isinstance(weight, Mapping):
            continue
        is_array = hasattr(value, "shape")
        if (is_array and rank(value) != 0) or (not is_array and not _is_number(value)):
            got = f"shape {tuple(value.shape)}" if is_array else repr(value)
            raise ValueError(
                "A weight must be one number per micro-batch and term. "
                f"Got {got} for term {name!r}. "
                "Reduce it to what the loss was divided by, for example by a sum over the mask."
            )
    return terms


def _is_number(value: Any) -> bool:
    return hasattr(value, "__float__") and not isinstance(value, str | bytes)


def _wide(value: Any) -> Any:
    value = jnp.asarray(value)
    # float64 where JAX has it: a count of tokens may need more bits than float32 has.
    return value.astype(jax.dtypes.canonicalize_dtype(np.float64))
