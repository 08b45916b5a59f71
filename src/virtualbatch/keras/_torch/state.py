"""What a window changes before it is committed, copied so that a failed one leaves no trace."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras

from virtualbatch.torch._state import Buffers


def torch_modules(model: keras.Model) -> list[Any]:
    """The modules of PyTorch that layers of a model wrap, each once, submodules included."""
    return list(
        dict.fromkeys(
            module
            for layer in model._flatten_layers()
            if isinstance(layer, keras.layers.TorchModuleWrapper)
            for module in layer.module.modules()
        )
    )


class State:
    """Gradients, statistics, seeds and metrics of a model, as they are now.

    Args:
        model: a model that is built.
    """

    def __init__(self, model: keras.Model):
        self._buffers = Buffers(torch_modules(model))
        self._gradients = [(v.value, v.value.grad) for v in model.trainable_variables]
        self._variables = [
            (variable, variable.value.detach().clone()) for variable in _changed_by_forward(model)
        ]

    @contextmanager
    def kept_on_failure(self) -> Iterator[None]:
        """Puts everything back if what runs inside raises."""
        try:
            yield
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Puts everything back."""
        for variable, value in self._variables:
            variable.assign(value)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._buffers.restore()


def _changed_by_forward(model: keras.Model) -> list[Any]:
    """Variables that layers and metrics assign to, each once."""
    found = list(model.metrics_variables)
    for layer in model._flatten_layers():
        found += [generator.state for generator in layer._seed_generators]
        # Parameters of a wrapped module and packed weights of a quantised layer may be as large
        # as the model, and no forward changes them.
        if not isinstance(layer, keras.layers.TorchModuleWrapper):
            found += [v for v in layer._non_trainable_variables if v.value.element_size() > 1]
    return list({id(variable): variable for variable in found}.values())
