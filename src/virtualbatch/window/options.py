"""Checks of options that are flags or numbers."""

import numbers
from typing import Any

import numpy as np


def check_flags(**flags: Any) -> None:
    """Raises an error for flags that are not booleans.

    Args:
        **flags: name -> value.

    Raises:
        TypeError: a value is not a boolean.
    """
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise TypeError(
                f"{name} must be True or False. Got {name}={value!r}. Pass one of the two."
            )


def is_real(value: Any) -> bool:
    """Whether this is one real number; booleans and arrays are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
