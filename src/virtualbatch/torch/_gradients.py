"""Gradients of a window: summed beside what `.grad` held, and added to it only at the end.

Where every parameter and term is float32 or wider, each backward pass starts from the
micro-batch's share and PyTorch itself sums into a fresh `.grad`: no buffer, no extra arithmetic.
Otherwise gradients are taken unscaled and multiplied in the add to a buffer.
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
        is_given: tensor -> whether it has the memory of the batch.
        averaged_over: number of replicas that the sums are divided by later.
        in_step: whether modules add up gradients over ranks in each backward pass, so that all
            ranks must run the same ones, and `.grad` holds what came of them.
        rounding: adds dense gradients of bfloat16; None where they are summed in float32.

    Attributes:
        parameters: as given.
        held: terms whose backward pass is still to come, and what each is multiplied by.
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
        # What the sums are added to.
        self._before = self._at_first
        # None where the window has one micro-batch only: it is the ordinary computation.
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
        # What the gradients of the latest micro-batch lacked of their share on their way.
        self.factor = 1.0 / averaged_over

    def start(self, *, commit: bool = True) -> None:
        """Puts what `.grad` holds aside, untouched until the window has succeeded.

        Args:
            commit: whether gradients are to be kept, if it does.
        """
        self._commits = commit
        self._put_aside()
        self._watch = GradWatch(self.parameters)
        self._watch.look()

    def start_after_forward(self) -> None:
        """Does the same for the only micro-batch of a window, whose forward has run.

        As in a step without a window, what that did to `.grad` is kept.
        """
        self._before = [parameter.grad for parameter in self.parameters]
        self._put_aside()

    def add(self, terms: Collection[torch.Tensor], shares: Sequence[float]) -> None:
        """Differentiates one micro-batch and adds its share of the gradient.

        Args:
            terms: scalar losses; those without a gradient add nothing.
            shares: one number per term. A term of share 0 is left out, because its gradient may
                be NaN, and 0 times NaN is NaN; where ranks run in step it is muted.

        Raises:
            ValueError: the loss function changed `.grad`, shares a graph with another
                micro-batch or reaches what no module holds, or a hook changed a parameter.
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
        """Leaves the last micro-batch to the code that hands the sums over.

        Args:
            terms: see `add`.
            shares: see there.

        Raises:
            ValueError: see there; or gradients are summed in buffers, as those of half precision.
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
        """Differentiates what is held together with the loss that hands the sums over.

        Args:
            handed_over: the loss; a scalar.
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
        """For each parameter whether the window has a gradient of it."""
        held = {id(leaf) for leaf in leaves([term for term, _ in self.held])}
        return [
            parameter.grad is not None or total is not None or id(parameter) in held
            for parameter, total in zip(self.parameters, self._buffers.sums, strict=True)
        ]

    def check_leaves(self) -> None:
        """Refuses what shows only when the last micro-batch is gone.

        Raises:
            ValueError: somebody trains a tensor that no module holds.
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
        """Prepares that the window's gradients are added to what `.grad` held before it.

        Args:
            commit: of the window.

        Raises:
            ValueError: somebody trains a tensor that no module holds, which only shows now.
        """
        self._close_leaves()
        if self._in_place:
            return
        entries = zip(self.parameters, self._before, self._buffers.sums, strict=True)
        for parameter, before, total in entries:
            commit.gradient(parameter, before, parameter.grad if total is None else total)

    def taken(self) -> list[torch.Tensor | None]:
        """Takes the window's gradients away; `.grad` is as before it.

        Returns:
            One for each parameter, None where nothing reached it; sums of half precision are
            float32, or bfloat16 where that was asked for.

        Raises:
            ValueError: somebody trains a tensor that no module holds.
        """
        self._close_leaves()
        pairs = list(zip(self.parameters, self._buffers.sums, strict=True))
        found = [parameter.grad if total is None else total for parameter, total in pairs]
        # Whoever takes them over has them alone, or PyTorch would copy them into `.grad`.
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
        """The terms that add something, and what their backward pass starts from."""
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
        """How the window is differentiated, by its first losses."""
        chosen: Differentiate = from_factors
        if self._backward_fn is not None:
            chosen = through(self._backward_fn, self._norms)
        device = next(iter(terms)).device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            chosen = outside_autocast(chosen, device)
        is_half = _is_half((*self.parameters, *terms))
        if self._in_step:
            _refuse_half_loss(terms)
            # Gathered parameters are leaves that no module holds: others cannot be told from them.
            refuse_shards(terms, self.parameters)
        elif self._watch is None:
            if is_half:
                refuse_unheld_parameter(terms, self.parameters)
        elif is_half or not self._commits:
            # Their gradients would lack their share, or outlive a window that is taken back.
            self._foreign = ForeignLeaves(terms, self.parameters, self._is_given)
            self._foreign.put_aside()
        if is_half:
            self._in_place = False
            self._own_memory = OwnMemory(())
            chosen = self._in_buffers(chosen)
        return chosen

    def _in_buffers(self, differentiate: Differentiate) -> Differentiate:
        def buffered(terms: Sequence[torch.Tensor], shares: Sequence[float]) -> None:
            # Only the ratio of the shares goes through the backward pass, where a share would be
            # rounded to few bits and could underflow. In step other ranks have other shares, and
            # gradients have met when they come.
            largest = 1.0 if self._in_step else max(shares)
            # Somebody else's backward pass may look at what came of it.
            as_they_come = self._backward_fn is None
            with self._buffers.collecting(largest, as_they_come=as_they_come):
                differentiate(terms, [share / largest for share in shares])
            self.factor = largest / self._averaged_over

        return buffered


def _is_half(tensors: Iterable[torch.Tensor]) -> bool:
    return not HALF.isdisjoint([x.dtype for x in tensors])


def _refuse_half_loss(terms: Collection[torch.Tensor]) -> None:
    """Refuses a loss that would round its share to few bits.

    Raises:
        ValueError: one is of half precision.
    """
    for term in terms:
        if term.dtype in HALF:
            raise ValueError(
                "With fully_shard a loss must be float32 or wider. Got "
                f"{str(term.dtype).removeprefix('torch.')}. Return loss.float(), or set "
                "output_dtype=torch.float32 in the policy."
            )
