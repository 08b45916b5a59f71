"""A train step on TensorFlow or PyTorch that runs eagerly and whose optimizer changes nothing."""

from collections.abc import Callable
from typing import Any

import keras

from virtualbatch.keras._backend import Ran


class EagerProgram:
    """See `virtualbatch.keras._backend.Program`.

    Args:
        model: a model that is built and compiled.
        step: batch -> logs.
    """

    def __init__(self, model: keras.Model, step: Any):
        self._model = model
        self._step = step

    def __call__(self, batch: Callable[[], Any], times: int) -> Ran:
        """See `Program`."""
        model = self._model
        gradients: list[Any] = [None] * len(model.trainable_variables)
        logs: Any = {}

        def apply(given: Any, trainable_variables: Any = None) -> None:
            del trainable_variables
            gradients[:] = given

        vars(model.optimizer)["apply"] = apply
        try:
            for _ in range(times):
                model.reset_metrics()
                logs = self._step(batch())
        finally:
            del vars(model.optimizer)["apply"]
        return Ran(
            gradients,
            logs,
            [keras.ops.convert_to_tensor(variable) for variable in model.metrics_variables],
            [keras.ops.convert_to_tensor(variable) for variable in model.non_trainable_variables],
        )
