"""Variables whose gradient is their new value, as the scales and maxima of float8 layers are.

Keras' optimizer assigns what it gets as their gradient. A sum over micro-batches would be wrong, so
the maximum is taken, as in Keras' own accumulation. For maxima over rows it is that of the batch.
"""

from collections.abc import Callable, Sequence
from typing import Any


def are_overwritten(variables: Sequence[Any]) -> list[bool]:
    """For each variable, whether an optimizer assigns its gradient to it."""
    return [getattr(variable, "overwrite_with_gradient", False) for variable in variables]


def merged_gradients(
    a: Sequence[Any],
    b: Sequence[Any],
    overwritten: Sequence[bool],
    maximum: Callable[[Any, Any], Any],
) -> list[Any]:
    """Gradients of two groups of micro-batches: sums, and maxima of what is overwritten.

    Args:
        a: one gradient per variable, or None.
        b: the same of the other group.
        overwritten: see `are_overwritten`.
        maximum: of two tensors.
    """

    def merged(x: Any, y: Any, largest: bool) -> Any:
        if x is None or y is None:
            return y if x is None else x
        return maximum(x, y) if largest else x + y

    return [merged(x, y, largest) for x, y, largest in zip(a, b, overwritten, strict=True)]


def updated(gradients: Sequence[Any], overwritten: Sequence[bool]) -> list[Any]:
    """The gradients that are no new values."""
    return [gradient for gradient, skip in zip(gradients, overwritten, strict=True) if not skip]
