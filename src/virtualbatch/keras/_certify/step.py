"""The two train steps that `certify` compares: Keras' own, and the one of `accumulate`."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import keras
import numpy as np

from virtualbatch.certify.activations import Activation
from virtualbatch.certify.step import Observed, PieceWeights, TrainingStep, weights_of
from virtualbatch.keras._backend import Backend, Program, Ran
from virtualbatch.keras._certify.activations import compiled_losses, recorded
from virtualbatch.keras._certify.loss_parts import LossParts
from virtualbatch.keras._certify.untouched import Attributes
from virtualbatch.keras._gather.gathering import Found
from virtualbatch.keras._snapshot import Snapshot
from virtualbatch.window.tree import array_leaves

# What `numpy.dtype.kind` calls booleans, integers, floats and complex numbers.
NUMBERS = "biufc"


class KerasStep(TrainingStep):
    """See `virtualbatch.certify.step.TrainingStep`.

    Args:
        model: a model that is built and compiled, without randomness.
        batch: (x, y, sample_weight) as NumPy arrays.
        rows: rows of the batch.
        size: rows of one micro-batch, fewer than the batch has.
        backend: our implementation for Keras' backend.
        notes: sentences about what was changed in the model for the comparison.
        found: the losses that need all rows and get them.
    """

    weighs_itself = True
    place = "the loss"
    way_out = (
        "In a loss, leave gather=False out: then it sees all rows. In a layer, compute it from "
        "each row alone, or move it into the loss."
    )

    def __init__(
        self,
        model: keras.Model,
        batch: Any,
        rows: int,
        size: int,
        backend: Backend,
        notes: Sequence[str],
        found: Found,
    ):
        self._model = model
        self._batch = batch
        self._backend = backend
        self._size = size
        self._found = found
        self._snapshot, self._attributes = Snapshot(model), Attributes(model)
        self._scale = float(keras.ops.convert_to_numpy(model.optimizer.scale_loss(1.0)))
        # One program for each part of the loss, because a compiled program keeps its part.
        self._programs: dict[Any, Program] = {}
        self._found_parts: LossParts | None = None
        self.rows = rows
        stops = np.cumsum(backend.cut(rows, size))
        self.pieces = np.split(np.arange(rows), stops[:-1])
        self.leaves = named_arrays(batch)
        self._names = _names(model.trainable_variables)
        self.parameters = {
            name: _numpy(variable.value)
            for name, variable in zip(self._names, model.trainable_variables, strict=True)
        }
        self.narrow: Sequence[str] = ()
        dtype = coarsest_dtype(model)
        self.epsilon = self.narrowest = float(np.finfo(dtype).eps)
        self.notes = [*notes, f"Compared in {dtype}."]

    def accumulated(self) -> Observed:
        """See `TrainingStep`."""
        return self.accumulated_term(None)

    def accumulated_term(self, term: Any) -> Observed:
        """See `TrainingStep`."""
        step = self._backend.step(
            self._model, self._size, None, None, check=False, gather=self._found
        )
        step.silent, step.losses = True, None
        return self._ran(("accumulated", term), step, np.arange(self.rows), term, 1)

    def alone(self, rows: np.ndarray, term: Any = None, again: bool = False) -> Observed:
        """See `TrainingStep`."""
        model = self._model

        def step(*given: Any) -> Any:
            return type(model).train_step(model, *given)

        return self._ran(("alone", term), step, rows, term, 2 if again else 1)

    def weights(self) -> Callable[[Any], PieceWeights]:
        """See `TrainingStep`. A loss that returns one number counts as a mean over rows."""
        return weights_of(None, [])

    def places(self, place: str, terms: Collection[Any]) -> Mapping[Any, str]:
        """See `TrainingStep`. The places are known, so both arguments are unused."""
        del place, terms
        return self._parts.places

    def activations(self, rows: np.ndarray, again: bool = False) -> list[Activation]:
        """See `TrainingStep`."""
        self._fresh()
        if again:
            self._forward(rows)
        with recorded(self._model, self._backend.is_concrete) as recording:
            self._forward(rows)
        self._fresh()
        return recording.activations

    @property
    def _parts(self) -> LossParts:
        if self._found_parts is None:
            self._fresh()
            self._forward(self.pieces[0])
            self._found_parts = LossParts(self._model)
            self._fresh()
        return self._found_parts

    def _forward(self, rows: np.ndarray) -> None:
        """Computes the loss of some rows, without its gradient and outside any trace."""
        model = self._model
        x, y, sample_weight = self._some(rows)
        y_pred = model(x, training=True) if model._call_has_training_arg else model(x)
        model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)

    def _ran(self, key: Any, step: Any, rows: np.ndarray, term: Any, times: int) -> Observed:
        part = nullcontext() if term is None else self._parts.only(term)
        self._fresh()
        with part:
            if key not in self._programs:
                self._programs[key] = self._backend.program(self._model, step)
            found = self._observed(
                self._programs[key](lambda: self._some(rows), times), term or "loss"
            )
        self._fresh()
        return found

    def _observed(self, ran: Ran, term: Any) -> Observed:
        gradients = {
            name: None if gradient is None else _numpy(gradient) / self._scale
            for name, gradient in zip(self._names, ran.gradients, strict=True)
        }
        logs = _named("metric ", ran.logs)
        logs.pop("metric loss", None)
        loss = tracked_loss(self._model, ran)
        return Observed({term: loss}, gradients, logs | self._kept(ran))

    def _kept(self, ran: Ran) -> dict[str, np.ndarray]:
        """The state of layers, without seeds and strings."""
        variables = self._model.non_trainable_variables
        seeds = {
            id(generator.state)
            for layer in self._model._flatten_layers()
            for generator in layer._seed_generators
        }
        return {
            name: _numpy(value)
            for name, variable, value in zip(
                _names(variables), variables, ran.non_trainable, strict=True
            )
            if id(variable) not in seeds and variable.dtype != "string"
        }

    def _some(self, rows: np.ndarray) -> Any:
        return tensors(chosen(self._batch, rows))

    def _fresh(self) -> None:
        self._attributes.restore()
        self._snapshot.restore()
        self._model.reset_metrics()


def named_arrays(batch: Any) -> dict[str, np.ndarray]:
    """The NumPy arrays of numbers in (x, y, sample_weight), by the expressions that reach them."""
    return {
        path: leaf
        for name, part in zip(("x", "y", "sample_weight"), batch, strict=True)
        for path, leaf in array_leaves(part, name)
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in NUMBERS
    }


def chosen(batch: Any, rows: Any) -> Any:
    """The given rows of every array of a batch."""

    def some(leaf: Any) -> Any:
        if not hasattr(leaf, "shape"):
            return leaf
        return leaf[rows] if isinstance(leaf, np.ndarray) else keras.ops.take(leaf, rows, axis=0)

    return keras.tree.map_structure(some, batch)


def tensors(batch: Any) -> Any:
    """The batch with its arrays of numbers as Keras tensors. Other leaves stay as they are."""

    def tensor(leaf: Any) -> Any:
        is_number = isinstance(leaf, np.ndarray) and leaf.dtype.kind in NUMBERS
        return keras.ops.convert_to_tensor(leaf) if is_number else leaf

    return keras.tree.map_structure(tensor, batch)


def tracked_loss(model: keras.Model, ran: Ran) -> float:
    """The loss of a run, from the model's loss tracker, because logs may hold anything."""
    tracked = dict(zip(map(id, model.metrics_variables), ran.metrics, strict=True))
    tracker = model._loss_tracker
    total, count = (_numpy(tracked[id(v)]) for v in (tracker.total, tracker.count))
    return float(total / count)


