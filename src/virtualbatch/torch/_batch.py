"""A batch as micro-batches: nested structures of tensors, cut by rows without copying them.

A micro-batch is made when it is asked for. Where the batch is on the host and the model on a
device, that is when it is copied there.
"""

import copy
import dataclasses
import numbers
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from enum import Enum
from functools import partial
from typing import Any, NamedTuple, cast

import torch

from virtualbatch.split import (
    Window,
    check_window,
    common_rows,
    even_cut,
    rows_per_microbatch,
)

_WHOLE = (numbers.Number, str, bytes, Enum, torch.dtype, torch.device, torch.Generator, type(None))


class Microbatch(NamedTuple):
    """One micro-batch of a window, not yet cut.

    Fields:
        rows: its rows; a Python int.
        get: () -> the micro-batch, where the batch is.
    """

    rows: int
    get: Callable[[], Any]


def microbatches(
    batch: Any, microbatch_size: int | None, accumulation_steps: int | None
) -> list[Microbatch]:
    """Cuts a batch evenly, or takes a Window as it is cut.

    Args:
        batch: nested structure of tensors that share their leading axis, or a Window of such.
        microbatch_size: checked rows of one micro-batch, or None; None for a Window.
        accumulation_steps: checked micro-batches per window, or None; None for a Window.

    Returns:
        The micro-batches in row order. Sizes differ by at most one row, unless a Window says
        otherwise.

    Raises:
        ValueError: rows differ or are missing, the two sizes disagree, or a window is empty or
            holds micro-batches of different structures.
        TypeError: an array is not a dense tensor of PyTorch, or a leaf cannot be cut.
    """
    if isinstance(batch, Window):
        check_window(batch)
        rows_of = [_rows(found, f"window[{index}]") for index, found in enumerate(batch)]
        _check_alike([_places(found) for found in batch])
        return [
            Microbatch(rows, partial(_same, found))
            for rows, found in zip(rows_of, batch, strict=True)
        ]
    rows = _rows(batch, "batch")
    size = rows_per_microbatch(rows, microbatch_size, accumulation_steps)
    cut = even_cut(rows, size)
    if len(cut) == 1:
        return [Microbatch(rows, partial(_same, batch))]
    return [
        Microbatch(stop - start, partial(_cut, batch, rows, start, stop)) for start, stop in cut
    ]


def map_tensors(fn: Callable[[torch.Tensor], Any], batch: Any) -> Any:
    """Applies fn to every tensor of a nested structure; other leaves stay."""
    return _mapped(lambda _, leaf: fn(leaf) if isinstance(leaf, torch.Tensor) else leaf, batch, "")


def on_device(microbatch: Microbatch, device: torch.device | None) -> Microbatch:
    """The micro-batch with its host tensors copied to a device, each time that it is asked for.

    Copies from pinned memory do not wait for the device.

    Args:
        microbatch: a micro-batch.
        device: where to; None leaves everything where it is.
    """
    if device is None:
        return microbatch

    def copied(x: torch.Tensor) -> torch.Tensor:
        return x.to(device, non_blocking=x.is_pinned()) if x.device.type == "cpu" else x

    return Microbatch(microbatch.rows, lambda: map_tensors(copied, microbatch.get()))


def accelerator_of(layers: Sequence[torch.nn.Module]) -> torch.device | None:
    """The device that all parameters are on, or None if that is the host or they are on several."""
    devices = {
        parameter.device
        for layer in layers
        for parameter in layer._parameters.values()
        if parameter is not None
    }
    device = devices.pop() if len(devices) == 1 else None
    return None if device is None or device.type == "cpu" else device


def _rows(batch: Any, path: str) -> int:
    found: list[tuple[str, Any]] = []
    _mapped(lambda place, leaf: found.append((place, leaf)), batch, path)
    arrays = [(place, leaf) for place, leaf in found if _is_tensor(place, leaf)]
    rows = common_rows(arrays)
    if rows is None:
        raise ValueError("internal: a tensor has no number of rows.")
    return rows


