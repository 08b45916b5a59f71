"""Variables whose gradient is their new value, such as the scales and maxima of float8 layers.

Keras' optimizer assigns the gradient of such a variable to it. A sum over micro-batches would be
wrong, so we take the maximum, as Keras' own accumulation does. If the value is a maximum over rows,
the result is the maximum over the whole batch.
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
    """Merges the gradients of two groups of micro-batches: sums, or maxima for overwritten ones.

    Args:
        a: one gradient per variable, or None.
        b: one gradient per variable, or None, of the other group.
        overwritten: see `are_overwritten`.
        maximum: (tensor, tensor) -> their maximum.
    """

    def merged(x: Any, y: Any, largest: bool) -> Any:
        if x is None or y is None:
            return y if x is None else x
        return maximum(x, y) if largest else x + y

    return [merged(x, y, largest) for x, y, largest in zip(a, b, overwritten, strict=True)]


def updated(gradients: Sequence[Any], overwritten: Sequence[bool]) -> list[Any]:
    """The gradients of all variables that are not overwritten."""
    return [gradient for gradient, skip in zip(gradients, overwritten, strict=True) if not skip]
