"""Watching eager operations: their values with their lines, and random numbers kept by row.

TensorFlow calls a registered function for each operation that Python runs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

# TensorFlow's own debugger is built on this module, which has no public name.
from tensorflow.python.framework import op_callbacks

from virtualbatch.certify.activations import Recording
from virtualbatch.certify.randomness import axes_of_rows
from virtualbatch.certify.users_line import OURS, folder, frames, is_in, line_of, users_line

# The folder of all installed packages: Keras, which is not imported here, holds the layers.
_LIBRARIES = (folder(str(Path(tf.__file__).parent)), OURS)
_DRAWS = ("RandomUniform", "RandomNormal", "RandomStandardNormal", "TruncatedNormal")


class RowwiseRandom:
    """Random numbers that belong to rows: a row gets the same numbers, whatever rows run with it.

    Args:
        rows: rows of the whole batch.
    """

    def __init__(self, rows: int):
        self._rows = rows
        self._kept: list[np.ndarray] = []
        self._axes: list[int | None] = []
        self._count = 0
        self._chosen: np.ndarray | None = None
        # Floating dtypes of all results.
        self.dtypes: set[Any] = set()

    @property
    def draws(self) -> int:
        """How many times the whole batch draws."""
        return len(self._kept)

    def keep(self, whole: Sequence[np.ndarray], part: Sequence[np.ndarray], some: int) -> None:
        """Keeps the random numbers that the whole batch drew.

        Args:
            whole: the random numbers of a run on all rows, in order.
            part: the random numbers of a run on fewer rows.
            some: the number of these fewer rows.

        Raises:
            ValueError: numbers do not belong to rows.
        """
        shapes, others = [x.shape for x in whole], [x.shape for x in part]
        self._axes = axes_of_rows(shapes, others, self._rows, some)
        self._kept = list(whole)

    def choose(self, rows: np.ndarray) -> None:
        """Sets which rows of the batch run next."""
        self._chosen, self._count = rows, 0

    def drawn(self, found: Any) -> Any:
        """The kept numbers that replace the drawn ones."""
        if not self._kept or self._chosen is None:
            return found
        # A forward pass that is computed again draws again, in the same order.
        index = self._count % len(self._kept)
        self._count += 1
        kept, axis = self._kept[index], self._axes[index]
        if axis is not None:
            each = kept.shape[axis] // self._rows
            places = (self._chosen[:, None] * each + np.arange(each)).reshape(-1)
            kept = np.take(kept, places, axis)
        return tf.constant(kept, found.dtype)


@contextmanager
def watched(random: RowwiseRandom, recording: Recording | None = None) -> Iterator[list[Any]]:
    """Watches the operations inside the context.

    Args:
        random: replaces random numbers.
        recording: receives all floating values; or None.

    Yields:
        A list of all random numbers, filled as they are drawn.
    """
    draws: list[Any] = []

    def seen(
        op_type: Any, inputs: Any, attrs: Any, outputs: Any, op_name: Any = None, graph: Any = None
    ) -> None:
        if graph is not None:
            return
        name = op_type.decode() if isinstance(op_type, bytes) else op_type
        if any(text in name for text in _DRAWS):
            # Eagerly, this list itself is the operation's result.
            outputs[:] = [random.drawn(output) for output in outputs]
            draws.extend(np.array(output) for output in outputs)
            return
        found = [getattr(output, "dtype", None) for output in outputs]
        random.dtypes |= {dtype for dtype in found if dtype is not None and dtype.is_floating}
        if recording is not None:
            _record(outputs, recording)

    op_callbacks.add_op_callback(seen)
    try:
        yield draws
    finally:
        op_callbacks.remove_op_callback(seen)


def _record(outputs: Sequence[Any], recording: Recording) -> None:
    for output in outputs:
        if getattr(output, "dtype", None) is not None and output.dtype.is_floating:
            layer, where = _place()
            recording.add(where, layer, output.numpy().astype(np.float64))


def _place() -> tuple[str, str]:
    """The class of the innermost layer, and the layer and line in words."""
    layer, name = "", ""
    for frame in frames():
        owner: Any = frame.f_locals.get("self")
        if hasattr(owner, "trainable_variables") and hasattr(owner, "call"):
            layer = type(owner).__name__
            name = f"{getattr(owner, 'path', '') or owner.name} ({layer})"
            break
        if not is_in(frame.f_code.co_filename, _LIBRARIES):
            break
    line = users_line(map(line_of, frames()), _LIBRARIES)
    return layer, ", ".join(text for text in (name, line) if text) or "loss_fn"
