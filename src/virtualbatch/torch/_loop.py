"""The loop over the micro-batches of one window: forward, share, backward, sum."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from virtualbatch.torch._aux import detached
from virtualbatch.torch._batchnorm import MergedStatistics
from virtualbatch.torch._grad_watch import check_recording
from virtualbatch.torch._gradients import WindowGradients
from virtualbatch.torch._loss import WindowLoss, checked_terms
from virtualbatch.torch._microbatch import Microbatch
from virtualbatch.torch._stats import GradientNorms
from virtualbatch.window.shares import Shares
from virtualbatch.window.terms import loss_and_aux


class Loop(NamedTuple):
    """The loop over the micro-batches of one window.

    Fields:
        loss_fn, has_aux: as in `Program`.
        statistics: BatchNorm's moments of the window.
        gradients: None if PyTorch records no gradients.
        norms: norms of gradients, if statistics of the window are asked for.
        in_step: as in `Program`.
    """

    loss_fn: Callable[[Any], Any]
    has_aux: bool
    statistics: MergedStatistics
    gradients: WindowGradients | None
    norms: GradientNorms | None
    in_step: Callable[[int, int], None] | None

    def run(
        self,
        cut: Sequence[Microbatch],
        shares: Shares,
        loss: WindowLoss,
        all_aux: list[Any],
        keeps: bool,
        holds_last: bool,
    ) -> None:
        """Runs the micro-batches.

        Args:
            cut: the micro-batches; see `Program.run`.
            shares: their shares.
            loss: receives the losses.
            all_aux: receives the aux of each micro-batch.
            keeps: whether the gradients are added to `.grad` at the end of the window.
            holds_last: as in `Program`.
        """
        gradients = self.gradients
        forward = self.statistics.heard(self.loss_fn) if self.statistics else self.loss_fn
        count = len(shares.rows)
        loss.rows = [microbatch.rows for microbatch in cut[:count]]
        empty = [shares.is_empty(index) for index in range(count)]
        # A window without any weight has the loss 0. The parameters that its first micro-batch
        # reaches get the gradient 0.
        nothing = all(empty) and not shares.elsewhere and self.in_step is None
        # Rows without weight still count in aux and BatchNorm, as they do in the whole batch.
        run_all = self.has_aux or bool(self.statistics)
        is_only = len(cut) == 1 and keeps
        if gradients is not None and not is_only:
            gradients.start(commit=keeps)
        counted = False
        for index, microbatch in enumerate(cut):
            is_filler = index >= count
            counts = self.in_step is not None or not empty[index] or (nothing and index == 0)
            if not (counts or run_all):
                continue
            if self.in_step is not None:
                self.in_step(index, len(cut))
            result = (self.loss_fn if is_filler else forward)(microbatch.get())
            check_recording(gradients is not None)
            if gradients is not None and is_only:
                gradients.start_after_forward()
            if self.has_aux:
                result, aux = loss_and_aux(result, self.has_aux)
                if not is_filler:
                    all_aux.append(detached(aux))
                del aux
            terms = checked_terms(result)
            parts = [0.0] * len(terms) if is_filler else shares.of(terms, index)
            if counts:
                counted = True
                parts = [1.0] * len(parts) if nothing else parts
                if gradients is not None and holds_last and index == len(cut) - 1:
                    gradients.hold(terms.values(), parts)
                elif gradients is not None:
                    gradients.add(terms.values(), parts)
                    if self.norms is not None and not nothing:
                        self.norms.close(shares.of_rows_or_term()[index], gradients.factor)
                loss.add(index, terms, parts)
            # Freed before the next forward pass: two graphs would hold two sets of activations.
            del result, terms
        if self.in_step is not None:
            self.in_step(len(cut), len(cut))
        if gradients is not None:
            if counted and not gradients.found_any:
                raise ValueError(
                    "A loss must depend on a trainable parameter. Got one without a gradient. "
                    "Compute it from the output of the module, without detach() or item()."
                )
            if nothing:
                gradients.zero()
        if nothing:
            loss.zero()
