"""Keras on PyTorch: a `train_step` that runs one batch as a window, eagerly.

The batch is checked and cut evenly, and the window runs. Nothing stays changed if a micro-batch
raises.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np
import torch
from keras import ops, tree

from virtualbatch.keras._torch_state import State
from virtualbatch.keras._torch_window import Microbatch, WindowRun
from virtualbatch.keras._train_step import TrainStep, uncompiled
from virtualbatch.split import (
    array_leaves,
    common_rows,
    even_cut,
    rows_per_microbatch,
    sizes_disagree,
)

# What `numpy.dtype.kind` calls booleans, integers, floats and complex numbers.
_NUMBERS = "biufc"


class TorchStep(TrainStep):
    """The `train_step` of a model that accumulates on PyTorch."""

    def __call__(self, data: Any) -> dict[str, Any]:
        """Trains on one batch, as Keras' `train_step` does."""
        model = self._model
        batch = self._unpacked(data)
        rows = common_rows(array_leaves(batch))
        if rows is None:
            raise ValueError("internal: a batch of PyTorch has no number of rows.")
        cut = even_cut(rows, self._size(rows))
        with State(model).kept_on_failure():
            if len(cut) == 1:
                return type(model).train_step(model, data)
            batch = tree.map_structure(_tensor, batch)
            run = WindowRun(
                model,
                rows,
                [
                    Microbatch(stop - start, partial(_cut, batch, start, stop))
                    for start, stop in cut
                ],
            )
            results = run.train()
        self._say(run.losses_of_one_number)
        return results

    def _size(self, rows: int) -> int:
        """Rows of one micro-batch, for a batch of so many.

        Raises:
            ValueError: two sizes disagree. Which batch of an epoch is the last, short one only
                the data knows; but the first, where the loss tracker has counted nothing, is not.
        """
        size, steps = self._microbatch_size, self._accumulation_steps
        if size is None or steps is None:
            return rows_per_microbatch(rows, size, steps)
        count = -(-rows // size)
        if count > steps or (count < steps and float(self._model._loss_tracker.count) == 0):
            raise ValueError(sizes_disagree(rows, size, steps))
        return size


def make_train_function(model: keras.Model) -> Callable[..., Any]:
    """A `make_train_function` that leaves the window to Python.

    Keras would let PyTorch compile the whole `train_step`, the loop over micro-batches unrolled
    in it.
    """

    def make(force: bool = False) -> None:
        with uncompiled(model):
            type(model).make_train_function(model, force=force)

    return make


def _tensor(leaf: Any) -> Any:
    """An array of a batch on Keras' device, as Keras' own step copies it: at once.

    Copied by micro-batch, each would wait for the one before, except from pinned memory.
    """
    if not hasattr(leaf, "shape"):
        return leaf
    if isinstance(leaf, torch.Tensor):
        return leaf if leaf.is_pinned() else ops.convert_to_tensor(leaf)
    array = np.asarray(leaf)
    return ops.convert_to_tensor(array) if array.dtype.kind in _NUMBERS else array


def _cut(batch: Any, start: int, stop: int) -> Any:
    def piece(leaf: Any) -> Any:
        if not hasattr(leaf, "shape"):
            return leaf
        rows = leaf[start:stop]
        if isinstance(rows, torch.Tensor) and rows.is_pinned():
            return rows.to(_device(), non_blocking=True)
        return rows

    return tree.map_structure(piece, batch)


def _device() -> torch.device:
    """The device that Keras puts tensors on."""
    return ops.zeros(()).device
