"""A window that has run, and what is kept of it: its update, nothing yet, or nothing at all."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch

from virtualbatch.noise.estimate import WindowStats
from virtualbatch.torch._commit import Commit
from virtualbatch.torch._gradients import WindowGradients
from virtualbatch.torch._loop import Loop
from virtualbatch.torch._loss import WindowLoss
from virtualbatch.torch._undo import Undo
from virtualbatch.window.shares import Shares


class Ran(NamedTuple):
    """A window that has run, of which nothing is kept yet.

    Fields:
        loop: the loop that ran the window.
        loss: the losses of the window.
        aux: the aux of the window, as the only item; empty if there is no aux.
        shares: the shares of the micro-batches.
        undo: puts back `.grad`s and buffers.
    """

    loop: Loop
    loss: WindowLoss
    aux: list[Any]
    shares: Shares
    undo: Undo

    @property
    def gradients(self) -> WindowGradients:
        """The gradients of a window that was differentiated."""
        if self.loop.gradients is None:
            raise ValueError("internal: a window without gradients is asked for them.")
        return self.loop.gradients

    def reached(self, parameters: int) -> list[bool]:
        """Whether the window has a gradient, for each parameter.

        Args:
            parameters: the number of parameters.
        """
        gradients = self.loop.gradients
        return [False] * parameters if gradients is None else gradients.reached()

    def result(self, loss: torch.Tensor, stats: WindowStats | None = None) -> Any:
        """The result for the caller: the loss, or a tuple with aux and statistics."""
        found = (loss, *self.aux, *([] if stats is None else [stats]))
        return found if len(found) > 1 else loss

    def stats(self) -> WindowStats | None:
        """The statistics of the window, if they are asked for."""
        norms = self.loop.norms
        if norms is None:
            return None
        return norms.stats(self.gradients.sums(), self.shares.window, self.shares.counted)


# Decides what is kept of a window that has run. If it raises, the window leaves no trace.
Conclusion: TypeAlias = Callable[[Ran], Any]


def keep(ran: Ran) -> Any:
    """Adds the gradients to `.grad`, and makes BatchNorm's update. Returns the call's result."""
    result = ran.result(ran.loss.mean(), ran.stats())
    commit = Commit()
    ran.loop.statistics.prepare(commit)
    ran.gradients.prepare(commit)
    commit.run(ran.undo)
    return result


def take_back(ran: Ran) -> Any:
    """Restores everything as before the window. Returns the call's result."""
    result = ran.result(ran.loss.mean(), ran.stats())
    ran.undo.do()
    return result


def held_by(undo: Undo) -> Conclusion:
    """Leaves a window open for more work before anything is kept.

    Args:
        undo: the undo of the code that does that work. From now on it puts the window back.

    Returns:
        A conclusion whose result is the window itself.
    """

    def hold(ran: Ran) -> Ran:
        undo.instead(ran.undo.action)
        ran.undo.instead(None)
        return ran

    return hold
