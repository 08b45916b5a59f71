"""The check of a loss at its first window: TensorFlow's part of `certify.first_window`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import tensorflow as tf

from virtualbatch.certify.certificate import Certificate
from virtualbatch.certify.first_window import conclude, prove
from virtualbatch.certify.proven import NO_ROWS
from virtualbatch.certify.randomness import HostRandom
from virtualbatch.certify.trial import Distance, Trial, UntriedError, rows_of_part
from virtualbatch.plan.out_of_memory import in_words
from virtualbatch.tensorflow._arrays import as_tensors, named_arrays
from virtualbatch.tensorflow._batch import chosen, segments
from virtualbatch.tensorflow._certify.certificate import (
    certificate,
    other_variables,
    run_eagerly,
)
from virtualbatch.tensorflow._certify.eager_random import EagerRandom
from virtualbatch.tensorflow._certify.step import epsilon
from virtualbatch.tensorflow._gradients import added, scalar_terms, scaled_gradients, watch_tensors
from virtualbatch.tensorflow._plan.memory import ERRORS
from virtualbatch.tensorflow._remembered import remembered
from virtualbatch.tensorflow._segment import Segment
from virtualbatch.tensorflow._stats import summed
from virtualbatch.tensorflow._weights import window_shares
from virtualbatch.tensorflow._window import Program
from virtualbatch.window.shares import Shares
from virtualbatch.window.terms import loss_and_aux, loss_terms
from virtualbatch.window.tree import common_rows
from virtualbatch.window.window import Window


def prove_first_window(
    program: Program,
    batch: Any,
    cut: Sequence[Segment],
    shares: Shares,
    others: Sequence[Any] | None = None,
) -> None:
    """Tries the law on rows of a batch, if its loss has not been tried with the variables before.

    Args:
        program: the loss, its weight and its variables.
        batch: a batch, or a Window.
        cut: the micro-batches of the window.
        shares: the shares of the micro-batches.
        others: the variables that the loss may change, if it is made from a `rowwise` function.
            For any other loss a trace finds them.

    Raises:
        ValueError: micro-batches of this loss do not add up to their batch.
    """
    if len(cut) == 1:
        return
    known = remembered(program.variables).proven
    if cut[0].rows(0) is None:
        known.tell_once(program.loss_fn, program.weight, NO_ROWS)
        return
    sizes = [segment.rows(0) for segment in cut]
    source = batch[int(np.argmax(sizes))] if isinstance(batch, Window) else batch
    arrays = named_arrays(source)
    lacking = shares.empty_and_full()
    kinds = tuple((p, str(getattr(x, "dtype", type(x))), len(x.shape)) for p, x in arrays)
    structure = (program.has_aux, kinds, lacking is None)
    seen = known.seen(program.loss_fn, program.weight, structure)
    if seen is not None:
        seen.check_sizes(sizes)
        return
    trial = _TensorFlowTrial(program, as_tensors(source), sizes)
    if others is not None:
        trial.is_rowwise = True
        trial.keep(others)
    if lacking is not None and not isinstance(batch, Window):
        trial.empty, trial.full = (rows_of_part(sizes, k) for k in lacking)
    with _random_numbers_kept():
        reason = prove(trial, lambda error: in_words(error, ERRORS))
    conclude(known, program.loss_fn, program.weight, structure, trial, reason)


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    kept = HostRandom(), EagerRandom()
    try:
        yield
    finally:
        for each in kept:
            each.restore()


class _TensorFlowTrial(Trial):
    """See `virtualbatch.certify.trial.Trial`."""

    def __init__(self, program: Program, source: Any, sizes: Sequence[int]):
        self._program = program._replace(stats=False)
        self._source = source
        self._flat = tf.nest.flatten(program.variables)
        self._others: list[tuple[Any, Any]] | None = None
        self.rows = int(common_rows(named_arrays(source)) or 0)
        self.sizes = sizes
        self.width = sum(
            x.shape[1:].num_elements() or 1
            for _, x in named_arrays(source)
            if not isinstance(x, tf.RaggedTensor)
        )

    def leaves(self, rows: Sequence[int]) -> Mapping[str, np.ndarray]:
        """See `Trial`."""
        arrays = named_arrays(self._some(rows))
        return {
            place: np.asarray(leaf)
            for place, leaf in arrays
            if not isinstance(leaf, tf.RaggedTensor)
        }

    def distance(self, a: Sequence[int], b: Sequence[int]) -> Distance:
        """See `Trial`."""
        parts = [self._some(rows) for rows in (a, [*a, *b], b)]
        both = segments(Window([parts[0], parts[2]]), None, None)
        shares = window_shares(both, self._program.weight)
        host = HostRandom()
        total: list[Any] = [None] * len(self._flat)
        sizes, losses, reached = [], [], set()
        with run_eagerly(), self._others_kept():
            for k, part in enumerate(parts):
                # The first part, minus the whole, plus the second part.
                terms, gradients, found = self._gradients(
                    part, None if k == 1 else (shares, k // 2)
                )
                total = [added(x, y) for x, y in zip(total, gradients, strict=True)]
                sizes.append(_largest(total))
                losses.append({name: float(value) for name, value in terms.items()})
                reached |= found
        if host.has_moved():
            raise UntriedError("it draws random numbers by Python or NumPy")
        constant = {name: value for name, value in losses[1].items() if name not in reached}
        dtypes = [x.dtype for x in (*self._flat, *terms.values())]
        widest_gap = max(epsilon(tf.as_dtype(dtype)) for dtype in dtypes)
        return Distance.of(sizes, shares.of_rows_or_term(), losses, constant, widest_gap)

    def certificate(self, rows: Sequence[int], size: int) -> Certificate:
        """See `Trial`."""
        return certificate(self._program, self._some(rows), size, None)

    def _some(self, rows: Sequence[int]) -> Any:
        return chosen(self._source, np.asarray(rows))

    def _gradients(
        self, part: Any, share: tuple[Shares, int] | None
    ) -> tuple[dict[Any, Any], list[Any], set[Any]]:
        """The terms of a part, the gradient of its share, and the terms that have a gradient."""
        with tf.GradientTape(persistent=True) as tape:
            watch_tensors(tape, self._flat)
            loss, _ = loss_and_aux(self._program.loss_fn(part), self._program.has_aux)
            named = loss_terms(loss)
            terms = scalar_terms(named.values())
        shares = [-1.0] * len(terms) if share is None else share[0].of(named, share[1])
        may_be_empty = share is not None and share[0].terms is not None
        gradients = scaled_gradients(tape, terms, shares, self._flat, may_be_empty)
        reached = set(named)
        if len(terms) > 1:
            reached = {
                name
                for name, term in zip(named, terms, strict=True)
                if any(x is not None for x in tape.gradient(term, self._flat))
            }
        return dict(zip(named, terms, strict=True)), gradients, reached

    def keep(self, others: Sequence[Any]) -> None:
        """Sets the variables that the loss may change. They are put back after each run."""
        self._others = [(variable, variable.numpy()) for variable in others]

    @contextmanager
    def _others_kept(self) -> Iterator[None]:
        if self._others is None:
            self.keep(other_variables(self._program, self._some([0])))
        try:
            yield
        finally:
            for variable, value in self._others or ():
                variable.assign(value)


def _largest(gradients: Sequence[Any]) -> float:
    """The largest number in some gradients; NaN if one is not a number."""
    found = [summed(x) for x in gradients if x is not None]
    norms = [float(tf.reduce_max(tf.abs(x))) for x in found if x.shape.num_elements() != 0]
    return float(np.max(norms)) if norms else 0.0
