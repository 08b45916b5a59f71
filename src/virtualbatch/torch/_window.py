"""One window: micro-batches, one after another, whose gradients are committed together or not."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch

from virtualbatch.torch._aux import detached, merged_aux
from virtualbatch.torch._batch import Microbatch, on_device
from virtualbatch.torch._batchnorm import MergedStatistics, is_tracked
from virtualbatch.torch._capture import Captured
from virtualbatch.torch._gradients import WindowGradients
from virtualbatch.torch._loss import WindowLoss, checked_terms
from virtualbatch.torch._modules import Inventory
from virtualbatch.torch._state import Buffers
from virtualbatch.torch._stats import GradientNorms
from virtualbatch.torch._weights import window_shares
from virtualbatch.window.shares import Shares, check_counted
from virtualbatch.window.terms import GivenWeight, loss_and_aux


class Program(NamedTuple):
    """What `backward` was given beside the batch and its size.

    Fields:
        loss_fn: micro-batch -> loss, or (loss, aux).
        weight: micro-batch -> weight, "sum", or None.
        has_aux: whether `loss_fn` returns aux.
        backward_fn: scalar loss -> None, or None.
        found: what its modules hold.
        stats: whether the statistics of the window are returned too.
    """

    loss_fn: Callable[[Any], Any]
    weight: GivenWeight
    has_aux: bool
    backward_fn: Callable[[torch.Tensor], Any] | None
    found: Inventory
    stats: bool = False

    def shares(self, cut: Sequence[Microbatch]) -> Shares:
        """The shares of a window's micro-batches."""
        return window_shares(cut, self.weight)

    def run(self, cut: Sequence[Microbatch], shares: Shares, *, commit: bool = True) -> Any:
        """Runs a window.

        If anything raises, every `.grad`, buffer, momentum and hook is as before the call.

        Args:
            cut: the micro-batches.
            shares: their shares.
            commit: whether gradients and statistics are kept; else all is put back.

        Returns:
            The mean loss, or (loss, aux); with `stats` a tuple that ends with the `WindowStats`.
        """
        if self.stats:
            check_counted(shares)
        if commit and isinstance(self.loss_fn, Captured):
            replayed = self._replayed(self.loss_fn, cut, shares)
            if replayed is not None:
                return replayed
        if self.found.accelerator is not None:
            cut = [on_device(microbatch, self.found.accelerator) for microbatch in cut]
        buffers = Buffers(self.found.with_buffers)
        statistics = MergedStatistics(self.found.with_buffers, buffers)
        norms = GradientNorms(self.found.parameters) if self.stats else None
        gradients = WindowGradients(
            self.found.parameters, self.backward_fn, norms, partial(_has_memory_of, cut)
        )
        try:
            with ExitStack() as attached:
                if statistics:
                    attached.enter_context(statistics.attached())
                if norms is not None:
                    attached.enter_context(norms.attached())
                run = _Run(self.loss_fn, self.has_aux, statistics, gradients, norms)
                loss, aux = run.window(cut, shares, commit)
                result: Any = (loss,)
                if self.has_aux:
                    result += (merged_aux(self.loss_fn, cut, aux, shares),)
                if norms is not None:
                    result += (norms.stats(gradients.sums(), shares.window, shares.counted),)
            if commit:
                statistics.commit()
                gradients.commit()
            else:
                gradients.restore()
                buffers.restore()
        except BaseException:
            gradients.restore()
            buffers.restore()
            raise
        return result if len(result) > 1 else loss

    def _replayed(
        self, loss_fn: Captured, cut: Sequence[Microbatch], shares: Shares
    ) -> torch.Tensor | None:
        """The loss of a window of captured graphs; None if it takes the normal path."""
        for reason, is_so in (
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


class _Run(NamedTuple):
    """The micro-batches of one window, one after another."""

    loss_fn: Callable[[Any], Any]
    has_aux: bool
    statistics: MergedStatistics
    gradients: WindowGradients
    norms: GradientNorms | None

    def window(
        self, cut: Sequence[Microbatch], shares: Shares, commit: bool
    ) -> tuple[torch.Tensor, list[Any]]:
        """The loss of the window, and the aux of each micro-batch if it is asked for."""
        loss_fn, has_aux, statistics, gradients, norms = self
        forward = statistics.heard(loss_fn) if statistics else loss_fn
        empty = [shares.is_empty(index) for index in range(len(cut))]
        # A window without any weight has the loss 0 and, where one micro-batch reaches a
        # parameter, the gradient 0.
        nothing = all(empty)
        # Rows without weight still meet aux and BatchNorm, as they do in the whole batch.
        run_all = has_aux or bool(statistics)
        loss = WindowLoss()
        auxes: list[Any] = []
        is_only = len(cut) == 1 and commit
        if not is_only:
            gradients.start(commit=commit)
        for index, microbatch in enumerate(cut):
            counts = not empty[index] or (nothing and index == 0)
            if not (counts or run_all):
                continue
            result = forward(microbatch.get())
            if is_only:
                gradients.start_after_forward()
            if has_aux:
                result, aux = loss_and_aux(result, has_aux)
                auxes.append(detached(aux))
                del aux
            terms = checked_terms(result)
            parts = shares.of(terms, index)
            if counts:
                parts = [1.0] * len(parts) if nothing else parts
                gradients.add(terms.values(), parts)
                if norms is not None and not nothing:
                    norms.close(shares.of_rows_or_term()[index], gradients.factor)
                loss.add(terms.values(), parts)
            # Two graphs at once would hold two sets of activations.
            del result, terms
        if not gradients.found_any:
            raise ValueError(
                "A loss must depend on a trainable parameter. Got one without a gradient. "
                "Compute it from the output of the module, without detach() or item()."
            )
        if not nothing:
            return loss.mean(), auxes
        gradients.zero()
        return torch.zeros_like(loss.mean()), auxes


def _has_memory_of(cut: Sequence[Microbatch], tensor: torch.Tensor) -> bool:
    """Whether a tensor shares memory with the rows of a window, as they were given."""
    place = tensor.untyped_storage().data_ptr()
    leaves = (leaf for _, leaf in (pair for piece in cut for pair in piece.tensors()))
    return any(leaf.untyped_storage().data_ptr() == place for leaf in leaves)
