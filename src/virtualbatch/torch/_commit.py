"""What a window leaves when it has succeeded: prepared first, then written, and never by half.

Until the first gradient is added, a window can be put back. From then on it cannot: gradients are
added in place to what `.grad` held, as PyTorch itself adds them, and no copy is kept. So whatever
interrupts the writing then, it is finished: a redo log.
"""

from collections.abc import Callable
from typing import Any

import torch

from virtualbatch.torch._plan.memory import ERRORS
from virtualbatch.torch._state import versions_of
from virtualbatch.torch._undo import Undo
from virtualbatch.window.shares import accumulator_dtype

# Changes the first tensor in place by the second.
_Write = Callable[[torch.Tensor, torch.Tensor], Any]

_add: _Write = torch.Tensor.add_
_copy: _Write = torch.Tensor.copy_


def widened(x: torch.Tensor) -> torch.Tensor:
    """The same in the dtype in which gradients are summed."""
    return x.to(getattr(torch, accumulator_dtype(str(x.dtype).removeprefix("torch."))))


def added(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The sum of two gradients, dense or sparse."""
    # PyTorch adds sparse to dense, but not dense to sparse.
    return b + a if a.is_sparse and not b.is_sparse else a + b


def narrowed(found: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The gradient of a window in the dtype of its parameter.

    Args:
        found: dense or sparse.
        dtype: of the parameter.
    """
    # Many entries of one sparse row would be added in few bits by whoever reads them.
    if found.is_sparse and found.dtype != dtype:
        found = found.coalesce()
    return found.to(dtype)


class Commit:
    """What is written at the end of a window, whatever the dtypes and layouts."""

    def __init__(self) -> None:
        self._writes: list[tuple[torch.Tensor, _Write, torch.Tensor]] = []
        self._grads: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._statistics: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._versions = versions_of(())
        # The write that is next, and the version of its tensor before it; None if it is not begun.
        self._next: tuple[int, int | None] = (0, None)

    def gradient(
        self, parameter: torch.Tensor, before: torch.Tensor | None, found: torch.Tensor | None
    ) -> None:
        """Prepares what `.grad` of a parameter becomes.

        Args:
            parameter: the parameter.
            before: what `.grad` held before; to be changed in place where it can take the sum.
            found: the gradient of the window, which may be changed; None for none.
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
        """Prepares what a buffer becomes.

        Args:
            buffer: written in place.
            value: of its shape.
        """
        self._statistics.append((buffer, value))

    def keep_versions(self, buffers: list[torch.Tensor]) -> None:
        """Leaves the versions of buffers as they are, as PyTorch's own kernels do."""
        self._versions = versions_of(buffers)

    def run(self, undo: Undo) -> None:
        """Writes all of it.

        Args:
            undo: puts the window back; there is nothing to undo when this returns.

        Raises:
            RuntimeError: memory ran out when something was written that cannot be put back.
        """
        put_back = undo.action
        undo.instead(lambda: self._finish() if self._has_begun() else put_back())
        try:
            self._finish()
        except ERRORS.kinds as error:
            # Whoever runs a window again where memory runs out would add its gradients twice.
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
        """Whether something was changed that cannot be put back."""
        index, version = self._next
        return index > 0 or (version is not None and self._writes[0][0]._version != version)

    @torch.no_grad()
    def _finish(self) -> None:
        """Writes what is not written yet."""
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
            # Two parameters may have the same `.grad`, so only the latest write is asked.
            if target._version == version:
                write(target, source)
            self._next = (index + 1, None)


def _add_widened(before: torch.Tensor, found: torch.Tensor) -> None:
    """Adds a gradient in place, rounded once."""
    before.copy_(added(widened(before), found))
