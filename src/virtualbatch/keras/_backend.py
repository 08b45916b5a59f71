"""What a backend of Keras has to bring, so that steps can be observed on it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import keras


class Ran(NamedTuple):
    """What a train step did; nothing was updated by it.

    Fields:
        gradients: of each trainable variable, as the optimizer gets them; None where there is none.
        logs: what the step returned.
        metrics: values of the model's metric variables.
        non_trainable: values of its non-trainable variables.
    """

    gradients: list[Any]
    logs: Any
    metrics: list[Any]
    non_trainable: list[Any]


class Program(Protocol):
    """A train step that is observed instead of trained with."""

    def __call__(self, batch: Callable[[], Any], times: int) -> Ran:
        """Runs it, each time from the state that the last one left, and observes the last one.

        Args:
            batch: makes the batch anew, because some of Keras' own code writes to it.
            times: how often.
        """


class Backend(NamedTuple):
    """How a backend of Keras runs a train step.

    Fields:
        program: (model, step) -> a program of the step.
        step: (model, microbatch_size) -> the step that accumulates.
        cut: (rows, microbatch_size) -> rows of each micro-batch.
        is_concrete: whether a tensor has a value that can be read.
    """

    program: Callable[[keras.Model, Any], Program]
    step: Callable[[keras.Model, int], Any]
    cut: Callable[[int, int], Sequence[int]]
    is_concrete: Callable[[Any], bool]


class Kept(Protocol):
    """What else a backend puts back."""

    def restore(self) -> None:
        """Puts everything back."""


class Engine(NamedTuple):
    """What certifying needs of a backend.

    Fields:
        backend: how it runs a step.
        kept: model -> what else is put back at the end.
        build: (model, batch) -> nothing; makes what `fit` would make at its first batch.
    """

    backend: Backend
    kept: Callable[[keras.Model], Sequence[Kept]]
    build: Callable[[keras.Model, Any], None]