def _is_tensor(path: str, leaf: Any) -> bool:
    """Whether a leaf has rows; refuses what can neither be cut nor belong to every row."""
    if isinstance(leaf, torch.Tensor):
        if leaf.layout != torch.strided or leaf.is_nested:
            kind = "nested tensor" if leaf.is_nested else f"tensor of layout {leaf.layout}"
            raise TypeError(
                f"Tensors of a batch must be dense. Got a {kind} in {path}. "
                "Pass a Window whose micro-batches you cut yourself."
            )
        return True
    if hasattr(leaf, "shape"):
        raise TypeError(
            "Arrays of a batch must be tensors of PyTorch. "
            f"Got {path} of type {type(leaf).__name__}. Pass torch.as_tensor({path})."
        )
    if not isinstance(leaf, _WHOLE) and not _is_text(leaf):
        raise TypeError(
            "A batch must be made of tensors, mappings, lists, tuples, dataclasses, numbers and "
            f"text. Got {path} of type {type(leaf).__name__}. "
            "Pass its tensors instead, or pass it to the loss function by a closure."
        )
    return False


def _is_text(leaf: Any) -> bool:
    """Whether this is what PyTorch's loaders make of one text per row."""
    return (
        isinstance(leaf, list | tuple)
        and bool(leaf)
        and all(isinstance(item, str | bytes) for item in leaf)
    )


def _same(microbatch: Any) -> Any:
    return microbatch


def _cut(batch: Any, rows: int, start: int, stop: int) -> Any:
    def piece(_: str, leaf: Any) -> Any:
        per_row = isinstance(leaf, torch.Tensor) or (_is_text(leaf) and len(leaf) == rows)
        return leaf[start:stop] if per_row else leaf

    return _mapped(piece, batch, "")


def _mapped(fn: Callable[[str, Any], Any], structure: Any, path: str) -> Any:
    """Applies fn(path, leaf) to every leaf and builds the same structure of the results."""
    if isinstance(structure, torch.Tensor) or _is_text(structure):
        return fn(path, structure)
    if isinstance(structure, Mapping):
        items = {key: _mapped(fn, structure[key], f"{path}[{key!r}]") for key in structure}
        if type(structure) is dict or not isinstance(structure, MutableMapping):
            return items
        # Constructors of other mappings take who knows what.
        result = copy.copy(structure)
        for key, item in items.items():
            result[key] = item
        return result
    # A PackedSequence is a tuple, but its data has the rows in another order.
    if isinstance(structure, torch.nn.utils.rnn.PackedSequence):
        return fn(path, structure)
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        fields = structure._fields
        return type(structure)(
            *(_mapped(fn, getattr(structure, name), f"{path}.{name}") for name in fields)
        )
    if isinstance(structure, list | tuple):
        found = [_mapped(fn, item, f"{path}[{i}]") for i, item in enumerate(structure)]
        return found if type(structure) is list else type(structure)(found)
    if dataclasses.is_dataclass(structure) and not isinstance(structure, type):
        result = copy.copy(cast(Any, structure))
        for field in dataclasses.fields(structure):
            item = _mapped(fn, getattr(structure, field.name), f"{path}.{field.name}")
            # A frozen dataclass refuses plain assignment.
            object.__setattr__(result, field.name, item)
        return result
    return fn(path, structure)


def _places(batch: Any) -> list[str]:
    found: list[str] = []
    _mapped(lambda place, leaf: found.append(f"{place} {_kind(leaf)}"), batch, "microbatch")
    return found


def _kind(leaf: Any) -> str:
    return "a tensor" if isinstance(leaf, torch.Tensor) else f"of type {type(leaf).__name__}"


def _check_alike(window: Sequence[list[str]]) -> None:
    for index, found in enumerate(window):
        if sorted(found) != sorted(window[0]):
            raise ValueError(
                "All micro-batches of a window must have the same structure. "
                f"Got {', '.join(window[0])} in window[0] and {', '.join(found)} in "
                f"window[{index}]. Make them with the same collate function."
            )
