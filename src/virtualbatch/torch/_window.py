"""One window: micro-batches run one after another. Their gradients are committed all, or none."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch

from virtualbatch.torch._accumulator import RoundedWindow
from virtualbatch.torch._aux import merged_aux
from virtualbatch.torch._batchnorm import MergedStatistics, is_tracked
from virtualbatch.torch._capture import Captured
from virtualbatch.torch._conclusion import Conclusion, Ran, keep, take_back
from virtualbatch.torch._gradients import WindowGradients
from virtualbatch.torch._loop import Loop
from virtualbatch.torch._loss import WindowLoss
from virtualbatch.torch._microbatch import Microbatch, on_device
from virtualbatch.torch._modules import Inventory
from virtualbatch.torch._rounding import StochasticRounding
from virtualbatch.torch._state import Buffers, Places
from virtualbatch.torch._stats import GradientNorms
from virtualbatch.torch._undo import Undo, all_or_nothing
from virtualbatch.torch._weights import window_weights
from virtualbatch.window.shares import Shares, check_counted
from virtualbatch.window.terms import GivenWeight
from virtualbatch.window.weights import HostWeights


class Program(NamedTuple):
    """Everything that a window needs, except the batch and its size.

    Fields:
        loss_fn: micro-batch -> loss, or (loss, aux).
        weight: micro-batch -> weight, "sum", or None.
        has_aux: whether `loss_fn` returns aux.
        backward_fn: scalar loss -> None, or None.
        found: the contents of the modules.
        stats: whether the statistics of the window are returned too.
        averaged_over: the number of replicas that the gradients are divided by later.
        holds_last: whether the last micro-batch is differentiated when gradients are handed over.
        in_step: (micro-batches that have run, number of micro-batches) -> None. It is called before
            each micro-batch and after the last one, if ranks run each micro-batch at the same time.
            Otherwise None.
        begin: called before each attempt at a window. A trainer restores here what its loss changes
            besides tensors, such as lists of metrics.
        rounding_seed: the seed of the random numbers that round sums of bfloat16, the same in each
            attempt; None where sums are float32.
    """

    loss_fn: Callable[[Any], Any]
    weight: GivenWeight
    has_aux: bool
    backward_fn: Callable[[torch.Tensor], Any] | None
    found: Inventory
    stats: bool = False
    averaged_over: float = 1
    holds_last: bool = False
    in_step: Callable[[int, int], None] | None = None
    begin: Callable[[], None] | None = None
    rounding_seed: int | None = None

    def weights(self, cut: Sequence[Microbatch]) -> HostWeights:
        """The weights of a window's micro-batches."""
        return window_weights(cut, self.weight)

    def shares(self, cut: Sequence[Microbatch]) -> Shares:
        """The shares of a window's micro-batches, if this is the only replica."""
        return self.weights(cut).shares()

    def run(
        self,
        cut: Sequence[Microbatch],
        shares: Shares,
        conclude: Conclusion,
        loss: WindowLoss | None = None,
    ) -> Any:
        """Runs a window.

        If anything raises, every `.grad`, buffer, momentum and hook is as before the call.

        Args:
            cut: the micro-batches. The ones at the end without shares are fillers: they run because
                other ranks run a micro-batch, and they count nothing.
            shares: the shares of the micro-batches.
            conclude: decides what is kept of the finished window, such as `keep`.
            loss: an empty object that receives the losses of the window.

        Returns:
            What `conclude` returns.
        """
        return all_or_nothing(
            partial(self._run, cut, shares, conclude, WindowLoss() if loss is None else loss)
        )

    def _run(
        self,
        cut: Sequence[Microbatch],
        shares: Shares,
        conclude: Conclusion,
        loss: WindowLoss,
    ) -> Any:
        if self.stats:
            check_counted(shares)
        if self.begin is not None:
            self.begin()
        if isinstance(self.loss_fn, Captured) and conclude is not take_back:
            replayed = self._replayed(self.loss_fn, cut, shares, conclude is keep)
            if replayed is not None:
                return replayed
        if self.found.accelerator is not None:
            cut = [on_device(microbatch, self.found.accelerator) for microbatch in cut]
        buffers = Buffers(self.found.with_buffers)
        statistics = MergedStatistics(self.found.with_buffers, buffers)
        norms = GradientNorms(self.found.parameters) if self.stats else None
        gradients = None
        if torch.is_grad_enabled():
            gradients = WindowGradients(
                self.found.parameters,
                self.backward_fn,
                norms,
                partial(_has_memory_of, cut),
                self.averaged_over,
                self.in_step is not None,
                None if self.rounding_seed is None else StochasticRounding(self.rounding_seed),
            )
        loop = Loop(self.loss_fn, self.has_aux, statistics, gradients, norms, self.in_step)
        rounded = None if self.rounding_seed is None else RoundedWindow(self.found.owner)
        undo = Undo(partial(_put_back, gradients, buffers, rounded))
        ran = Ran(loop, loss, [], shares, undo)
        with undo:
            if rounded is not None:
                rounded.count()
            with ExitStack() as attached:
                if statistics:
                    attached.enter_context(statistics.attached())
                if norms is not None:
                    attached.enter_context(norms.attached())
                loop.run(cut, shares, loss, ran.aux, conclude is keep, self.holds_last)
                if self.has_aux:
                    own = cut[: len(shares.rows)]
                    # The merge may run the loss function on fake tensors. None of them must stay
                    # as a buffer.
                    with Undo(Places(self.found.with_buffers).restore):
                        aux = merged_aux(self.loss_fn, own, ran.aux, shares) if own else None
                    ran.aux[:] = [aux]
            return conclude(ran)

    def _replayed(
        self, loss_fn: Captured, cut: Sequence[Microbatch], shares: Shares, keeps: bool
    ) -> torch.Tensor | None:
        """The loss of a window that runs as captured graphs; None if it takes the normal path."""
        for reason, is_so in (
            ("gradients are handed over later", not keeps),
            ("has_aux is set", self.has_aux),
            ("stats is set", self.stats),
            ("there is a backward_fn", self.backward_fn is not None),
            ("a Window has no known rows", any(microbatch.rows is None for microbatch in cut)),
            (
                "a BatchNorm layer is in training mode",
                any(map(is_tracked, self.found.with_buffers)),
            ),
        ):
            if is_so:
                loss_fn.tell(reason)
                return None
        return loss_fn.replayed(self.found, cut, shares)


def _put_back(*parts: WindowGradients | Buffers | RoundedWindow | None) -> None:
    """Leaves everything as it was before a window."""
    for part in parts:
        if part is not None:
            part.restore()


def _has_memory_of(cut: Sequence[Microbatch], tensor: torch.Tensor) -> bool:
    """Whether a tensor shares memory with the rows of a window, as they were given."""
    place = tensor.untyped_storage().data_ptr()
    leaves = (leaf for _, leaf in (pair for piece in cut for pair in piece.tensors()))
    return any(leaf.untyped_storage().data_ptr() == place for leaf in leaves)
