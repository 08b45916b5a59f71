"""A text that identifies a loss function, also in another process, so that plans can be reused.

A lambda or a closure is often created anew at each call although it does the same. So a function is
identified by its code and by what it calls through its closure, not by its identity. Numbers and
arrays are left out: they change with each update, and rarely change the memory that is needed.
"""

import functools
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from itertools import islice
from types import CodeType, FunctionType, MethodType
from typing import Any

_PLAIN = (str, bool, int, float, type(None))
_MOST_VALUES = 200


def fingerprint(*parts: Any) -> str:
    """The text that identifies functions together with their options.

    Args:
        parts: functions, callable objects, texts, flags, None, and containers of these.
    """
    lines = "\n".join(line for part in parts for line in _lines(part, set()))
    names = ", ".join(_name(part) for part in parts if callable(part))
    return f"{names} {hashlib.sha256(lines.encode()).hexdigest()[:16]}".strip()


def plain_values(*functions: Any) -> tuple[str, ...]:
    """The numbers, texts and flags that functions use, as far as they are easy to find.

    They are taken from closures, from defaults, from the arguments of `partial`, and from the
    attributes of objects found there, such as the `reduction` of a criterion. There are at most two
    hundred.

    Args:
        functions: functions and callable objects; anything else has no values.
    """
    return tuple(islice((v for each in functions for v in _plain(each, 2)), _MOST_VALUES))


def _plain(found: Any, depth: int) -> Iterator[str]:
    if isinstance(found, _PLAIN):
        yield repr(found)
    elif isinstance(found, functools.partial):
        for part in (found.func, *found.args, *found.keywords.values()):
            yield from _plain(part, depth)
    elif isinstance(found, MethodType):
        yield from _plain(found.__self__, depth)
    elif isinstance(found, FunctionType):
        inner = [*_closure(found), *(found.__defaults__ or ())]
        for part in inner if depth else ():
            yield from _plain(part, depth - 1)
    elif depth and isinstance(getattr(found, "__dict__", None), dict):
        for name, value in vars(found).items():
            if isinstance(value, _PLAIN):
                yield f"{name}={value!r}"
            elif hasattr(value, "__dict__") and not isinstance(value, type):
                yield from _plain(value, depth - 1)


def owner_of(function: Any) -> Any:
    """The code of a function, which its copies share; for another object its class.

    Args:
        function: a function or another callable object.
    """
    found = _unwrapped(function)
    return found.__code__ if isinstance(found, FunctionType) else type(found)


def _unwrapped(found: Any) -> Any:
    """The function inside partial, methods and decorators; other objects unchanged."""
    while True:
        if isinstance(found, functools.partial):
            found = found.func
        elif isinstance(found, MethodType):
            found = found.__func__
        elif callable(found) and inspect.unwrap(found) is not found:
            found = inspect.unwrap(found)
        else:
            return found


def _name(part: Any) -> str:
    found = _unwrapped(part)
    found = found if isinstance(found, FunctionType | type) else type(found)
    return f"{found.__module__}.{found.__qualname__}"


def _lines(part: Any, seen: set[int]) -> Iterator[str]:
    """Lines that describe a part; `seen` holds the functions that are already described."""
    if isinstance(part, functools.partial):
        for value in (part.func, part.args, part.keywords):
            yield from _lines(value, seen)
    elif isinstance(part, Mapping):
        for key, value in part.items():
            yield repr(key)
            yield from _lines(value, seen)
    elif isinstance(part, list | tuple):
        for value in part:
            yield from _lines(value, seen)
    elif isinstance(part, MethodType):
        yield _name(part.__self__)
        yield from _lines(part.__func__, seen)
    else:
        yield from _single(part, seen)


def _single(part: Any, seen: set[int]) -> Iterator[str]:
    """Lines for a part without looking into containers: in a closure these may hold a data set."""
    found = _unwrapped(part)
    if found is None or isinstance(found, bool | str):
        yield repr(found)
    elif not isinstance(found, FunctionType):
        yield _name(found)
    # A function may be in its own closure.
    elif id(found) not in seen:
        seen.add(id(found))
        yield _name(found)
        yield from _code(found.__code__)
        yield from _lines((found.__defaults__, found.__kwdefaults__), seen)
        for value in _closure(found):
            yield from _single(value, seen)


def _closure(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue


def _code(code: CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield repr((code.co_names, code.co_varnames, code.co_freevars))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        else:
            # The order of a set differs between processes.
            yield repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)
