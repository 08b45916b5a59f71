"""Signals that wait while PyTorch runs what no exception may cut: its fake tensors.

They are switched on by generators inside the dispatcher. One that is cut by the handler of a signal
is closed later, and leaves its thread without autograd for good.
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

    with Undo(put_back):
        for held in handlers:
            signal.signal(held, note)
        yield
    for waited in came:
        signal.raise_signal(waited)
