"""What every backend's `train_step` has in common: its sizes, its refusals and what it logs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras

from virtualbatch.keras import refuse_accumulating_optimizer, refuse_replicas

_log = logging.getLogger("virtualbatch")


class TrainStep:
    """The `train_step` of a model that accumulates, without the call itself.

    Args:
        model: the model.
        microbatch_size: rows of one micro-batch, or None.
        accumulation_steps: micro-batches per window, or None.
    """

    is_virtualbatch = True

    def __init__(
        self, model: keras.Model, microbatch_size: int | None, accumulation_steps: int | None
    ):
        self._model = model
        self._microbatch_size = microbatch_size
        self._accumulation_steps = accumulation_steps
        self._said: set[str] = set()

    def _unpacked(self, data: Any) -> tuple[Any, Any, Any]:
        """(x, y, sample_weight) of a batch, for a model that may still be trained by windows.

        Raises:
            ValueError: since `accumulate`, the model was given several replicas or an optimizer
                that accumulates by itself.
        """
        refuse_replicas(self._model)
        refuse_accumulating_optimizer(self._model.optimizer)
        return keras.utils.unpack_x_y_sample_weight(data)

    def _say(self, losses: list[str]) -> None:
        """Names losses that only their author knows how to cut, once per call of `accumulate`."""
        for name in losses:
            if name not in self._said:
                _log.warning(
                    "The loss %s returns one number: it is taken for one mean over rows.", name
                )
        self._said.update(losses)


@contextmanager
def uncompiled(model: keras.Model) -> Iterator[None]:
    """While Keras makes a train function here, it does not compile the whole of it."""
    jit_compile = model.jit_compile
    model.jit_compile = False
    try:
        yield
    finally:
        model.jit_compile = jit_compile
