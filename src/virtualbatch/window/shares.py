"""The arithmetic of a window: weights, shares and merged moments.

The loss of a batch is a ratio of sums. A micro-batch contributes a sum S and a weight D, by which
its mean was divided. The loss of the window is (S_1 + S_2 + ...) / (D_1 + D_2 + ...). Everything
here follows from that. Tensors are used only through `+ - * /`, so the code serves every framework.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from virtualbatch.window.terms import check_same_terms, check_total

_WIDE_ENOUGH = {"float64", "complex64", "complex128"}


def accumulator_dtype(dtype: str) -> str:
    """Name of the dtype in which gradients of one parameter are summed.

    A sum in a dtype with few mantissa bits stops growing: in bfloat16 1 + 1 + ... stops at 256. So
    the buffer is never narrower than float32.

    Args:
        dtype: name of the parameter's dtype, such as `"bfloat16"`.

    Returns:
        promote(dtype, float32), as a name.
    """
    return dtype if dtype in _WIDE_ENOUGH else "float32"


def shares(weights: Sequence[float], total: float | None = None) -> list[float]:
    """The share of each micro-batch in the window's mean, computed in float64.

    The shares of any cut of one batch sum to 1, or are all 0 if the total is 0.

    Args:
        weights: what each micro-batch's mean was divided by; host numbers >= 0 in one unit.
        total: the sum of the window's weights on all replicas; None if `weights` are all of them.

    Returns:
        weight / total for each micro-batch; all 0.0 if the total is 0.

    Raises:
        ValueError: a weight is negative, NaN or infinite.
    """
    for index, value in enumerate(weights):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(
                "A weight must be a finite number, 0 or more. "
                f"Got weight={value} for micro-batch {index}. "
                "Return what the loss of that micro-batch was divided by, such as its number of "
                "unmasked tokens."
            )
    if total is None:
        total = math.fsum(weights)
    return [value / total if total else 0.0 for value in weights]


class Shares(NamedTuple):
    """Shares of every micro-batch of a window.

    A vector holds one number per micro-batch: on the host a sequence of float64, in a compiled
    program a tensor.

    Fields:
        rows: the share of each micro-batch in the window's rows; a vector. All equal if rows are
            unknown.
        terms: term name -> the vector of shares by that term's weight. None without a weight
            function. A term that does not depend on the rows has the shares by rows, which sum
            to 1. A term that is a sum has the share 1 everywhere.
        certain: names of the terms that are never empty: they do not depend on the rows, or are
            sums.
        window: rows of the window; a number, or a scalar of the program. If rows are unknown, the
            total of its only weight, or None.
        unnamed: the vector of shares for every term if `terms` is None: the shares by rows, or 1.
        elsewhere: whether other replicas have a part of the window. Valid only if shares can be
            read.
    """

    rows: Any
    terms: dict[Any, Any] | None
    certain: frozenset[Any]
    window: Any
    unnamed: Any
    elsewhere: bool = False

    def of_rows_or_term(self) -> Any:
        """The share of each micro-batch in the window, by its only weight or by its rows."""
        if self.terms is None or len(self.terms) != 1 or self.certain:
            return self.rows
        return next(iter(self.terms.values()))

    def of(self, names: Iterable[Any], index: Any) -> list[Any]:
        """Shares of a micro-batch for each of its terms.

        Args:
            names: the names of the terms of its loss.
            index: the number of the micro-batch.

        Raises:
            ValueError: the names differ from the names of the weights, or a total is among its
                parts.
        """
        names = list(names)
        if self.terms is None:
            check_total(names)
            return [self.unnamed[index]] * len(names)
        check_same_terms(names, self.terms)
        return [self.terms[name][index] for name in names]

    def mapped(self, fn: Callable[[Any], Any]) -> "Shares":
        """These shares with a function applied to every vector."""
        terms = self.terms and {name: fn(found) for name, found in self.terms.items()}
        return self._replace(rows=fn(self.rows), terms=terms, unnamed=fn(self.unnamed))

    @property
    def counted(self) -> int:
        """The number of micro-batches with a share above 0. Call it only if shares can be read."""
        return sum(1 for share in self.of_rows_or_term() if share > 0)

    def empty_and_full(self) -> tuple[int, int] | None:
        """A micro-batch in which a term has no share, and the one with the term's largest share.

        Call it only if shares can be read.

        Returns:
            The numbers of both; None if every term has a share everywhere, or nowhere.
        """
        for name, found in (self.terms or {}).items():
            of_term = list(found)
            if name not in self.certain and any(of_term) and not all(of_term):
                return of_term.index(0), of_term.index(max(of_term))
        return None

    def is_empty(self, index: int) -> bool:
        """Whether a micro-batch adds nothing to any term. Call it only if shares can be read."""
        return self.terms is not None and not any(found[index] for found in self.terms.values())


def row_weights(rows: Sequence[int | None]) -> list[float]:
    """The weight of each micro-batch by its rows; all equal if rows are unknown.

    Args:
        rows: rows of each micro-batch; None in a Window whose rows are unknown.
    """
    return [1.0] * len(rows) if None in rows else [float(n) for n in rows if n is not None]


def check_counted(shares: Shares) -> None:
    """Raises an error for noise statistics of a window without a count of rows.

    Raises:
        ValueError: nothing counts the rows.
    """
    if shares.window is None:
        raise ValueError(
            "Noise statistics need rows, or one weight that counts instead of them. Got a "
            "Window without common rows, whose loss has several terms. Leave stats out."
        )


class Moments(NamedTuple):
    """Mean and (biased) variance of values, with how many values they describe.

    Fields:
        weight: number of values; scalar >= 0.
        mean: their mean; any shape.
        variance: mean squared distance from `mean`; the same shape.
    """

    weight: Any
    mean: Any
    variance: Any


def merge_moments(
    a: Moments, b: Moments, divide: Callable[[Any, Any], Any] | None = None
) -> Moments:
    """Moments of two groups of values taken together.

    Args:
        a: moments of the first group.
        b: moments of the second group; the same shapes.
        divide: a division that returns 0 if the denominator is 0, for two groups that may both be
            empty. None means plain `/`.

    Returns:
        Exactly the moments of the union, without the cancellation of E[x^2] - E[x]^2.

    Source:
        Chan, Golub, LeVeque: Updating Formulae and a Pairwise Algorithm for Computing Sample
        Variances (1979).
    """
    total = a.weight + b.weight
    part = divide(b.weight, total) if divide else b.weight / total
    delta = b.mean - a.mean
    between = delta * delta * (part * (1 - part))
    return Moments(
        weight=total,
        mean=a.mean + delta * part,
        variance=a.variance + (b.variance - a.variance) * part + between,
    )
