"""What a function changes beside its outputs, put back so that it runs again as it ran."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from virtualbatch.certify.randomness import HostRandom


class State(NamedTuple):
    """The state of a function at one moment.

    Fields:
        variables: those that it may change.
        values: what they are.
        host: the random generators of Python and NumPy; None in a graph, which does not run them.
    """

    variables: Sequence[Any]
    values: list[Any]
    host: HostRandom | None

    @classmethod
    def now(cls, variables: Sequence[Any]) -> "State":
        """The state as it is."""
        host = HostRandom() if tf.executing_eagerly() else None
        return cls(variables, [variable.read_value() for variable in variables], host)

    def is_drawn_from(self) -> bool:
        """Whether Python or NumPy drew random numbers since."""
        return self.host is not None and self.host.has_moved()

    def put_back(self) -> None:
        """Makes the state what it was."""
        for variable, value in zip(self.variables, self.values, strict=True):
            variable.assign(value)
        if self.host is not None:
            self.host.restore()
