"""Rebuilds dataclasses that compute fields in `__post_init__` for each micro-batch.

A field that such a class computes, such as a count of rows, must be computed for the micro-batch.
So the constructor is called again. This is right only if the constructor keeps its arguments
unchanged, which is checked once for each batch.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_ABSENT = object()

Join = Callable[[list[Any]], Any]


def is_made_by_constructor(instance: Any) -> bool:
    """Whether a dataclass computes fields, so that copying it with other parts would be wrong."""
    return hasattr(instance, "__post_init__") and instance.__dataclass_params__.init


def rebuilder(instance: Any) -> tuple[list[tuple[str, Any]], Join]:
    """The constructor's fields, and a function that builds the same class from other values.

    Args:
        instance: a dataclass with `__post_init__`.

    Returns:
        The same as `parts_of` returns. At its first use, the function raises a ValueError if the
        constructor changes its arguments or computes other fields from the same arguments.
    """
    names = [field.name for field in dataclasses.fields(instance) if field.init]
    tried = False

    def join(parts: list[Any]) -> Any:
        nonlocal tried
        if not tried:
            _check(instance, names)
            tried = True
        return dataclasses.replace(instance, **dict(zip(names, parts, strict=True)))

    return [(f".{name}", getattr(instance, name)) for name in names], join


def _check(instance: Any, names: list[str]) -> None:
    """Checks on copies of the fields that a class can be rebuilt.

    Raises:
        ValueError: the class cannot be rebuilt.
    """
    given = {name: _copied(getattr(instance, name)) for name in names}
    # PyTorch counts writes to a tensor; the copies of NumPy arrays are read-only.
    arrays = [array for part in given.values() for array in _arrays(part)]
    versions = [getattr(array, "_version", 0) for array in arrays]
    try:
        made = dataclasses.replace(instance, **given)
    except (TypeError, ValueError) as error:
        raise _refusal(instance, f"{type(error).__name__}: {error}") from error
    if [getattr(array, "_version", 0) for array in arrays] != versions:
        raise _refusal(instance, "a constructor that writes to its arrays")
    for field in dataclasses.fields(instance):
        # Arrays must be the same objects: normalising twice may give equal values.
        before = given.get(field.name, getattr(instance, field.name, _ABSENT))
        if not _same(before, getattr(made, field.name, _ABSENT), objects=field.init):
            raise _refusal(instance, f"another .{field.name} from the fields of the batch")


def _refusal(instance: Any, got: str) -> ValueError:
    name = type(instance).__name__
    return ValueError(
        "A dataclass with __post_init__ must come out the same when it is made again of its "
        f"fields, because every micro-batch makes it again. Got {got}, for {name}. Change arrays "
        f"before {name} is made, or pass a dict."
    )


def _copied(part: Any) -> Any:
    if isinstance(part, np.ndarray):
        found = part.copy()
        found.flags.writeable = False
        return found
    if hasattr(part, "clone") and hasattr(part, "shape"):
        return part.detach().clone()
    if isinstance(part, list):
        return [_copied(item) for item in part]
    if type(part) is tuple:
        return tuple(map(_copied, part))
    if type(part) is dict:
        return {key: _copied(item) for key, item in part.items()}
    return copy.copy(part)


def _arrays(part: Any) -> list[Any]:
    """The arrays of a part, in order."""
    if hasattr(part, "shape"):
        return [part]
    if isinstance(part, Mapping):
        return [array for item in part.values() for array in _arrays(item)]
    if isinstance(part, list | tuple):
        return [array for item in part for array in _arrays(item)]
    return []


def _same(a: Any, b: Any, objects: bool) -> bool:
    """Whether two fields are equal.

    Args:
        a: a field.
        b: another field.
        objects: whether arrays must be the same objects.
    """
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if hasattr(a, "shape"):
        alike = not objects and a.shape == b.shape and a.dtype == b.dtype
        return alike and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(_same(a[key], b[key], objects) for key in a)
    if isinstance(a, list | tuple):
        same = (_same(x, y, objects) for x, y in zip(a, b, strict=False))
        return len(a) == len(b) and all(same)
    if dataclasses.is_dataclass(a):
        names = [field.name for field in dataclasses.fields(a)]
        return all(_same(getattr(a, name), getattr(b, name), objects) for name in names)
    return bool(a == b)
