"""What each backend of Keras must provide."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import keras

from virtualbatch.keras._gather.gathering import Found
from virtualbatch.plan.plan import Plan


class Ran(NamedTuple):
    """What a train step computed. The optimizer updated nothing.

    Fields:
        gradients: the gradient of each trainable variable, as the optimizer gets it, or None.
        logs: what the step returned.
        metrics: values of the model's metric variables.
        non_trainable: values of the model's non-trainable variables.
    """

    gradients: list[Any]
    logs: Any
    metrics: list[Any]
    non_trainable: list[Any]


class Program(Protocol):
    """A train step that is only observed: it does not train the model."""

    def __call__(self, batch: Callable[[], Any], times: int) -> Ran:
        """Runs the step several times and returns what the last run computed.

        Each run starts from the state that the run before left.

        Args:
            batch: makes the batch anew, because some of Keras' own code writes to it.
            times: the number of runs.
        """


class Kept(Protocol):
    """State of a backend, beside the variables of the model, that can be put back."""

    def restore(self) -> None:
        """Puts everything back."""


class Backend(NamedTuple):
    """How a backend of Keras trains a model by windows, plans for it and observes its steps.

    Fields:
        refuse: model -> nothing. Refuses models that this backend cannot train.
        step: (model, microbatch_size, accumulation_steps, packing, check=, gather=) -> the step
            that accumulates, see `TrainStep`.
        make_train_function: model -> its `make_train_function`.
        plan: (model, (x, y, sample_weight), memory limit, losses that need all rows) -> plan.
        build: (model, (x, y, sample_weight)) -> nothing. Creates the variables that `fit` would
            create at its first batch.
        program: (model, step) -> a program of the step.
        cut: (rows, microbatch_size) -> rows of each micro-batch.
        is_concrete: tensor -> whether its value can be read.
        kept: model -> further state to put back after steps of the model were observed.
        evaluate: see `virtualbatch.keras._gather.detection.Evaluate`.
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
