"""A TensorFlow training step as `certify` observes it: eagerly, uncut and cut."""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import tensorflow as tf

from virtualbatch.certify.activations import Activation, Recording
from virtualbatch.certify.step import Observed, PieceWeights, TrainingStep, weights_of
from virtualbatch.tensorflow._arrays import as_tensors, named_arrays
from virtualbatch.tensorflow._batch import chosen, segments
from virtualbatch.tensorflow._certify.activations import RowwiseRandom, watched
from virtualbatch.tensorflow._gradients import scalar_terms, watch_tensors
from virtualbatch.tensorflow._window import Program
from virtualbatch.window.terms import (
    loss_and_aux,
    loss_terms,
    of_part,
    weight_terms,
)


class TensorFlowTrainingStep(TrainingStep):
    """See `virtualbatch.certify.step.TrainingStep`.

    Args:
        program: the user's program, without statistics.
        batch: a batch, not a Window.
        microbatch_size: checked rows of one micro-batch, or None.
        accumulation_steps: checked micro-batches per window, or None.
        others: variables that the loss may change.
    """

    def __init__(
        self,
        program: Program,
        batch: Any,
        microbatch_size: int | None,
        accumulation_steps: int | None,
        others: Sequence[Any],
    ):
        self._program = program
        self._loss_fn, self._weight, self._has_aux = (
            program.loss_fn,
            program.weight,
            program.has_aux,
        )
        self._sizes = microbatch_size, accumulation_steps
        self._others = [(variable, variable.numpy()) for variable in others]
        self._batch = as_tensors(batch)
        arrays = dict(named_arrays(self._batch))
        self.leaves = {path: np.asarray(leaf) for path, leaf in arrays.items()}
        self.rows = len(next(iter(self.leaves.values())))
        pair = (self._batch, tf.range(self.rows))
        pieces = [part.get(0) for part in segments(pair, microbatch_size, accumulation_steps)]
        self._microbatches = [microbatch for microbatch, _ in pieces]
        self.pieces = [np.asarray(rows) for _, rows in pieces]
        self._variables = tf.nest.flatten(program.variables)
        self._names = _names(self._variables)
        self.parameters = {
            name: _numpy(variable)
            for name, variable in zip(self._names, self._variables, strict=True)
        }
        self._random = RowwiseRandom(self.rows)
        with watched(self._random) as part:
            self._terms(self.pieces[0])
        with watched(self._random) as whole:
            terms = self._terms(np.arange(self.rows))
        self._random.keep(whole, part, len(self.pieces[0]))
        dtype = next(iter(terms.values())).dtype
        self.epsilon = epsilon(tf.float32 if dtype.size < 4 else dtype)
        self.narrowest = max(map(epsilon, [dtype, *self._random.dtypes]))
        self.notes = [f"Compared in {dtype.name}: variables of TensorFlow keep their dtype."]
        if self._random.draws:
            self.notes = [
                *self.notes,
                "Each row kept its random numbers, so every cut drew the same ones.",
            ]
        self.narrow = self._half_weights()
        self.restore()

    def restore(self) -> None:
        """Puts the old values back into the variables that the loss may change."""
        for variable, value in self._others:
            variable.assign(value)

    def accumulated(self) -> Observed:
        """See `TrainingStep`."""
        weight = of_part(self._weight, itemgetter(0))

        def loss_fn(pair: Any) -> Any:
            batch, rows = pair
            self._random.choose(rows.numpy())
            return self._loss_fn(batch)

        self.restore()
        pair = (self._batch, tf.range(self.rows))
        with watched(self._random):
            program = self._program._replace(loss_fn=loss_fn, weight=weight)
            loss, gradients = program.run(segments(pair, *self._sizes))
        value = loss[0] if self._has_aux else loss
        return self._observed({"loss": float(value)}, tf.nest.flatten(gradients))

    def alone(self, rows: np.ndarray, term: Any = None, again: bool = False) -> Observed:
        """See `TrainingStep`."""
        self.restore()
        with watched(self._random):
            if again:
                self._terms(rows)
            with tf.GradientTape() as tape:
                watch_tensors(tape, self._variables)
                terms = self._terms(rows)
                chosen = list(terms.values()) if term is None else [terms[term]]
                total = sum(chosen[1:], chosen[0])
            gradients = tape.gradient(total, self._variables)
        return self._observed({name: float(value) for name, value in terms.items()}, gradients)

    def weights(self) -> Callable[[Any], PieceWeights]:
        """See `TrainingStep`."""
        return weights_of(self._weight, self._microbatches)

    def activations(self, rows: np.ndarray, again: bool = False) -> list[Activation]:
        """See `TrainingStep`."""
        self.restore()
        recording = Recording()
        if again:
            with watched(self._random):
                self._terms(rows)
        with watched(self._random, recording):
            self._terms(rows)
        return recording.activations

    def _terms(self, rows: np.ndarray) -> dict[Any, Any]:
        index = np.ascontiguousarray(rows)
        batch = chosen(self._batch, index)
        self._random.choose(index)
        terms = loss_terms(loss_and_aux(self._loss_fn(batch), self._has_aux)[0])
        return dict(zip(terms, scalar_terms(terms.values()), strict=True))

    def _observed(self, terms: dict[Any, float], gradients: Sequence[Any]) -> Observed:
        found = {
            name: None if gradient is None else _numpy(gradient)
            for name, gradient in zip(self._names, gradients, strict=True)
        }
        floating = [v for v, _ in self._others if v.dtype.is_floating]
        state = {
            name: _numpy(variable)
            for name, variable in zip(_names(floating), floating, strict=True)
        }
        return Observed(terms, found, state)

    def _half_weights(self) -> list[str]:
        if not callable(self._weight):
            return []
        values = weight_terms(self._weight(self._microbatches[0])).values()
        return [
            f"what weight returns ({value.dtype.name})"
            for value in values
            if isinstance(value, tf.Tensor) and value.dtype.is_floating and value.dtype.size < 4
        ]


def _names(variables: Sequence[Any]) -> list[str]:
    """A name for each variable, with its number if another variable has the same name."""
    names = [str(getattr(v, "path", "") or getattr(v, "name", "variable")) for v in variables]
    return [
        f"{name}[{index}]" if names.count(name) > 1 else name for index, name in enumerate(names)
    ]


def epsilon(dtype: tf.DType) -> float:
    """The gap after 1 in a floating dtype. NumPy's finfo does not know bfloat16."""
    return float(np.spacing(dtype.real_dtype.as_numpy_dtype(1)))


def _numpy(found: Any) -> np.ndarray:
    tensor = tf.convert_to_tensor(found)
    if tensor.dtype.is_floating:
        tensor = tf.cast(tensor, tf.float64)
    return np.array(tensor)
