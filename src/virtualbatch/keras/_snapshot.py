"""All values of a model, its optimizer and its metrics, copied to the host and put back."""

from typing import Any

import keras
import numpy as np


class Snapshot:
    """What the variables of a model hold now.

    Args:
        model: a model that is built and compiled.
        optimizer: whether to keep the variables of the optimizer too. They may take twice the
            memory of the weights.
    """

    def __init__(self, model: keras.Model, optimizer: bool = True):
        self._model = model
        found: list[Any] = [*model.variables, *model.metrics_variables]
        if optimizer and model.optimizer is not None:
            found += model.optimizer.variables
        self._values = [
            (variable, np.array(keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(variable))))
            for variable in {id(variable): variable for variable in found}.values()
        ]

    def restore(self) -> None:
        """Puts every value back."""
        for variable, value in self._values:
            variable.assign(value)
        known = {id(variable) for variable, _ in self._values}
        for metric in self._model.metrics:
            # These variables are newer than the snapshot, when the metric had counted nothing.
            if any(id(variable) not in known for variable in metric.variables):
                metric.reset_state()

    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum(value.nbytes for _, value in self._values)
