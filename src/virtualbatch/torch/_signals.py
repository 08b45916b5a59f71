"""Holds signals back while PyTorch is in a dispatch mode, which no exception may interrupt.

Generators inside the dispatcher switch fake tensors on. If a signal handler interrupts such a
generator, it is closed too late, and its thread stays without autograd. If the handler raises while
the dispatcher calls Python to free something, the process ends.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from virtualbatch.torch._undo import Undo


@contextmanager
def held_back() -> Iterator[None]:
    """Delays signal handlers until the context ends. They then run in the order of the signals."""
    # Python calls handlers only in the main thread, and only that thread can set them.
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
    """Delivers the signals that arrived. If several handlers raise, the last error is raised."""
    while came:
        try:
            signal.raise_signal(came.pop(0))
        finally:
            _deliver(came)