def _names(variables: Sequence[Any]) -> list[str]:
    """Paths of variables. If several share a path, they are numbered from the second on."""
    found: dict[str, int] = {}
    names = []
    for variable in variables:
        found[variable.path] = found.get(variable.path, 0) + 1
        again = found[variable.path]
        names.append(variable.path if again == 1 else f"{variable.path} ({again})")
    return names


def _named(prefix: str, logs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, value in logs.items():
        if isinstance(value, Mapping):
            found |= _named(f"{prefix}{name}/", value)
        else:
            found[f"{prefix}{name}"] = _numpy(value)
    return found


def coarsest_dtype(model: keras.Model) -> str:
    """The coarsest dtype through which a gradient goes: of weights, layers, losses or Keras' code.

    Outside TensorFlow, Keras rounds to float32 inside means and divisions of float64 models.
    """
    dtypes = {
        *(variable.dtype for variable in model.trainable_variables),
        *(layer.compute_dtype for layer in model._flatten_layers()),
        *(getattr(entry.loss, "_dtype", "float32") for entry in compiled_losses(model)),
    }
    for half in ("bfloat16", "float16"):
        if half in dtypes:
            return half
    floats = {dtype for dtype in dtypes if dtype in ("float32", "float64")}
    return str(keras.backend.result_type(min(floats, default="float32"), "float32"))


def _numpy(value: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(value), np.float64)
