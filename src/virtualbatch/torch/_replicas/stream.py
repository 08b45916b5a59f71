"""Windows of streams that all ranks read together, until the streams of all ranks have ended."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from virtualbatch.window.stream import Windows, grouped
from virtualbatch.window.stream import windows as windows_of_one
from virtualbatch.window.window import Window

# What a rank tells the others before a window. All ranks act on the largest of these numbers.
_ENDED, _READ, _FAILED = range(3)


def windows(
    stream: Iterable[Any], accumulation_steps: int, *, group: Any = None
) -> "Windows | GroupWindows":
    """Groups a stream of micro-batches into windows, one per update.

    Nothing is dropped. The last window holds what is left of the stream, and its own weight
    divides it. With `group`, each rank reads its own stream, of any length, and the windows end
    when all streams have ended. A rank whose stream ends earlier gets `Window([])` until then.

    Args:
        stream: the micro-batches, such as a `DataLoader`.
        accumulation_steps: the micro-batches per window on this rank: a positive integer.
        group: the ranks that train together, as a process group or a mesh. They exchange a small
            message before each window, so all of them must read at the same time. None means that
            only the length of this stream counts.

    Returns:
        An iterable of `Window` values with `accumulation_steps` micro-batches each. The last one
        may have fewer. Each epoch reads the stream again. Without `group` the result has a length
        if the stream has one. With `group` it has none, because other ranks may have more windows.

    Raises:
        ValueError: at the call: `accumulation_steps` is not a positive integer.
        ValueError: at the first window: the stream is empty on all ranks, as a generator is in a
            second epoch.
        TypeError: at the call: the stream is not iterable, or this rank is not in the group.
        RuntimeError: at a window: the stream of another rank has raised.

    Example:
        >>> found = windows("abcde", accumulation_steps=2)
        >>> len(found), [list(window) for window in found]
        (3, [['a', 'b'], ['c', 'd'], ['e']])
    """
    alone = windows_of_one(stream, accumulation_steps)
    if group is None:
        return alone
    return GroupWindows(stream, accumulation_steps, _process_groups(group))


class GroupWindows(Iterable[Window]):
    """The windows of a stream, in step with other ranks. Each iteration reads the stream again.

    Args:
        stream: micro-batches.
        accumulation_steps: micro-batches per window, checked.
        groups: process groups that together hold all ranks.
    """

    def __init__(self, stream: Iterable[Any], accumulation_steps: int, groups: list[Any]):
        self._stream = stream
        self._accumulation_steps = accumulation_steps
        self._groups = groups
        # Gloo sends from the host. NCCL sends only from a device.
        backends = [str(torch.distributed.get_backend_config(group)) for group in groups]
        on_host = all("cpu:" in backend for backend in backends)
        self._device = None if on_host else torch.accelerator.current_accelerator()

    def __iter__(self) -> Iterator[Window]:
        found = grouped(self._stream, self._accumulation_steps)
        window = self._next(found)
        if self._largest(_READ if window else _ENDED) == _ENDED:
            raise ValueError(
                "windows needs at least one micro-batch on some rank. Got an empty stream on all "
                "ranks. A generator can be read only once: pass a fresh one for each epoch."
            )
        while True:
            yield window
            window = self._next(found)
            if self._largest(_READ if window else _ENDED) == _ENDED:
                return

    def __repr__(self) -> str:
        return f"Windows of {self._accumulation_steps} micro-batches on each rank"

    def _next(self, found: Iterator[Window]) -> Window:
        try:
            return next(found, Window([]))
        except BaseException as error:
            # Without this message the others would wait until the time limit of the group.
            try:
                self._exchange(_FAILED)
            except RuntimeError as lost:
                error.add_note(f"The other ranks could not be notified: {lost}")
            raise

    def _largest(self, own: int) -> int:
        largest = self._exchange(own)
        if largest == _FAILED:
            raise RuntimeError(
                "Every rank must be able to read its stream. Got an error in the stream of "
                "another rank, before this window. See the log of that rank."
            )
        return largest

    def _exchange(self, own: int) -> int:
        message = torch.tensor([own], dtype=torch.int32, device=self._device)
        for group in self._groups:
            torch.distributed.all_reduce(message, torch.distributed.ReduceOp.MAX, group=group)
        return int(message)


def _process_groups(group: Any) -> list[Any]:
    # In a mesh, the largest of all ranks is found along one dimension after another.
    groups = group.get_all_groups() if hasattr(group, "get_all_groups") else [group]
    if not all(isinstance(each, torch.distributed.ProcessGroup) for each in groups):
        raise TypeError(
            "group must be a process group that this rank is in, or a mesh. "
            f"Got {type(group).__name__}. Pass torch.distributed.group.WORLD for all ranks, or "
            "leave it out where this process trains alone."
        )
    return groups
