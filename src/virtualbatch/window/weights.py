"""Weights as numbers on the host: of each micro-batch here, and of the window on all replicas.

If several replicas share a window, each replica weighs its own micro-batches. The totals are summed
over replicas, and each replica divides by the sums. So shares sum to 1 over all replicas.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from virtualbatch.window.shares import Shares, row_weights, shares
from virtualbatch.window.terms import SUM, GivenWeight, WeightFunction


class Totals(NamedTuple):
    """The weights of a window over all replicas.

    Fields:
        rows: its rows; if the rows of some replica are unknown, its number of micro-batches.
        terms: term name -> its weight.
        mine: the number of micro-batches of this replica if rows are unknown, otherwise None.
    """

    rows: float
    terms: dict[Any, float]
    mine: int | None = None


class HostWeights(NamedTuple):
    """The weights of the micro-batches of a window, as numbers on the host.

    Fields:
        rows: rows of each micro-batch; None if unknown.
        terms: term name -> one number for each micro-batch, or None for a term that does not
            depend on the rows, or "sum" for a term that is a sum. `terms` is None without a weight
            function.
        is_sum: whether the whole loss is a sum.
    """

    rows: Sequence[int | None]
    terms: dict[Any, Any] | None
    is_sum: bool

    @property
    def weighed(self) -> dict[Any, list[float]]:
        """The terms whose weights are numbers."""
        found = self.terms or {}
        return {name: x for name, x in found.items() if x is not None and x != SUM}

    def shares(self, totals: Totals | None = None) -> Shares:
        """The shares of the micro-batches.

        Args:
            totals: the totals of all replicas; None if this is the only replica.

        Raises:
            ValueError: a weight is negative, NaN or infinite.
        """
        count = len(self.rows)
        known = [n for n in self.rows if n is not None]
        window: Any = sum(known) if len(known) == count else None
        if totals is None:
            of_rows = shares(row_weights(self.rows))
        elif totals.mine is not None:
            of_rows = [totals.mine / totals.rows / count] * count
            window = None
        else:
            of_rows = shares(row_weights(self.rows), totals.rows)
            window = int(totals.rows)
        ones = [1.0] * count
        if self.terms is None:
            return Shares(of_rows, None, frozenset(), window, ones if self.is_sum else of_rows)
        weighed = self.weighed
        whole = {} if totals is None else totals.terms
        terms = {
            name: shares(weighed[name], whole.get(name))
            if name in weighed
            else (of_rows if kind is None else ones)
            for name, kind in self.terms.items()
        }
        certain = frozenset(self.terms.keys() - weighed.keys())
        if window is None and len(terms) == len(weighed) == 1:
            ((name, weights),) = weighed.items()
            window = whole.get(name, math.fsum(weights))
        return Shares(of_rows, terms, certain, window, of_rows, any(whole.values()))


def host_weights(
    rows: Sequence[int | None],
    weight: GivenWeight,
    microbatches: Iterable[Any],
    on_host: Callable[[list[Any]], Iterable[Any]],
) -> HostWeights:
    """The weights of a window, if they can be read on the host.

    Args:
        rows: rows of each micro-batch, None if unknown; see `row_weights`.
        weight: micro-batch -> what the loss was divided by: a scalar >= 0, or a dict of scalars by
            term name, in which None marks a term that does not depend on the rows and "sum" a term
            that is a sum. Instead of a function: "sum" for a loss that is a sum, None for rows.
        microbatches: the arguments of the weight function, in order.
        on_host: weights -> numbers, all in one copy.

    Raises:
        ValueError: a weight is not a scalar, or names differ between micro-batches.
    """
    if not callable(weight):
        return HostWeights(rows, None, weight == SUM)
    checked = WeightFunction(weight)
    # All weights of a term follow each other.
    columns = list(zip(*[checked.values(microbatch) for microbatch in microbatches], strict=True))
    values = [value for column in columns for value in column]
    table = [float(number) for number in on_host(values)] if values else []
    count = len(rows)
    vectors = [table[k * count : (k + 1) * count] for k in range(len(columns))]
    return HostWeights(rows, checked.by_name(vectors, None, SUM), False)


def host_shares(
    rows: Sequence[int | None],
    weight: GivenWeight,
    microbatches: Iterable[Any],
    on_host: Callable[[list[Any]], Iterable[Any]],
) -> Shares:
    """The shares of a window whose weights can be read.

    Args:
        rows: as in `host_weights`.
        weight: as in `host_weights`.
        microbatches: as in `host_weights`.
        on_host: as in `host_weights`.

    Returns:
        The shares, in lists of Python floats.

    Raises:
        ValueError: a weight is negative, not finite, not a scalar, or names differ between
            micro-batches.
    """
    return host_weights(rows, weight, microbatches, on_host).shares()
