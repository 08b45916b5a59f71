"""The law's arithmetic: weights, shares and merged moments.

A batch loss is a ratio of sums. A micro-batch hands over a sum S and the weight D that its mean
was divided by, and the window is S_1 + S_2 + ... over D_1 + D_2 + ...; everything here follows
from that. Tensors are only seen through `+ - * /`, so the same lines serve every framework.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

_WIDE_ENOUGH = {"float64", "complex64", "complex128"}


def accumulator_dtype(dtype: str) -> str:
    """Name of the dtype in which gradients of one parameter are summed.

    A sum of N terms in a dtype with few mantissa bits stalls: in bfloat16 1 + 1 + ... stops at
    256. The buffer is therefore never narrower than float32.

    Args:
        dtype: name of the parameter's dtype, such as `"bfloat16"`.

    Returns:
        promote(dtype, float32), as a name.
    """
    return dtype if dtype in _WIDE_ENOUGH else "float32"


def shares(weights: Sequence[float]) -> list[float]:
    """Part of the window's mean that each micro-batch carries, formed in float64.

    Law: the shares of any cut of one batch sum to 1, or are all 0 when the total is 0.

    Args:
        weights: what each micro-batch's mean was divided by; host numbers >= 0, one unit.

    Returns:
        weight / total for each micro-batch; all 0.0 where the total is 0.

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
    total = math.fsum(weights)
    return [value / total if total else 0.0 for value in weights]


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
        divide: division that gives 0 where the denominator is 0, for groups that may both be
            empty; plain `/` when None.

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
