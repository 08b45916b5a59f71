"""Copies of what a window changes before its commit, so that a failed window changes nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import torch

from virtualbatch.keras._gather.state import state_variables
from virtualbatch.keras._torch.device import place
from virtualbatch.torch._random import RandomState
from virtualbatch.torch._state import Buffers


def torch_modules(model: keras.Model) -> list[Any]:
    """The PyTorch modules that layers of a model wrap, each once, with submodules."""
    return list(
        dict.fromkeys(
            module
            for layer in model._flatten_layers()
            if isinstance(layer, keras.layers.TorchModuleWrapper)
            for module in layer.module.modules()
        )
    )


class State:
    """The present gradients, statistics, seeds and metrics of a model.

    Args:
        model: a model that is built.
    """

    def __init__(self, model: keras.Model):
        self._buffers = Buffers(torch_modules(model))
        self._gradients = [(v.value, v.value.grad) for v in model.trainable_variables]
        self._variables = _copies([*model.metrics_variables, *_written_by_layers(model)])

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
        _assign(self._variables)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._buffers.restore()


class Beginning:
    """The state that a forward pass draws from and writes, so that the pass can run again.

    Args:
        model: a model that is built.
    """

    def __init__(self, model: keras.Model):
        self._random = RandomState(place())
        self._buffers = Buffers(torch_modules(model))
        self._variables = _copies(_written_by_layers(model))

    def restore(self) -> None:
        """Puts everything back."""
        self._random.restore()
        self._buffers.restore()
        _assign(self._variables)


def _written_by_layers(model: keras.Model) -> list[Any]:
    """Variables that layers assign to when they are called."""
    # Parameters of a wrapped module and packed weights of a quantised layer may be as large as the
    # model, and no forward changes them.
    of_modules = {
        id(variable)
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.TorchModuleWrapper)
        for variable in layer._non_trainable_variables
    }
    return [
        variable
        for variable in state_variables(model)
        if id(variable) not in of_modules and variable.value.element_size() > 1
    ]


def _copies(variables: list[Any]) -> list[tuple[Any, torch.Tensor]]:
    """Each variable once, with a copy of its value."""
    once = {id(variable): variable for variable in variables}.values()
    return [(variable, variable.value.detach().clone()) for variable in once]


def _assign(copies: list[tuple[Any, torch.Tensor]]) -> None:
    for variable, value in copies:
        variable.assign(value)
