"""The second pass: computes the gradients of trained tensors from the gradients of outputs."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from virtualbatch.torch._microbatch import Microbatch, known_rows
from virtualbatch.torch._rowwise.hooks import own_hooks_only, spare_hooks
from virtualbatch.torch._rowwise.inputs import Inputs
from virtualbatch.torch._rowwise.replay import Replay
from virtualbatch.torch._rowwise.sums import GradientSums
from virtualbatch.torch._undo import all_or_nothing

# Gradients of outputs, or of trained tensors; None for no gradient.
Gradients = Sequence[torch.Tensor | None]


class SecondPass:
    """The second pass, which runs when the gradients of outputs have arrived.

    Args:
        inputs: the inputs of the call.
        replay: the state at the start of the first pass.
        fitted: runs the second pass on the micro-batches of the first pass, or on smaller ones.
    """

    def __init__(
        self,
        inputs: Inputs,
        replay: Replay,
        fitted: Callable[[Callable[[Sequence[Microbatch]], Gradients]], Gradients],
    ):
        self._inputs = inputs
        self._replay = replay
        self._fitted = fitted

    def gradients(self, of_outputs: Gradients) -> Gradients:
        """The gradients of `Inputs.trained`.

        Args:
            of_outputs: one gradient for each leaf of the outputs.
        """
        trained = self._inputs.trained()
        found: Gradients = [None] * len(trained)
        if any(gradient is not None for gradient in of_outputs):
            # The user's hooks on parameters must get the gradient of the whole batch.
            with self._replay.again(), own_hooks_only(self._inputs.found.parameters):
                found = self._fitted(
                    lambda cut: all_or_nothing(partial(self._run, cut, of_outputs))
                )
        spare_hooks(trained, found)
        return found

    def _run(self, cut: Sequence[Microbatch], of_outputs: Gradients) -> Gradients:
        inputs = self._inputs
        parameters = GradientSums(inputs.found.parameters)
        shared = GradientSums(inputs.shared)
        rows = _RowGradients(inputs)
        start = 0
        for microbatch in cut:
            stop = start + known_rows(microbatch)
            arrived = [None if x is None else x[start:stop] for x in of_outputs]
            self._add(microbatch, arrived, start, parameters, shared, rows)
            start = stop
        return [*parameters.taken(), *shared.taken(), *rows.taken()]

    def _add(
        self,
        microbatch: Microbatch,
        arrived: Gradients,
        start: int,
        parameters: GradientSums,
        shared: GradientSums,
        rows: "_RowGradients",
    ) -> None:
        with torch.enable_grad(), self._replay.autocast():
            called = self._inputs.call(microbatch)
        pairs = [
            (leaf, gradient)
            for (_, leaf), gradient in zip(called.outputs, arrived, strict=True)
            if gradient is not None and leaf.requires_grad
        ]
        if not pairs:
            return
        others = [*called.shared, *called.rows.values()]
        found = parameters.add([x for x, _ in pairs], [g for _, g in pairs], others)
        count = len(called.shared)
        shared.add_found(found[:count])
        rows.put(start, dict(zip(called.rows, found[count:], strict=True)))


class _RowGradients:
    """Gradients of the rows that take a gradient.

    Args:
        inputs: the inputs of the call.
    """

    def __init__(self, inputs: Inputs):
        self._rows = inputs.rows
        self._starts = inputs.starts()
        self._found: dict[tuple[int, int], torch.Tensor] = {}

    def put(self, start: int, found: dict[int, torch.Tensor | None]) -> None:
        """Keeps the gradients of a micro-batch.

        Args:
            start: the number of the first row of the micro-batch.
            found: the gradients by their place in the batch.
        """
        # A micro-batch of a Window may be cut into several, but is never joined with another one.
        index = max(k for k, first in enumerate(self._starts) if first <= start)
        start -= self._starts[index]
        for place, gradient in found.items():
            key = (index, place)
            # Not every micro-batch of a Window needs the gradient of its rows.
            if gradient is None or key not in self._rows:
                continue
            if key not in self._found:
                self._found[key] = torch.zeros_like(self._rows[key])
            self._found[key][start : start + len(gradient)] = gradient

    def taken(self) -> Gradients:
        """Gives all gradients away, in the order of `Inputs.rows`."""
        return [self._found.pop(key, None) for key in self._rows]
