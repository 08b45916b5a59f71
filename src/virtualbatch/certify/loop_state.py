"""State of a training loop that is held in variables of models, optimizers and the like."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


class VariableState:
    """Saves and loads the variables of models, optimizers and the like, by their paths.

    Args:
        parts: name -> anything with `variables`, a variable (with `assign`), or a list of these.
        read: variable -> its value as a NumPy array.

    Raises:
        TypeError: a part is none of these.
    """

    def __init__(self, parts: Mapping[str, Any], read: Callable[[Any], np.ndarray]) -> None:
        self._parts = parts
        self._read = read
        self._due: set[str] | None = None
        self._variables()

    def save(self) -> dict[str, np.ndarray]:
        """Path -> value, of every variable that exists.

        Raises:
            ValueError: the variables are not the same ones as at the first call.
        """
        # A copy: the value may share its memory with a variable that is trained in place.
        found = {path: np.array(self._read(v)) for path, v in self._variables().items()}
        if self._due is None:
            self._due = set(found)
        new = sorted(set(found) ^ self._due)
        if new:
            raise ValueError(
                "All state must exist before certify_loop, or it cannot be restored. "
                f"Got {new[0]} from the first update. Build it before: "
                "optimizer.build(model.trainable_variables)."
            )
        return found

    def load(self, saved: Mapping[str, np.ndarray]) -> None:
        """Restores what `save` returned."""
        for path, variable in self._variables().items():
            if path in saved:
                variable.assign(saved[path])

    def _variables(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, part in self._parts.items():
            for variable in _of(name, part):
                path = str(getattr(variable, "path", None) or variable.name)
                # Variables of the same name are numbered in their order.
                key = f"{name}.{path}"
                known = sum(1 for other in found if other == key or other.startswith(f"{key}#"))
                found[f"{key}#{known + 1}" if known else key] = variable
        return found


def _of(name: str, part: Any) -> list[Any]:
    if hasattr(part, "variables"):
        return list(part.variables)
    if hasattr(part, "assign"):
        return [part]
    if isinstance(part, list | tuple):
        return [variable for each in part for variable in _of(name, each)]
    raise TypeError(
        "The state of a loop must have variables, or be a variable or a list of them. "
        f"Got {name}={type(part).__name__}. Pass the model, the optimizer or the average."
    )
