"""The results of a successful window: first all are prepared, then all are written.

Until the first gradient is added, a window can be undone. After that it cannot: gradients are
added in place to `.grad`, as PyTorch itself adds them, and no copy is kept. So if the writing is
interrupted after that point, the rest is still written, as from a redo log.
"""

from collections.abc import Callable
from typing import Any

import torch

from virtualbatch.torch._plan.memory import ERRORS
from virtualbatch.torch._state import versions_of
from virtualbatch.torch._undo import Undo
from virtualbatch.window.shares import accumulator_dtype

# Changes the first tensor in place, using the second.
_Write = Callable[[torch.Tensor, torch.Tensor], Any]

_add: _Write = torch.Tensor.add_
_copy: _Write = torch.Tensor.copy_


def widened(x: torch.Tensor) -> torch.Tensor:
    """The tensor in the dtype in which gradients are summed."""
    return x.to(getattr(torch, accumulator_dtype(str(x.dtype).removeprefix("torch."))))


def added(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The sum of two gradients, dense or sparse."""
    # PyTorch adds sparse to dense, but not dense to sparse.
    return b + a if a.is_sparse and not b.is_sparse else a + b


def narrowed(found: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The gradient of a window in the dtype of its parameter.

    Args:
        found: the gradient, dense or sparse.
        dtype: the dtype of the parameter.
    """
    # A sparse row may have many entries. They are added here, before the dtype gets narrower.
    if found.is_sparse and found.dtype != dtype:
        found = found.coalesce()
    return found.to(dtype)


class Commit:
    """Everything that is written at the end of a window, for all dtypes and layouts."""

    def __init__(self) -> None:
        self._writes: list[tuple[torch.Tensor, _Write, torch.Tensor]] = []
        self._grads: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._statistics: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._versions = versions_of(())
        # The next write, and the version of its tensor before that write; None before it begins.
        self._next: tuple[int, int | None] = (0, None)

    def gradient(
        self, parameter: torch.Tensor, before: torch.Tensor | None, found: torch.Tensor | None
    ) -> None:
        """Prepares the new `.grad` of a parameter.

        Args:
            parameter: the parameter.
            before: the `.grad` before the window. It is changed in place where it can hold the
                sum.
            found: the gradient of the window, which may be changed; None for no gradient.
        """
        total = before
        if found is None:
            pass
        elif before is None:
            total = narrowed(found, parameter.dtype)
        elif before.is_sparse and not found.is_sparse:
            total = added(before, found).to(before.dtype)
        elif before.dtype == found.dtype:
            self._writes.append((before, _add, found))
        elif found.is_sparse and before.is_sparse:
            total = added(widened(before), found).coalesce().to(before.dtype)
        elif not found.is_sparse and (
            torch.promote_types(before.dtype, found.dtype) == found.dtype
        ):
            self._writes += [(found, _add, before), (before, _copy, found)]
        else:
            self._writes.append((before, _add_widened, found))
        self._grads.append((parameter, total))

    def statistics(self, buffer: torch.Tensor, value: torch.Tensor) -> None:
        """Prepares the new value of a buffer.

        Args:
            buffer: the buffer, which is written in place.
            value: a tensor of the same shape.
        """
        self._statistics.append((buffer, value))

    def keep_versions(self, buffers: list[torch.Tensor]) -> None:
        """Leaves the versions of buffers as they are, as PyTorch's own kernels do."""
        self._versions = versions_of(buffers)

    def run(self, undo: Undo) -> None:
        """Writes everything that was prepared.

        Args:
            undo: puts the window back. When this method returns, there is nothing to undo.

        Raises:
            RuntimeError: memory ran out after a write that cannot be undone.
        """
        put_back = undo.action
        undo.instead(lambda: self._finish() if self._has_begun() else put_back())
        try:
            self._finish()
        except ERRORS.kinds as error:
            # An out-of-memory error would make the caller run the window again. Its gradients
            # would then be added twice.
            if self._has_begun() and ERRORS.is_possible(error):
                raise RuntimeError(
                    "Memory must not run out while gradients are added to .grad. Got an "
                    "out-of-memory error after some were added; the others were then tried once "
                    "more. Call zero_grad(), and run the batch again with a smaller "
                    "microbatch_size."
                ) from error
            raise
        undo.instead(None)

    def _has_begun(self) -> bool:
        """Whether something was written that cannot be undone."""
        index, version = self._next
        return index > 0 or (version is not None and self._writes[0][0]._version != version)

    @torch.no_grad()
    def _finish(self) -> None:
        """Writes everything that is not written yet."""
        self._write()
        with self._versions:
            for buffer, value in self._statistics:
                buffer.copy_(value)
        for parameter, total in self._grads:
            parameter.grad = total

    def _write(self) -> None:
        while self._next[0] < len(self._writes):
            index, version = self._next
            target, write, source = self._writes[index]
            if version is None:
                version = target._version
                self._next = (index, version)
            # Two parameters may share one `.grad`, so a version only tells about the latest write.
            if target._version == version:
                write(target, source)
            self._next = (index + 1, None)


def _add_widened(before: torch.Tensor, found: torch.Tensor) -> None:
    """Adds a gradient in place, rounded once."""
    before.copy_(added(widened(before), found))
