"""Recognises errors that a signal handler raised, because a loss did not cause them."""

import functools
import signal
import traceback
from typing import Any


def raise_if_of_signal(error: BaseException) -> None:
    """Raises an error again if a signal handler, such as one for an alarm, raised it.

    Args:
        error: an error that was caught while the user's code ran.
    """
    found = map(signal.getsignal, signal.valid_signals())
    handlers = {_code(handler) for handler in found if callable(handler)}
    if any(frame.f_code in handlers for frame, _ in traceback.walk_tb(error.__traceback__)):
        raise error


def _code(handler: Any) -> Any:
    """The code that runs when a handler is called; None if it is not Python code."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    # A bound method has the code of its function; another object has the code of its class.
    of_object = getattr(type(handler).__call__, "__code__", None)
    return getattr(handler, "__code__", of_object)
