"""Checks the first window of `fit`: Keras' part of `virtualbatch.certify.first_window`."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import keras
import numpy as np

from virtualbatch.certify.certificate import Certificate
from virtualbatch.certify.first_window import NO_GRADIENT, ROUNDING, prove
from virtualbatch.certify.proven import Seen, untried
from virtualbatch.certify.randomness import HostRandom
from virtualbatch.certify.trial import Distance, Trial, UntriedError
from virtualbatch.keras._backend import Backend, Program
from virtualbatch.keras._certify.certificate import arrays, certificate, untouched
from virtualbatch.keras._certify.full_precision import in_full_precision
from virtualbatch.keras._certify.keras_own import is_keras_own, losses_that_couple_rows
from virtualbatch.keras._certify.no_randomness import as_in_inference, without_randomness
from virtualbatch.keras._certify.step import (
    chosen,
    coarsest_dtype,
    named_arrays,
    tensors,
    tracked_loss,
)
from virtualbatch.keras._certify.untouched import Attributes
from virtualbatch.keras._gather.gathering import Found
from virtualbatch.keras._packing import padded_batch
from virtualbatch.keras._snapshot import Snapshot
from virtualbatch.keras._train_step import TrainStep
from virtualbatch.plan.out_of_memory import MemoryErrors, in_words
from virtualbatch.window.tree import array_leaves


def prove_first_window(
    model: keras.Model,
    step: TrainStep,
    batch: Any,
    rows: int,
    size: int,
    backend: Backend,
    errors: MemoryErrors,
) -> None:
    """Checks on rows of a batch that micro-batches add up, once per compiled model and structure.

    Args:
        model: the model; its variables hold their values.
        step: its train step.
        batch: (x, y, sample_weight) as `fit` gives them.
        rows: its rows.
        size: rows, or tokens, of a micro-batch.
        backend: our implementation for Keras' backend.
        errors: the backend's out-of-memory errors.

    Raises:
        ValueError: micro-batches of this model do not add up to their batch.
    """
    if not step.check:
        return
    proven = step.proven()
    structure = tuple((path, array.dtype, len(array.shape)) for path, array in array_leaves(batch))
    seen = proven.seen(model, None, structure)
    if seen is not None:
        if seen.group > 1 and size < rows:
            seen.check_sizes(backend.cut(rows, size))
        return
    if not _is_cut(model, step, batch, rows, size):
        return
    seen = Seen()
    if not is_keras_own(model):
        # Packing sorts the rows, so no group of neighbouring rows stays together.
        sizes = backend.cut(rows, size) if step.packing is None else [1]
        trial = KerasTrial(model, batch, rows, sizes, backend, step.found(batch))
        reason = trial.cannot_be_tried()
        if reason is None:
            reason = prove(trial, lambda error: in_words(error, errors))
        if reason == NO_GRADIENT:
            proven.tell_once(model, None, reason)
            return
        if reason is not None:
            untried(reason)
        step.silent, seen = reason is None, trial.seen
    proven.remember(model, None, structure, seen)


def _is_cut(model: keras.Model, step: TrainStep, batch: Any, rows: int, size: int) -> bool:
    if step.packing is None:
        return size < rows
    return rows * padded_batch(model, batch).length > size


class _Found(NamedTuple):
    """The result of a run on some rows.

    Fields:
        gradients: the gradient of each trainable variable, or None.
        loss: the loss.
    """

    gradients: list[Any]
    loss: float


_Run = Callable[[Program], _Found]


class KerasTrial(Trial):
    """See `virtualbatch.certify.trial.Trial`.

    This engine derives the weights of a micro-batch itself. So a window in micro-batches is
    compared with Keras' own step.

    Args:
        model: a compiled model.
        batch: (x, y, sample_weight) as `fit` gives them.
        rows: its rows.
        sizes: rows of its micro-batches.
        backend: our implementation for Keras' backend.
        found: the losses that need all rows and get them.
    """

    # Only one pair, because JAX compiles for each number of rows. The cut after five rows splits
    # every grouping of neighbouring rows in twos, threes or fours.
    pairs = ((4, 5),)

    def __init__(
        self,
        model: keras.Model,
        batch: Any,
        rows: int,
        sizes: Sequence[int],
        backend: Backend,
        found: Found,
    ):
        self._model, self._batch, self._backend, self._found = model, batch, backend, found
        self.rows, self.sizes = rows, sizes
        self._certified: dict[frozenset[int], Certificate] = {}

    def cannot_be_tried(self) -> str | None:
        """Why this model cannot be tried, if that is known before anything runs; else None."""
        model = self._model
        coupled = losses_that_couple_rows(model)
        if coupled and self._found.gathering is None:
            return f"the loss {coupled[0]} sees many rows at once"
        if any(layer.quantization_mode == "float8" for layer in model._flatten_layers()):
            return "float8 rounds too much"
        if any(hasattr(array, "row_splits") for _, array in array_leaves(self._batch)):
            return "its rows differ in length"
        return None

    def leaves(self, rows: Sequence[int]) -> Mapping[str, np.ndarray]:
        """See `Trial`."""
        return named_arrays(arrays(self._some(rows)))

    def distance(self, a: Sequence[int], b: Sequence[int]) -> Distance:
        """See `Trial`."""
        few, more = sorted([a, b], key=len)
        # With this size, an even cut gives these two parts too, or smaller parts that form them.
        size = len(more) if len(more) - len(few) <= 1 else len(few)
        step = self._backend.step(self._model, size, None, None, check=False, gather=self._found)
        step.silent, step.losses = True, None
        with self._running([*more, *few]) as (run, _):
            host = HostRandom()
            whole, cut = run(self._program(None)), run(self._program(step))
            if host.has_moved():
                raise UntriedError("it draws random numbers by Python or NumPy")
            return Distance(self._off(whole, cut), False, {})

    def certificate(self, rows: Sequence[int], size: int) -> Certificate:
        """See `Trial`. The same rows are certified once, even if they are cut in another way."""
        key = frozenset(rows)
        if key not in self._certified:
            self._certified[key] = self._certificate(rows, size)
        return self._certified[key]

    def _certificate(self, rows: Sequence[int], size: int) -> Certificate:
        model = self._model
        with self._running(rows) as (run, left):
            if left:
                raise UntriedError(f"randomness in {', '.join(left)} cannot be turned off")
            program = self._program(None)
            if self._off(run(program), run(program)) > ROUNDING:
                raise UntriedError("the same rows give a different result each time")
        with _as_in_inference(model):
            return certificate(model, self._some(rows), size, None, self._backend, self._found)

    @contextmanager
    def _running(self, rows: Sequence[int]) -> Iterator[tuple[_Run, list[str]]]:
        """Prepares runs on some rows.

        Yields:
            A function that runs a program on the rows, and the names of layers whose randomness
            could not be turned off.
        """
        model, backend = self._model, self._backend
        batch = arrays(self._some(rows))
        backend.build(model, batch)
        # The optimizer changes nothing, and its state may take twice the memory of the model.
        before = Snapshot(model, optimizer=False)
        with ExitStack() as held:
            held.enter_context(untouched(model, backend, before))
            drawing = held.enter_context(without_randomness(model))
            held.enter_context(_as_in_inference(model))
            held.enter_context(in_full_precision(model))
            attributes, snapshot = Attributes(model), Snapshot(model, optimizer=False)

            def run(program: Program) -> _Found:
                model.reset_metrics()
                ran = program(lambda: tensors(batch), 1)
                # Read the loss before the tracker is put back.
                found = _Found(ran.gradients, tracked_loss(model, ran))
                attributes.restore()
                snapshot.restore()
                return found

            yield run, drawing.left

    def _program(self, step: Any) -> Program:
        """A program of a step; None for Keras' own."""
        model = self._model
        return self._backend.program(model, step or type(model).train_step.__get__(model))

    def _off(self, whole: _Found, cut: _Found) -> float:
        """How much two runs differ, relative to the largest gradient or the loss, in epsilons."""
        epsilon = float(np.finfo(coarsest_dtype(self._model)).eps)
        size = left = 0.0
        for a, b in zip(whole.gradients, cut.gradients, strict=True):
            one, other = _numbers(a, b), _numbers(b, a)
            size = float(np.max([size, _largest(one), _largest(other)]))
            left = float(np.max([left, _largest(one - other)]))
        of_loss = abs(whole.loss - cut.loss) / (max(abs(whole.loss), abs(cut.loss)) or 1.0)
        off = max(left / (size or 1.0), of_loss) / epsilon
        # If all gradients are zero, the comparison shows nothing.
        return off if size and math.isfinite(size) and math.isfinite(of_loss) else math.nan

    def _some(self, rows: Sequence[int]) -> Any:
        return chosen(self._batch, np.asarray(rows))


