"""The user's own functions of a call that is right. Frames of this file are the user's."""

import dataclasses
import itertools
import numbers
from collections.abc import Callable, Iterator, Mapping, ValuesView
from typing import Any

import numpy as np
from tests.fuzz.call import NoOracle


def found(structure: Any) -> Iterator[Any]:
    """The arrays in whatever a batch may be; lists of numbers are among them."""
    if hasattr(structure, "shape"):
        yield structure
    elif isinstance(structure, Mapping):
        # JAX sorts names, and what is a first array must be one in every framework.
        for _, part in sorted(structure.items(), key=lambda item: str(item[0])):
            yield from found(part)
    elif isinstance(structure, list | tuple | ValuesView):
        if structure and all(isinstance(x, numbers.Real) for x in structure):
            yield structure
        else:
            for part in structure:
                yield from found(part)
    elif dataclasses.is_dataclass(structure) and not isinstance(structure, type):
        for field in dataclasses.fields(structure):
            yield from found(getattr(structure, field.name))
    elif hasattr(structure, "__dict__") and not callable(structure):
        yield from found(vars(structure))


def right_loss(ops: Any, trained: Any, batch: Any) -> Any:
    """A mean over the rows of every array."""
    total = ops.constant(trained)
    for leaf in found(batch):
        total = total + ops.mean_of(leaf, trained)
    return total


def in_terms(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The same loss as two terms."""

    def terms(*args: Any) -> Any:
        result = loss(*args)
        return {"first": result * 0.25, "second": result * 0.75}

    return terms


def with_aux(loss: Callable[..., Any], ops: Any) -> Callable[..., Any]:
    """The same loss beside a mean and one entry per row."""

    def beside(*args: Any) -> Any:
        result = loss(*args)
        per_row = [ops.rows(leaf) for leaf in found(args[-1]) if hasattr(leaf, "shape")]
        return result, {"mean": result * 2, "rows": per_row}

    return beside


def right_entries(ops: Any, trained: Any, batch: Any) -> Any:
    """One entry for each row of the first array that there is."""
    return ops.rows(next(found(batch))) * ops.constant(trained)


def joined(ops: Any, window: Any) -> Any:
    """The batch that a `Window` was cut from.

    Raises:
        NoOracle: its micro-batches are parts of no batch, such as rows of other lengths.
    """
    first = next(iter(window), None)
    if isinstance(first, Mapping) and all(isinstance(part, Mapping) for part in window):
        return {key: joined(ops, [part.get(key) for part in window]) for key in first}
    if isinstance(first, list) and all(isinstance(part, list) for part in window):
        return [joined(ops, parts) for parts in itertools.zip_longest(*window)]
    shapes = {tuple(getattr(leaf, "shape", ()))[1:] for leaf in window}
    if len(shapes) != 1 or not all(getattr(leaf, "shape", ()) for leaf in window):
        raise NoOracle
    return ops.joined(list(window))


def plain_loop(weights: np.ndarray) -> tuple[Any, Any, Any]:
    """A loop that is right, and what saves and loads its state."""

    def loop(microbatches: Any, accumulation_steps: int) -> None:
        for start in range(0, len(microbatches), accumulation_steps):
            window = microbatches[start : start + accumulation_steps]
            leaves = [np.asarray(next(iter(found(batch)))) for batch in window]
            rows = sum(len(leaf) for leaf in leaves)
            weights[:] -= 0.1 * sum(leaf.sum(0) for leaf in leaves) / rows

    def load(state: Any) -> None:
        weights[:] = state

    return loop, weights.copy, load
