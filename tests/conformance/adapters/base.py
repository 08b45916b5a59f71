"""What every adapter gives, and how one is found."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from virtualbatch.window.window import Window

ENGINES = ["tensorflow", "torch", "torch_loss", "jax"]


class Result(NamedTuple):
    """What a call of an engine gave.

    Fields:
        loss: a float64 scalar of NumPy.
        gradients: in the structure of the parameters; float64 arrays of NumPy and Nones.
        aux: arrays of NumPy in the structure that the loss gave; None without has_aux.
        dtypes: names of dtypes, in the structure of the gradients; None where there is none.
        loss_dtype: name of the loss's dtype.
        stats: the `WindowStats` as floats; None if they were not asked for.
    """

    loss: Any
    gradients: Any
    aux: Any
    dtypes: Any
    loss_dtype: str
    stats: Any = None


def selected(config: Any) -> list[str]:
    """Names of the engines that a run of pytest is for: all, unless one is asked for."""
    found = config.getoption("--engine", None)
    return ENGINES if found in (None, "all") else [found]


def load(name: str) -> Any:
    """The adapter of an engine.

    Raises:
        ModuleNotFoundError: its framework is not installed.
    """
    return importlib.import_module(f"tests.conformance.adapters.{name}").Adapter()


def mapped(fn: Callable[[Any], Any], structure: Any) -> Any:
    """Applies fn to every leaf; structures are dicts, lists, tuples and Windows."""
    if isinstance(structure, Mapping):
        # JAX gives dicts back in the order of their keys.
        return {key: mapped(fn, structure[key]) for key in sorted(structure)}
    if isinstance(structure, Window):
        return Window(mapped(fn, found) for found in structure)
    if isinstance(structure, list | tuple):
        return type(structure)(mapped(fn, item) for item in structure)
    return fn(structure)


def leaves(structure: Any) -> list[Any]:
    """The leaves of a structure, in order."""
    found: list[Any] = []
    mapped(found.append, structure)
    return found


def is_floating(leaf: Any) -> bool:
    """Whether an array of NumPy is to be cast to the dtype of a case."""
    return np.issubdtype(leaf.dtype, np.floating)
