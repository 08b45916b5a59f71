"""A Keras model as `certify` observes it: whole updates, run eagerly and taken back."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import keras
import numpy as np

from virtualbatch.keras._snapshot import Snapshot
from virtualbatch.rowwise import Record
from virtualbatch.split import array_leaves
from virtualbatch.subject import Observed, Subject

# What layers call the size of their randomness; nothing is drawn where it is 0.
_RANDOM = ("rate", "stddev", "dropout", "recurrent_dropout")


class Backend(NamedTuple):
    """How a backend of Keras runs one update eagerly.

    Fields:
        update: (train step, model, batch) -> logs. The optimizer is asked to apply gradients, and
            what the update leaves is in the model's variables.
        accumulating: (model, microbatch_size) -> train step.
        apply: name of the optimizer's method that it is asked by.
        gradients: arguments of that method -> gradients of the trainable variables.
        applied: arguments of that method -> what to return without having changed anything.
        array: array of NumPy -> array of the backend.
    """

    update: Callable[[Callable[..., Any], keras.Model, Any], Mapping[str, Any]]
    accumulating: Callable[[keras.Model, int], Callable[..., Any]]
    apply: str
    gradients: Callable[..., Sequence[Any]]
    applied: Callable[..., Any]
    array: Callable[[np.ndarray], Any]


class KerasSubject(Subject):
    """See `virtualbatch.subject.Subject`.

    Args:
        model: a model that is built and compiled.
        batch: (x, y, sample_weight) of arrays of NumPy.
        pieces: row numbers of each micro-batch.
        backend: how its updates run.
    """

    weighs_itself = True
    place = "the loss"
    narrow: Sequence[str] = ()

    def __init__(
        self, model: keras.Model, batch: Any, pieces: Sequence[np.ndarray], backend: Backend
    ):
        self._model, self._batch, self._backend = model, batch, backend
        self._snapshot = Snapshot(model)
        self.pieces = pieces
        self.rows = sum(map(len, pieces))
        self.leaves = dict(array_leaves(batch))
        self._names = _names(model.trainable_variables)
        values = zip(self._names, model.trainable_variables, strict=True)
        self.parameters = {name: _numpy(variable) for name, variable in values}
        wide = {layer.compute_dtype for layer in model._flatten_layers()} == {"float64"}
        self.epsilon = float(np.finfo("float64" if wide else "float32").eps)
        self.narrowest = self.epsilon
        self.notes = [f"Compared in {'float64' if wide else 'float32'}."]
        if _random_attributes(model):
            self.notes = [*self.notes, "Compared without dropout and noise."]

    def accumulated(self) -> Observed:
        """See `Subject`."""
        step = self._backend.accumulating(self._model, max(map(len, self.pieces)))
        return self._observed(step, np.arange(self.rows), again=False)

    def alone(self, rows: np.ndarray, term: Any = None, again: bool = False) -> Observed:
        """See `Subject`."""
        return self._observed(type(self._model).train_step.__get__(self._model), rows, again)

    def weights(self) -> None:
        """See `Subject`."""

    def records(self, rows: np.ndarray, again: bool = False) -> list[Record]:
        """See `Subject`. The outputs of layers, in the order in which they are called."""
        found: list[Record] = []
        x, _, _ = self._some(rows)
        try:
            with _comparable(self._model):
                for _ in range(1 + again):
                    with _recorded(self._model, found):
                        found.clear()
                        training = {"training": True} if self._model._call_has_training_arg else {}
                        self._model(x, **training)
        finally:
            self._snapshot.restore()
        return found

    def _some(self, rows: np.ndarray) -> Any:
        index = np.ascontiguousarray(rows)
        return keras.tree.map_structure(
            lambda leaf: None if leaf is None else self._backend.array(leaf[index]),
            self._batch,
        )

    def _observed(self, step: Callable[..., Any], rows: np.ndarray, again: bool) -> Observed:
        model, backend = self._model, self._backend
        seen: list[Any] = []

        def apply(*args: Any, **kwargs: Any) -> Any:
            seen[:] = backend.gradients(*args, **kwargs)
            return backend.applied(*args, **kwargs)

        batch = self._some(rows)
        try:
            with _comparable(model), _replaced(model.optimizer, backend.apply, apply):
                for _ in range(1 + again):
                    model.reset_metrics()
                    logs = dict(backend.update(step, model, batch))
            loss = float(_numpy(logs.pop("loss")))
            gradients = {
                name: None if gradient is None else _numpy(gradient)
                for name, gradient in zip(self._names, seen, strict=True)
            }
            kept = [v for v in model.non_trainable_variables if "float" in str(v.dtype)]
            state = dict(zip(_names(kept), map(_numpy, kept), strict=True))
            state |= {f"metric {name}": _numpy(value) for name, value in logs.items()}
            return Observed({"loss": loss}, gradients, state)
        finally:
            self._snapshot.restore()


@contextmanager
def _comparable(model: keras.Model) -> Iterator[None]:
    """Layers draw no random numbers in this context, and compute in no less than float32."""
    with ExitStack() as stack:
        for layer, name in _random_attributes(model):
            stack.enter_context(_replaced(layer, name, 0.0))
        for layer in model._flatten_layers():
            if layer.compute_dtype in ("float16", "bfloat16"):
                full = keras.DTypePolicy("float32")
                stack.enter_context(_replaced(layer, "_dtype_policy", full))
        yield


def _random_attributes(model: keras.Model) -> list[tuple[Any, str]]:
    return [
        (layer, name)
        for layer in model._flatten_layers()
        for name in _RANDOM
        if isinstance(vars(layer).get(name), float) and vars(layer)[name] > 0
    ]


@contextmanager
def _recorded(model: keras.Model, records: list[Record]) -> Iterator[None]:
    with ExitStack() as stack:
        for layer in model._flatten_layers(include_self=False):
            stack.enter_context(_replaced(layer, "call", _recording(layer, records)))
        yield


def _recording(layer: Any, records: list[Record]) -> Callable[..., Any]:
    call, kind = layer.call, type(layer).__name__

    def recording(*args: Any, **kwargs: Any) -> Any:
        outputs = call(*args, **kwargs)
        for output in keras.tree.flatten(outputs):
            if "float" in str(getattr(output, "dtype", "")):
                records.append(Record(f"{layer.path} ({kind})", kind, _numpy(output)))
        return outputs

    return recording


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of one object; what Keras or PyTorch would track of it stays out of it."""
    attributes = vars(owner)
    had, before = name in attributes, attributes.get(name)
    attributes[name] = value
    try:
        yield
    finally:
        if had:
            attributes[name] = before
        else:
            del attributes[name]


def _names(variables: Sequence[Any]) -> list[str]:
    """Paths, with a number where another variable has the same one."""
    paths = [variable.path for variable in variables]
    return [
        f"{path}[{index}]" if paths.count(path) > 1 else path for index, path in enumerate(paths)
    ]


def _numpy(value: Any) -> np.ndarray:
    if isinstance(value, float | int | np.number):
        return np.array(value, np.float64)
    found = keras.ops.convert_to_tensor(value)
    if "16" in keras.backend.standardize_dtype(found.dtype):
        # NumPy does not know bfloat16.
        found = keras.ops.cast(found, "float32")
    return np.array(keras.ops.convert_to_numpy(found), np.float64)
