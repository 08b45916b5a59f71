"""Errors out of the handler of a signal: they are for whoever set it, not faults of a loss."""

import functools
import signal
import traceback
from typing import Any


def raise_if_of_signal(error: BaseException) -> None:
    """Raises an error again if the handler of a signal raised it, such as that of an alarm.

    Args:
        error: raised while the user's code ran, and caught.
    """
    found = map(signal.getsignal, signal.valid_signals())
    handlers = {_code(handler) for handler in found if callable(handler)}
    if any(frame.f_code in handlers for frame, _ in traceback.walk_tb(error.__traceback__)):
        raise error


def _code(handler: Any) -> Any:
    """What runs where a handler is called; None of what is not written in Python."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    # A bound method has the code of its function, other objects that of their class.
    of_object = getattr(type(handler).__call__, "__code__", None)
    return getattr(handler, "__code__", of_object)
