"""Calls that `torch.compile` leaves as they are, where a whole step around them is compiled."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Result = TypeVar("Result")


def as_written(fn: Callable[Given, Result]) -> Callable[Given, Result]:
    """A function that is never traced. What it calls is not traced either.

    Modules that are already compiled stay compiled.

    `torch.compiler.disable` as a decorator would import the compiler, which takes a second.

    Args:
        fn: runs micro-batches, and decides by the values of tensors, their devices and hooks.
    """

    @functools.wraps(fn)
    def called(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        if torch.compiler.is_dynamo_compiling():
            found: Result = torch.compiler.disable(fn)(*args, **kwargs)
            return found
        return fn(*args, **kwargs)

    return called
