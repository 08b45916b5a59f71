"""Whether a copy of a model accumulates.

Keras copies a model by saving and loading it, and the saved file does not contain accumulation. A
deep copy accumulates, because it never leaves the process. A pickle may be read where virtualbatch
is not installed, so it does not accumulate, and a log line reports this.
"""

import copy
import logging
from collections.abc import Callable
from typing import Any

import keras

_log = logging.getLogger("virtualbatch")

# Python looks for these attributes on an instance before it looks on the class.
HOOKS = ("__deepcopy__", "__reduce__")


class DeepCopy:
    """The `__deepcopy__` of a model that accumulates: its copy accumulates too.

    Args:
        model: the model.
        accumulate: makes a model accumulate with the same options as this one.
    """

    def __init__(self, model: keras.Model, accumulate: Callable[[keras.Model], Any]):
        self._model = model
        self._accumulate = accumulate

    def __call__(self, memo: dict[int, Any]) -> Any:
        """Copies the model as Python would without this hook, then makes the copy accumulate."""
        attributes = vars(self._model)
        ours = {name: attributes.pop(name) for name in HOOKS if name in attributes}
        try:
            twin = copy.deepcopy(self._model, memo)
        finally:
            attributes.update(ours)
        # Keras sets `compiled` also on a copy that still waits for the `compile` of its own class.
        # Such a copy has no optimizer.
        if twin.compiled and hasattr(twin, "optimizer"):
            self._accumulate(twin)
        else:
            _log.warning(
                "The copy of the model %r is not compiled, so it does not accumulate. "
                "Compile it and call accumulate.",
                self._model.name,
            )
        return twin


class Reduction:
    """The `__reduce__` of a model that accumulates: Keras' own `__reduce__`, and one log line.

    Args:
        model: the model.
    """

    def __init__(self, model: keras.Model):
        self._model = model
        self._said = False

    def __call__(self) -> Any:
        """What pickle writes."""
        if not self._said:
            self._said = True
            _log.warning(
                "A pickle of the model %r does not keep accumulate: a model that is loaded from "
                "it trains on whole batches. Call accumulate on it again.",
                self._model.name,
            )
        of_keras: Any = type(self._model)
        return of_keras.__reduce__(self._model)
