"""The interface of replicas: local micro-batches, and one reduction of gradients."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeAlias

import torch

from virtualbatch.noise.estimate import WindowStats
from virtualbatch.torch._batch import ReadBatch
from virtualbatch.torch._batchnorm import Moments
from virtualbatch.torch._conclusion import Ran
from virtualbatch.torch._handover import Finished
from virtualbatch.torch._microbatch import Microbatch
from virtualbatch.torch._window import Program
from virtualbatch.window.shares import Shares

# Tries the law on a first window: (batch, micro-batches, their shares) -> micro-batches to run.
Prove: TypeAlias = Callable[[ReadBatch, Sequence[Microbatch], Shares], Sequence[Microbatch]]


class Outcome(NamedTuple):
    """The results of a window that all ranks know, once all have succeeded.

    Fields:
        loss: the loss of the window; a detached scalar.
        reached: for each parameter, whether some rank has a gradient of it.
        microbatches: the number of micro-batches with a share, on all ranks.
        mean_square: the mean square of their gradients if statistics are asked for, else 0.
        statistics: for each BatchNorm layer the moments of each call.
    """

    loss: torch.Tensor
    reached: list[bool]
    microbatches: int
    mean_square: torch.Tensor
    statistics: list[list[Moments]]

    def stats(self, ran: Ran) -> WindowStats | None:
        """The statistics of a window whose gradients were added up into empty `.grad`s."""
        norms = ran.loop.norms
        if norms is None:
            return None
        found = [p.grad for p in ran.gradients.parameters if p.grad is not None]
        square = norms.square(found)
        mean_square = self.mean_square.to(square)
        return WindowStats(ran.shares.window, self.microbatches, mean_square, square)


class Replicas(ABC):
    """The ranks whose gradients a module adds up.

    Attributes:
        group: the process group of the ranks.
        size: what the module divides gradients by: the number of ranks, unless the user set
            another number.
        can_run_alone: whether a rank can run a micro-batch while the others do something else.
        overlaps: whether gradients are reduced while the last micro-batch is differentiated.
    """

    group: Any
    size: float
    can_run_alone: bool
    overlaps: bool

    @abstractmethod
    def check(self, program: Program) -> None:
        """Refuses options of a window that these replicas do not support.

        Raises:
            ValueError: statistics were asked for, and these replicas cannot compute them now.
        """

    @abstractmethod
    def settle(self) -> None:
        """Does what all ranks must do together before a window, such as sending buffers."""

    @abstractmethod
    def alone(self) -> AbstractContextManager[None]:
        """A context in which this rank runs micro-batches without the others."""

    @abstractmethod
    def quiet(self) -> AbstractContextManager[None]:
        """A context for the micro-batches of a window. Hooks of parameters are not called."""

    @abstractmethod
    def begin(self, *, is_filler: bool, is_last: bool) -> None:
        """Announces the next micro-batch, where ranks cannot run alone.

        Args:
            is_filler: whether this rank runs the micro-batch only for the other ranks.
            is_last: whether the micro-batch is the last one of the window.
        """

    @abstractmethod
    def finished(self, ran: Ran, reached: Sequence[bool], scale: torch.Tensor | None) -> Finished:
        """The gradients of a window, which a backward pass adds to those of other ranks.

        Args:
            ran: the window as it ran on this rank.
            reached: for each parameter, whether any rank has a gradient of it.
            scale: the scale that is already in the gradients; None for 1.
        """
