"""What tapes record: whether any does, whether one needs a tensor's gradient, and a pause of all.

Only the holder of a tape can ask it; there is no public name for all tapes of a thread.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tensorflow.python.eager import forwardprop_util, record


def is_recording() -> bool:
    """Whether a tape records what runs now."""
    return bool(record.could_possibly_record())


def is_recorded(tensor: Any) -> bool:
    """Whether a tape that records now may ask for the gradient of a tensor."""
    return bool(record.should_record_backprop([tensor]))


def has_tangent(tensors: Sequence[Any]) -> bool:
    """Whether a forward-mode derivative follows one of some tensors."""
    return bool(forwardprop_util.pack_tangents(list(tensors)).tangents)


@contextmanager
def nothing_recorded() -> Iterator[None]:
    """No tape records what runs in this context."""
    with record.stop_recording():
        yield
