"""Lets a second pass over a window compute the same values as the first pass."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from virtualbatch.tensorflow._certify.eager_random import EagerRandom
from virtualbatch.tensorflow._loop import Traced
from virtualbatch.tensorflow._rowwise.program import hidden_random


class State:
    """The present values of variables, and the state of TensorFlow's eager random numbers.

    Args:
        variables: variables of the model.
    """

    def __init__(self, variables: Sequence[Any]):
        self._variables = variables
        self._values = [tf.identity(variable.value) for variable in variables]
        self._random = EagerRandom() if tf.executing_eagerly() else None

    def restore(self, after: Sequence[Any]) -> None:
        """Puts the state back.

        Args:
            after: tensors that must be computed before.
        """
        with tf.control_dependencies([x for x in after if tf.is_tensor(x)]):
            for variable, value in zip(self._variables, self._values, strict=True):
                variable.assign(value)
        if self._random is not None:
            self._random.restore()


def refuse_hidden_randomness(traced: Traced) -> None:
    """Refuses random numbers that a second pass could not draw again.

    Raises:
        ValueError: an operation draws from a state that TensorFlow keeps for itself.
    """
    function: Any = traced.first
    found = hidden_random(function.graph)
    if found:
        raise ValueError(
            "Layers must draw random numbers that can be drawn again, because a loss sees all "
            f"rows. Got the operations {', '.join(found)}, whose state TensorFlow keeps for "
            "itself. Use Keras layers, keras.random with a SeedGenerator or tf.random.stateless_*."
        )
