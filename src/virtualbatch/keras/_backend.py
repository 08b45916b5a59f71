"""What a backend of Keras has to bring."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import keras

from virtualbatch.keras._gather.gathering import Found
from virtualbatch.plan.plan import Plan


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


class Kept(Protocol):
    """What else a backend puts back."""

    def restore(self) -> None:
        """Puts everything back."""


class Backend(NamedTuple):
    """How a backend of Keras trains a model by windows, plans for it and observes its steps.

    Fields:
        refuse: model -> nothing; refuses what only this backend cannot train.
        step: (model, microbatch_size, accumulation_steps, packing, check=, gather=) -> the step
            that accumulates, see `TrainStep`.
        make_train_function: model -> its `make_train_function`.
        plan: (model, (x, y, sample_weight), memory limit, what needs all rows) -> plan.
        build: (model, (x, y, sample_weight)) -> nothing; makes what `fit` would make at its first
            batch.
        program: (model, step) -> a program of the step.
        cut: (rows, microbatch_size) -> rows of each micro-batch.
        is_concrete: whether a tensor has a value that can be read.
        kept: model -> what else is put back after its steps were observed.
        evaluate: (model, function, arrays) -> see `virtualbatch.keras._gather.detection`.
    """

    refuse: Callable[[keras.Model], None]
    step: Callable[..., Any]
    make_train_function: Callable[[keras.Model], Callable[..., Any]]
    plan: Callable[[keras.Model, Any, int | str | None, Found], Plan]
    build: Callable[[keras.Model, Any], None]
    program: Callable[[keras.Model, Any], Program]
    cut: Callable[[int, int], Sequence[int]]
    is_concrete: Callable[[Any], bool]
    kept: Callable[[keras.Model], Sequence[Kept]]
    evaluate: Callable[[keras.Model, Callable[[Any], Any], Any], Sequence[Any]]
