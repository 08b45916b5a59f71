"""Options of public verbs: what is on or off, and what is a number."""

import numbers
from typing import Any

import numpy as np


def check_flags(**flags: Any) -> None:
    """Refuses options that are neither on nor off.

    Args:
        **flags: name -> as given.

    Raises:
        TypeError: one is no boolean.
    """
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise TypeError(
                f"{name} must be True or False. Got {name}={value!r}. Pass one of the two."
            )


def is_real(value: Any) -> bool:
    """Whether this is one real number; booleans and arrays are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
