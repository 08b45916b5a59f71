"""The check, at the first call of a rowwise function, that each row depends on that row alone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from virtualbatch.certify.certificate import Certificate
from virtualbatch.certify.first_window import sees_other_rows
from virtualbatch.certify.proven import Seen, untried
from virtualbatch.certify.randomness import HostRandom
from virtualbatch.certify.row_by_row import prove_rows
from virtualbatch.certify.trial import Distance, UntriedError
from virtualbatch.torch._batch import ReadBatch, read
from virtualbatch.torch._batchnorm import is_tracked
from virtualbatch.torch._certify.certificate import certificate
from virtualbatch.torch._certify.first_window import (
    TorchTrial,
    source_of,
    tried,
    untouched,
)
from virtualbatch.torch._certify.heard_dtypes import heard_dtypes
from virtualbatch.torch._distributed import number_of_processes
from virtualbatch.torch._microbatch import Microbatch, known_rows, on_device
from virtualbatch.torch._random import RandomState
from virtualbatch.torch._remembered import remembered
from virtualbatch.torch._rowwise.inputs import Inputs
from virtualbatch.torch._rowwise.outputs import check_outputs, kinds_of
from virtualbatch.torch._rowwise.surrogate import Surrogate
from virtualbatch.torch._window import Program
from virtualbatch.window.entries import check_same_structure
from virtualbatch.window.terms import SUM


def prove_first_call(inputs: Inputs, surrogate: Callable[[], Surrogate], sizes: list[int]) -> None:
    """Tries a function on some rows of a batch, if it has not been tried before.

    Args:
        inputs: the inputs of the call.
        surrogate: makes the surrogate of the function.
        sizes: the rows of each micro-batch.

    Raises:
        ValueError: some output of a row depends on other rows, or has not one entry per row.
        TypeError: an output is no tensor.
    """
    if any(isinstance(x, FakeTensor) or x.is_meta for x in inputs.tensors()):
        # While planning, tensors have no values.
        return
    batch = inputs.detached()
    source = source_of(batch.given)
    kinds = [(x.dtype, x.dim()) if isinstance(x, torch.Tensor) else None for x in source.leaves]
    structure = ("rowwise", source.places, tuple(kinds))
    known = remembered(inputs.found.owner).proven
    if known.seen(inputs.fn, SUM, structure) is not None:
        return
    trial = _RowsTrial(surrogate(), batch, source, sizes)
    with torch.enable_grad(), _unheard(), untouched(trial.program) as layers:
        reason = tried(prove_rows, trial, layers)
        layers.restore()
        # A window around the call would count what BatchNorm sees here as its own values.
        for layer in layers.layers:
            layer.training = layer.training and not is_tracked(layer)
        if reason is None:
            trial.repeat(sizes[0])
    if reason is not None:
        untried(reason)
    known.remember(inputs.fn, SUM, structure, Seen())


def with_numbers(surrogate: Surrogate, batch: Any) -> tuple[Program, Any]:
    """The program and the batch with which a rowwise function is certified.

    The program is the surrogate loss. The batch is paired with random numbers for all outputs.

    Args:
        surrogate: the surrogate of the function.
        batch: a batch, not a Window.
    """
    whole = read(batch).whole
    rows = known_rows(whole)
    program = surrogate.of_numbers()
    device = program.found.accelerator
    with untouched(program):
        outputs = surrogate.outputs((whole if device is None else on_device(whole, device)).get())
        check_outputs(outputs, rows)
        numbers = surrogate.numbers(outputs, rows)
    return program, (batch, numbers)


class _RowsTrial(TorchTrial):
    """See `virtualbatch.certify.trial.Trial`. This trial compares the values of outputs.

    Args:
        surrogate: the surrogate of the function.
        batch: the batch or Window.
        source: the rows to choose from.
        sizes: the rows of each micro-batch.
    """

    def __init__(
        self, surrogate: Surrogate, batch: ReadBatch, source: Microbatch, sizes: Sequence[int]
    ):
        super().__init__(surrogate.of_numbers(), source, sizes)
        self._surrogate = surrogate
        # Whether the latest difference is too large for rounding.
        self._is_clear = False

    def distance(self, a: Sequence[int], b: Sequence[int]) -> Distance | None:
        """See `Trial`."""
        self._is_clear = False
        drawn, of_host = RandomState(self.program.found.accelerator), HostRandom()
        first, whole, second = (self._outputs(rows) for rows in (a, [*a, *b], b))
        if of_host.has_moved():
            raise UntriedError("it draws random numbers by Python or NumPy")
        if drawn.has_moved():
            return None
        floating = [x for _, x in whole if x is not None and x.is_floating_point()]
        epsilon = self.epsilon(floating)
        for part in (first, second):
            check_same_structure(kinds_of(whole), kinds_of(part))
        off = 0.0
        for (place, x), (_, y), (_, z) in zip(whole, first, second, strict=True):
            if x is None:
                continue
            parts = torch.cat((y, z))
            if x.is_floating_point():
                off = max(off, _apart(x, parts) / epsilon)
            elif not torch.equal(x, parts):
                raise sees_other_rows(f"values of {place} that change with the other rows")
        self._is_clear = off * epsilon > epsilon**0.5
        return Distance(off, False, {})

    def certificate(self, rows: Sequence[int], size: int) -> Certificate:
        """See `Trial`."""
        some = self.some(rows)
        batch = some.build(some.leaves)
        outputs = self._surrogate.outputs(batch)
        # With several ranks, reducers would take a backward pass here for the one of the update.
        if number_of_processes() > 1 or not any(
            x.requires_grad for _, x in outputs if x is not None
        ):
            if self._is_clear:
                raise sees_other_rows("values that change with the other rows")
            raise UntriedError("rounding alone may explain how its outputs differ")
        numbers = self._surrogate.numbers(outputs, len(rows))
        return certificate(self.program, (batch, numbers), size, None)

    def repeat(self, count: int) -> None:
        """Computes some rows twice, as the two passes do.

        Args:
            count: the number of rows, from the first one on.

        Raises:
            ValueError: the outputs differ.
        """
        rows = range(min(count, self.rows))
        found = []
        for _ in range(2):
            with untouched(self.program):
                found.append(self._outputs(rows))
        for (place, x), (_, y) in zip(*found, strict=True):
            if x is None or not x.is_floating_point():
                continue
            if _apart(x, y) > self.epsilon([x]) ** 0.5:
                raise ValueError(
                    "rowwise calls its function twice, and both calls must return the same "
                    f"values. Got other values of {place} from the same random state. Draw random "
                    "numbers from the global generators of PyTorch, NumPy and Python, and keep "
                    "state that changes with each call in buffers of the modules."
                )

    def _outputs(self, rows: Sequence[int]) -> list[tuple[str, torch.Tensor | None]]:
        part = self.some(rows)
        with heard_dtypes(self.dtypes):
            found = self._surrogate.outputs(part.get())
        check_outputs(found, known_rows(part))
        return [(place, None if x is None else x.detach()) for place, x in found]


@contextmanager
def _unheard() -> Iterator[None]:
    """Hides the tensors that a proof saves from hooks around it, such as those of checkpoints."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        # Even hooks that do nothing would make compiled functions compile again.
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        yield


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, divided by the largest finite number."""
    a, b = (x.to("cpu", torch.float64) for x in (a, b))
    # Two equal infinities, or two NaNs, are no difference.
    same = (a == b) | (a.isnan() & b.isnan())
    off = torch.where(same, 0.0, (a - b).abs())
    if not off.numel() or not bool(off.any()):
        return 0.0
    return float(off.max() / a[a.isfinite()].abs().max())
