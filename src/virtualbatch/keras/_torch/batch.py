"""Copies a batch of `fit` to Keras' device on PyTorch, and cuts it into a window."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import keras
import numpy as np
import torch
from keras import ops, tree

from virtualbatch.keras._added_losses import AddedLosses
from virtualbatch.keras._gather.gathering import Gathering
from virtualbatch.keras._packing import Packing, PaddedBatch, padded_batch
from virtualbatch.keras._torch.device import device
from virtualbatch.keras._torch.gathered import GatheredRun
from virtualbatch.keras._torch.gathered_rows import Place
from virtualbatch.keras._torch.window import Microbatch, WindowRun
from virtualbatch.window.gather import gathered
from virtualbatch.window.packing import row_lengths, token_cut
from virtualbatch.window.padding import check_longest

# What `numpy.dtype.kind` calls booleans, integers, floats and complex numbers.
_NUMBERS = "biufc"


def window_of(
    model: keras.Model,
    batch: Any,
    rows: int,
    cut: Sequence[tuple[int, int]],
    added: AddedLosses,
    stats: bool,
    gathering: Gathering | None,
) -> WindowRun:
    """A window of one batch.

    Args:
        model: the model.
        batch: (x, y, sample_weight) as Keras' loaders give them.
        rows: its rows.
        cut: (start, stop) of each micro-batch.
        added: what is known about the losses that layers add.
        stats: whether the logs get statistics of the window.
        gathering: whose predictions are gathered, if any.
    """
    batch = tree.map_structure(_tensor, batch)
    pieces = [
        Microbatch(stop - start, Place(slice(start, stop)), partial(_cut, batch, start, stop))
        for start, stop in cut
    ]
    if gathering is not None:
        return GatheredRun(model, _on_device(model, batch), rows, pieces, added, gathering)
    return WindowRun(model, rows, pieces, added, stats)


def packed_window_of(
    model: keras.Model,
    batch: Any,
    rows: int,
    packing: Packing,
    added: AddedLosses,
    gathering: Gathering | None,
) -> WindowRun:
    """A window of one batch, with its rows sorted by length and packed.

    Args:
        model: the model.
        batch: (x, y, sample_weight) as Keras' loaders give them.
        rows: its rows.
        packing: how rows are packed.
        added: what is known about the losses that layers add.
        gathering: whose predictions are gathered, if any.
    """
    batch = tree.map_structure(_tensor, batch)
    found = padded_batch(model, batch)
    with torch.no_grad():
        lengths = row_lengths(packing.lengths(batch[0]), rows)
    check_longest(int(lengths.max()), found.length, "x")
    order = np.argsort(-lengths, kind="stable")
    pieces = []
    for start, stop, length in token_cut(
        lengths[order].tolist(), packing.tokens, found.length, None
    ):
        get = partial(_gathered, found, order[start:stop], length)
        stretch = found.length / length if found.targets else 1.0
        place = Place(torch.as_tensor(order[start:stop], device=device()), length, found.length)
        pieces.append(Microbatch(stop - start, place, get, stretch))
    if gathering is not None and len(pieces) > 1:
        return GatheredRun(model, _on_device(model, batch), rows, pieces, added, gathering)
    return WindowRun(model, rows, pieces, added, False)


def _gathered(batch: PaddedBatch, rows: np.ndarray, length: int) -> Any:
    def piece(leaf: Any, trimmed: bool) -> Any:
        found = gathered(leaf, rows, length if trimmed else None)
        return ops.convert_to_tensor(found) if isinstance(found, torch.Tensor) else found

    return batch.mapped(piece)


def _tensor(leaf: Any) -> Any:
    """An array of a batch on Keras' device. Pinned arrays stay on the host until they are cut.

    The array is copied whole, as Keras' own step does. A copy per micro-batch would wait for the
    micro-batch before, except from pinned memory.
    """
    if not hasattr(leaf, "shape"):
        return leaf
    if isinstance(leaf, torch.Tensor):
        return leaf if leaf.is_pinned() else ops.convert_to_tensor(leaf)
    array = np.asarray(leaf)
    return ops.convert_to_tensor(array) if array.dtype.kind in _NUMBERS else array


def _on_device(model: keras.Model, batch: Any) -> Any:
    """The batch on the device, for the loss and the metrics of all rows.

    Keras' own losses and metrics do not read x. So x is moved only if the user's code may read it.
    """
    x, *rest = batch
    own = type(model)
    if own.compute_loss is not keras.Model.compute_loss or (
        own.compute_metrics is not keras.Model.compute_metrics
    ):
        x = tree.map_structure(_moved, x)
    return (x, *tree.map_structure(_moved, rest))


def _moved(leaf: Any) -> Any:
    return ops.convert_to_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf


def _cut(batch: Any, start: int, stop: int) -> Any:
    def piece(leaf: Any) -> Any:
        if not hasattr(leaf, "shape"):
            return leaf
        rows = leaf[start:stop]
        if isinstance(rows, torch.Tensor) and rows.is_pinned():
            return rows.to(device(), non_blocking=True)
        return rows

    return tree.map_structure(piece, batch)
