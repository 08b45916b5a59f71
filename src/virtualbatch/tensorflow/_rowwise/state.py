"""The state that a function may change, put back so that the function can run again."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from virtualbatch.certify.randomness import HostRandom


class State(NamedTuple):
    """The state of a function at one moment.

    Fields:
        variables: the variables that the function may change.
        values: the values of the variables.
        host: the random generators of Python and NumPy; None in a graph, which does not use them.
    """

    variables: Sequence[Any]
    values: list[Any]
    host: HostRandom | None

    @classmethod
    def now(cls, variables: Sequence[Any]) -> "State":
        """The state as it is now."""
        host = HostRandom() if tf.executing_eagerly() else None
        return cls(variables, [variable.read_value() for variable in variables], host)

    def is_drawn_from(self) -> bool:
        """Whether Python or NumPy drew random numbers since then."""
        return self.host is not None and self.host.has_moved()

    def put_back(self) -> None:
        """Restores the state."""
        for variable, value in zip(self.variables, self.values, strict=True):
            variable.assign(value)
        if self.host is not None:
            self.host.restore()
