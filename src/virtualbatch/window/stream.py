"""Groups a stream of micro-batches into windows."""

import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from virtualbatch.window.cut import check_sizes
from virtualbatch.window.window import Window, is_iterable


class Windows(Iterable[Window]):
    """The windows of a stream. Every iteration reads the stream anew.

    Args:
        stream: micro-batches.
        accumulation_steps: micro-batches per window, checked.
    """

    __slots__ = ("_accumulation_steps", "_stream")

    def __init__(self, stream: Iterable[Any], accumulation_steps: int):
        self._stream = stream
        self._accumulation_steps = accumulation_steps

    def __iter__(self) -> Iterator[Window]:
        is_empty = True
        for window in grouped(self._stream, self._accumulation_steps):
            is_empty = False
            yield window
        if is_empty:
            raise ValueError(
                "windows needs at least one micro-batch. Got an empty stream. "
                "A generator can be read only once: pass a fresh one for each epoch."
            )

    def __len__(self) -> int:
        """The number of windows in an epoch. Raises the stream's TypeError if it has no length."""
        length: int = len(self._stream)  # type: ignore[arg-type]
        return -(-length // self._accumulation_steps)

    def __repr__(self) -> str:
        return f"Windows of {self._accumulation_steps} micro-batches each"


def grouped(stream: Iterable[Any], accumulation_steps: int) -> Iterator[Window]:
    """The windows of one pass through a stream, which may be empty.

    Args:
        stream: micro-batches.
        accumulation_steps: micro-batches per window, checked.
    """
    microbatches = iter(stream)
    while group := tuple(islice(microbatches, min(accumulation_steps, sys.maxsize))):
        yield Window(group)
        # A stream that has ended may start again at the next request.
        if len(group) < accumulation_steps:
            return


def windows(stream: Iterable[Any], accumulation_steps: int) -> Windows:
    """Groups a stream of micro-batches into windows, one per update.

    Nothing is dropped: the last window may be shorter, and it is divided by its own weight.

    Args:
        stream: micro-batches, such as a `DataLoader` or a batched `tf.data.Dataset`.
        accumulation_steps: micro-batches per window; a positive integer.

    Returns:
        An iterable of Windows of `accumulation_steps` micro-batches; the last one may be shorter.
        It reads the stream again for each epoch, and has a length if the stream has one.

    Raises:
        ValueError: accumulation_steps is not a positive integer (at the call), or the stream is
            empty (at the first window), such as a generator in its second epoch.
        TypeError: the stream is not iterable (at the call).

    Example:
        >>> found = windows("abcde", accumulation_steps=2)
        >>> len(found), [list(window) for window in found]
        (3, [['a', 'b'], ['c', 'd'], ['e']])
    """
    check_sizes(None, accumulation_steps)
    if not is_iterable(stream):
        raise TypeError(
            "windows groups an iterable of micro-batches. "
            f"Got {type(stream).__name__}. Pass a loader, a dataset or a list."
        )
    return Windows(stream, int(accumulation_steps))
