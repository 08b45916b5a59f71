"""Holds signals back while PyTorch is in a dispatch mode, which no exception may interrupt.

Fake tensors are switched on by generators inside the dispatcher. If the handler of a signal
interrupts one, it is closed later, and its thread stays without autograd. Where the dispatcher
calls Python while it frees something, an exception ends the process.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from virtualbatch.torch._undo import Undo


@contextmanager
def held_back() -> Iterator[None]:
    """Handlers of signals run when the context ends, those that have come first."""
    # Python calls handlers in this thread alone, and lets no other one set them.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {
        number: handler
        for number in signal.valid_signals()
        if callable(handler := signal.getsignal(number))
    }
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        came.append(number)

    def put_back() -> None:
        for held, handler in handlers.items():
            signal.signal(held, handler)

    try:
        with Undo(put_back):
            for held in handlers:
                signal.signal(held, note)
            yield
    finally:
        _deliver(came)


def _deliver(came: list[int]) -> None:
    """Lets handlers have the signals that came; what the last of them raises is raised."""
    while came:
        try:
            signal.raise_signal(came.pop(0))
        finally:
            _deliver(came)
