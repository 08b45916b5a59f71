"""Gradients of a window: summed apart from the old `.grad`, and added to it only at the end.

If every parameter and term is float32 or wider, each backward pass starts from the micro-batch's
share, and PyTorch itself sums into a fresh `.grad`. This needs no buffer and no extra arithmetic.
Otherwise gradients are computed unscaled, and multiplied when they are added to a buffer.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch

from virtualbatch.torch._buffers import GradientBuffers
from virtualbatch.torch._commit import Commit
from virtualbatch.torch._differentiate import (
    Differentiate,
    from_factors,
    outside_autocast,
    through,
)
from virtualbatch.torch._faults import refuse_shared_graph
from virtualbatch.torch._grad_watch import GradWatch
from virtualbatch.torch._leaves import (
    ForeignLeaves,
    leaves,
    refuse_shards,
    refuse_unheld_parameter,
)
from virtualbatch.torch._muted import with_muted
from virtualbatch.torch._own_memory import OwnMemory
from virtualbatch.torch._rounding import StochasticRounding
from virtualbatch.torch._stats import GradientNorms
from virtualbatch.torch._stepping import refuse_changed_parameters, versions

HALF = {torch.float16, torch.bfloat16}


class WindowGradients:
    """Sums the gradients of a window's micro-batches.

    Args:
        parameters: trainable parameters, each once.
        backward_fn: scalar loss -> None; computes gradients into `.grad`.
        norms: receives the scaled losses; None where no norms are needed.
        is_given: tensor -> whether it shares memory with the batch.
        averaged_over: the number of replicas that the sums are divided by later.
        in_step: whether modules add up gradients over ranks in each backward pass. Then all ranks
            must run the same backward passes, and `.grad` holds gradients of all ranks.
        rounding: adds dense gradients of bfloat16; None where they are summed in float32.

    Attributes:
        parameters: the given parameters.
        held: terms whose backward pass is still to come, each with its factor.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        backward_fn: Callable[[torch.Tensor], Any] | None,
        norms: GradientNorms | None = None,
        is_given: Callable[[torch.Tensor], bool] = lambda tensor: False,
        averaged_over: float = 1,
        in_step: bool = False,
        rounding: StochasticRounding | None = None,
    ):
        self.parameters = parameters
        self._backward_fn = backward_fn
        self._norms = norms
        self._is_given = is_given
        self._at_first = [parameter.grad for parameter in parameters]
        # The gradients that the sums are added to.
        self._before = self._at_first
        # None if the window has only one micro-batch, which runs as an ordinary step.
        self._watch: GradWatch | None = None
        self._foreign: ForeignLeaves | None = None
        self._commits = True
        self._buffers = GradientBuffers(parameters, rounding)
        self._differentiate: Differentiate | None = None
        self._in_place = True
        self._own_memory = OwnMemory(parameters)
        self.found_any = False
        self.held: list[tuple[torch.Tensor, float]] = []
        self._averaged_over = averaged_over
        self._in_step = in_step
        # The factor between the gradients of the latest backward pass and their share.
        self.factor = 1.0 / averaged_over

    def start(self, *, commit: bool = True) -> None:
        """Puts the old `.grad`s aside, unchanged until the window has succeeded.

        Args:
            commit: whether the gradients of a successful window are kept.
        """
        self._commits = commit
        self._put_aside()
        self._watch = GradWatch(self.parameters)
        self._watch.look()

    def start_after_forward(self) -> None:
        """Puts the old `.grad`s aside after the forward pass of the only micro-batch.

        As in an ordinary step, a change of `.grad` in that forward pass is kept.
        """
        self._before = [parameter.grad for parameter in self.parameters]
        self._put_aside()

    def add(self, terms: Collection[torch.Tensor], shares: Sequence[float]) -> None:
        """Differentiates one micro-batch and adds its share of the gradient.

        Args:
            terms: scalar losses; those without a gradient add nothing.
            shares: one number per term. A term of share 0 is left out, because its gradient may
                be NaN, and 0 times NaN is NaN. If ranks run in step, the term is muted instead.

        Raises:
            ValueError: the loss function changed `.grad`, shares a graph with another micro-batch
                or reaches a parameter that no module holds, or a hook changed a parameter.
        """
        reached = self._reached(terms, shares)
        if self._differentiate is None:
            self._differentiate = self._chosen(terms)
        if reached:
            before = None if self.found_any else versions(self.parameters)
            self.found_any = True
            try:
                heard, factors = zip(*reached, strict=True)
                self._differentiate(with_muted(heard, factors) if self._in_step else heard, factors)
            except RuntimeError as error:
                refuse_shared_graph(error)
                raise
            if before is not None:
                refuse_changed_parameters(self.parameters, before)
            self._own_memory.give()
            if self._watch is not None:
                self._watch.look()

    def hold(self, terms: Collection[torch.Tensor], shares: Sequence[float]) -> None:
        """Keeps the last micro-batch undifferentiated, for `add_held`.

        Args:
            terms: scalar losses, as in `add`.
            shares: one number per term, as in `add`.

        Raises:
            ValueError: the loss function is wrong as in `add`, or something is of half precision.
        """
        reached = self._reached(terms, shares)
        if _is_half((*self.parameters, *terms)):
            raise ValueError(
                'reduce="overlapped" adds gradients up in their own dtype, which must be float32 '
                'or wider. Got half precision. Use reduce="window".'
            )
        refuse_unheld_parameter(terms, self.parameters)
        self.found_any |= bool(reached)
        self.held = reached

    def add_held(self, handed_over: torch.Tensor) -> None:
        """Differentiates the held micro-batch and the loss that hands the sums over, in one pass.

        Args:
            handed_over: the loss that hands the sums over; a scalar.
        """
        differentiate: Differentiate = from_factors
        terms = [handed_over, *(term for term, _ in self.held)]
        device = terms[-1].device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            differentiate = outside_autocast(differentiate, device)
        differentiate(terms, [1.0, *(factor for _, factor in self.held)])

    def zero(self) -> None:
        """Makes every gradient found so far zero, NaN included."""
        for parameter, total in zip(self.parameters, self._buffers.sums, strict=True):
            for gradient in (parameter.grad, total):
                if gradient is not None:
                    gradient.zero_()

    def reached(self) -> list[bool]:
        """Whether the window has a gradient, for each parameter."""
        held = {id(leaf) for leaf in leaves([term for term, _ in self.held])}
        return [
            parameter.grad is not None or total is not None or id(parameter) in held
            for parameter, total in zip(self.parameters, self._buffers.sums, strict=True)
        ]

    def check_leaves(self) -> None:
        """Refuses foreign leaves. They show only after the last micro-batch was freed.

        Raises:
            ValueError: the loss reaches a tensor that may be trained and that no module holds.
        """
        if self._foreign is not None:
            self._foreign.check()

    def sums(self) -> list[torch.Tensor]:
        """The window's gradients before they are committed."""
        pairs = zip(self.parameters, self._buffers.sums, strict=True)
        found = [parameter.grad if total is None else total for parameter, total in pairs]
        return [gradient for gradient in found if gradient is not None]

    @torch.no_grad()
    def prepare(self, commit: Commit) -> None:
        """Prepares the sum of the window's gradients and the old `.grad`s.

        Args:
            commit: the commit of the window.

        Raises:
            ValueError: the loss reaches a tensor that may be trained and that no module holds.
        """
        self._close_leaves()
        if self._in_place:
            return
        entries = zip(self.parameters, self._before, self._buffers.sums, strict=True)
        for parameter, before, total in entries:
            commit.gradient(parameter, before, parameter.grad if total is None else total)

    def taken(self) -> list[torch.Tensor | None]:
        """Takes the window's gradients away. Every `.grad` is then as before the window.

        Returns:
            One gradient for each parameter, None where no loss reached it. Sums of half precision
            are float32, or bfloat16 where the caller asked for that.

        Raises:
            ValueError: the loss reaches a tensor that may be trained and that no module holds.
        """
        self._close_leaves()
        pairs = list(zip(self.parameters, self._buffers.sums, strict=True))
        found = [parameter.grad if total is None else total for parameter, total in pairs]
        # No other reference may stay: PyTorch would then copy the gradients into `.grad`.
        self._buffers.sums = [None] * len(found)
        self._watch = None
        for parameter, before in zip(self.parameters, self._before, strict=True):
            parameter.grad = before
        return found

    def restore(self) -> None:
        """Puts back what `.grad` held before the window."""
        for parameter, before in zip(self.parameters, self._at_first, strict=True):
            parameter.grad = before
        if self._foreign is not None:
            self._foreign.restore()

    def _close_leaves(self) -> None:
        self.check_leaves()
        if self._foreign is not None:
            self._foreign.restore()

    def _reached(
        self, terms: Collection[torch.Tensor], shares: Sequence[float]
    ) -> list[tuple[torch.Tensor, float]]:
        """The terms that add something, and the factors that their backward pass starts from."""
        if self._watch is not None:
            self._watch.check()
        return [
            (term, share * self._averaged_over)
            for term, share in zip(terms, shares, strict=True)
            # A branch may leave a micro-batch without parameters: its gradient is zero.
            if (share or self._in_step) and term.requires_grad
        ]

    def _put_aside(self) -> None:
        for parameter, before in zip(self.parameters, self._before, strict=True):
            if before is not None:
                parameter.grad = None
                self._in_place = False

    def _chosen(self, terms: Collection[torch.Tensor]) -> Differentiate:
        """The way to differentiate the window, chosen by its first losses."""
        chosen: Differentiate = from_factors
        if self._backward_fn is not None:
            chosen = through(self._backward_fn, self._norms)
        device = next(iter(terms)).device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            chosen = outside_autocast(chosen, device)
        is_half = _is_half((*self.parameters, *terms))
        if self._in_step:
            _refuse_half_loss(terms)
            # Gathered parameters are leaves that no module holds, like foreign leaves. So foreign
            # leaves cannot be found here.
            refuse_shards(terms, self.parameters)
        elif self._watch is None:
            if is_half:
                refuse_unheld_parameter(terms, self.parameters)
        elif is_half or not self._commits:
            # Gradients of foreign leaves would lack their share, or stay after a window that is
            # taken back.
            self._foreign = ForeignLeaves(terms, self.parameters, self._is_given)
            self._foreign.put_aside()
        if is_half:
            self._in_place = False
            self._own_memory = OwnMemory(())
            chosen = self._in_buffers(chosen)
        return chosen

    def _in_buffers(self, differentiate: Differentiate) -> Differentiate:
        def buffered(terms: Sequence[torch.Tensor], shares: Sequence[float]) -> None:
            # In the backward pass a share would be rounded to few bits and could underflow. So
            # only the ratio of the shares goes through it. In step the full shares do: ranks have
            # different shares, and their gradients are added up within the backward pass.
            largest = 1.0 if self._in_step else max(shares)
            # The user's `backward_fn` may read the gradients after its pass.
            as_they_come = self._backward_fn is None
            with self._buffers.collecting(largest, as_they_come=as_they_come):
                differentiate(terms, [share / largest for share in shares])
            self.factor = largest / self._averaged_over

        return buffered


def _is_half(tensors: Iterable[torch.Tensor]) -> bool:
    return not HALF.isdisjoint([x.dtype for x in tensors])


def _refuse_half_loss(terms: Collection[torch.Tensor]) -> None:
    """Refuses a loss whose dtype would round its share to few bits.

    Raises:
        ValueError: a term is of half precision.
    """
    for term in terms:
        if term.dtype in HALF:
            raise ValueError(
                "With fully_shard a loss must be float32 or wider. Got "
                f"{str(term.dtype).removeprefix('torch.')}. Return loss.float(), or set "
                "output_dtype=torch.float32 in the policy."
            )