@contextmanager
def _as_in_inference(model: keras.Model) -> Iterator[None]:
    """Runs layers in inference that couple rows, or change with each forward, by design.

    `accumulate` has already named these layers in a log line.
    """
    layers = [layer for layer in model._flatten_layers() if _is_known_to_couple(layer)]
    before = [(layer, vars(layer).get("call")) for layer in layers]
    for layer in layers:
        vars(layer)["call"] = as_in_inference(layer)
    try:
        yield
    finally:
        for layer, own in before:
            del vars(layer)["call"]
            if own is not None:
                vars(layer)["call"] = own


def _is_known_to_couple(layer: Any) -> bool:
    if isinstance(layer, keras.layers.TorchModuleWrapper):
        return any("BatchNorm" in type(module).__name__ for module in layer.module.modules())
    known = keras.layers.BatchNormalization | keras.layers.SpectralNormalization
    return isinstance(layer, known)


def _numbers(gradient: Any, other: Any) -> np.ndarray:
    """A gradient on the host. If it is None: zeros in the shape of the other gradient."""
    if gradient is None:
        return np.zeros(1) if other is None else np.zeros_like(_numbers(other, None))
    return np.asarray(keras.ops.convert_to_numpy(gradient))


def _largest(gradient: np.ndarray) -> float:
    return float(np.max(np.abs(gradient), initial=0.0))
