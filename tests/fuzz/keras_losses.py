"""Loss functions that Keras' user can write. Frames of this file are the user's."""

from typing import Any

import keras
from tests.fuzz.call import UsersError


def raising(*args: Any) -> Any:
    raise UsersError("mine")


def _late() -> Any:
    calls = []

    def loss(y: Any, z: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise UsersError("late")
        return (y - z) ** 2

    return loss


# name -> makes a function of targets and predictions.
LOSSES: dict[str, Any] = {
    "squares": lambda: lambda y, z: keras.ops.mean((y - z) ** 2, axis=-1),
    "one number": lambda: lambda y, z: keras.ops.mean((y - z) ** 2),
    "the largest": lambda: lambda y, z: keras.ops.max(z),
    "nothing": lambda: lambda y, z: None,
    "a float": lambda: lambda y, z: 3.0,
    "text": lambda: lambda y, z: "loss",
    "a dict": lambda: lambda y, z: {"a": (y - z) ** 2},
    "a tuple": lambda: lambda y, z: ((y - z) ** 2, z),
    "rows that differ": lambda: lambda y, z: z[:1, 0],
    "NaN": lambda: lambda y, z: (y - z) ** 2 * float("nan"),
    "integers": lambda: lambda y, z: keras.ops.cast(z, "int32"),
    "raises": lambda: raising,
    "raises late": _late,
    "one argument": lambda: lambda y: y,
    "a KeyError": lambda: lambda y, z: {}["mine"],
}
