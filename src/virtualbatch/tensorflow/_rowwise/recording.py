"""Questions to all tapes of a thread, and a context in which none of them records.

A single tape can only be asked by code that has it. All tapes of a thread have no public name.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tensorflow.python.eager import forwardprop_util, record


def is_recording() -> bool:
    """Whether a tape records the operations that run now."""
    return bool(record.could_possibly_record())


def is_recorded(tensor: Any) -> bool:
    """Whether a tape that records now may need the gradient of a tensor."""
    return bool(record.should_record_backprop([tensor]))


def has_tangent(tensors: Sequence[Any]) -> bool:
    """Whether a ForwardAccumulator follows one of the tensors."""
    return bool(forwardprop_util.pack_tangents(list(tensors)).tangents)


@contextmanager
def nothing_recorded() -> Iterator[None]:
    """A context in which no tape records."""
    with record.stop_recording():
        yield
