"""One training run with all that a user can see of it, and its comparison with plain Keras."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
from tests.keras.backends import BACKEND
from tests.oracle import assert_close

import virtualbatch.keras as vb
from virtualbatch.window.cut import even_cut

# What issue 2 asks of float64 after several updates; what was seen is 1e-15.
RTOL = 1e-10

# A batch of 50 rows is cut into 16 16 16 2, on an eager backend into 13 13 12 12. Of the 130 rows
# that there are, most cases train on two batches, which are one shape and so one program; with all
# of them the last batch has 30 rows, which are cut into 16 14, or 15 15.
ROWS, BATCH, MICRO, EPOCHS = 130, 50, 16, 2


class Run(NamedTuple):
    """What a training run left behind."""

    model: keras.Model
    history: dict[str, list[float]]
    events: list[tuple[str, Any]]
    logs: list[dict[str, float]]


class Recorder(keras.callbacks.Callback):
    """Notes every call of a callback, and the logs that it got."""

    def __init__(self):
        super().__init__()
        self.events: list[tuple[str, Any]] = []
        self.logs: list[dict[str, float]] = []

    def on_train_begin(self, logs=None):
        self.events.append(("train begin", None))

    def on_train_end(self, logs=None):
        self.events.append(("train end", None))

    def on_epoch_begin(self, epoch, logs=None):
        self.events.append(("epoch begin", epoch))

    def on_epoch_end(self, epoch, logs=None):
        self.events.append(("epoch end", epoch))
        self.logs.append(dict(logs))

    def on_train_batch_begin(self, batch, logs=None):
        self.events.append(("batch begin", batch))

    def on_train_batch_end(self, batch, logs=None):
        self.events.append(("batch end", batch))
        self.logs.append(dict(logs))


class Case(NamedTuple):
    """A model, how it is compiled and what it is trained on.

    Fields:
        name: shown by pytest.
        model: makes a model; called once per run, each from the same seeds.
        compile: makes the arguments of `compile`.
        x: first argument of `fit`, or a function that makes it.
        y: second argument of `fit`.
        fit: further arguments of `fit`.
        sizes: arguments of `accumulate`.
        needs: what plain Keras must be able to do on the backend; names of `backends.LACKING`.
        rows: of the arrays, how many are trained on; `ROWS` ends each epoch with a short batch.
    """

    name: str
    model: Callable[[], keras.Model]
    compile: Callable[[], dict[str, Any]]
    x: Any
    y: Any = None
    fit: dict[str, Any] = {}  # noqa: RUF012
    sizes: dict[str, Any] = {"microbatch_size": MICRO}  # noqa: RUF012
    needs: tuple[str, ...] = ()
    rows: int = 2 * BATCH


class Batches(keras.utils.PyDataset):
    """Batches of nested arrays, which `fit` reads by number on every backend."""

    def __init__(self, *arrays):
        super().__init__()
        self._arrays = arrays

    def __len__(self):
        return 2

    def __getitem__(self, index):
        rows = slice(index * BATCH, (index + 1) * BATCH)
        return keras.tree.map_structure(lambda array: array[rows], self._arrays)


def sizes_of(rows):
    """Rows of the micro-batches that a batch is cut into on the backend under test."""
    if BACKEND == "torch":
        return [stop - start for start, stop in even_cut(rows, MICRO)]
    return [min(MICRO, rows - start) for start in range(0, rows, MICRO)]


def in_tiers(cases, further, reason):
    """Cases for pytest: those of both tiers, and further ones that are thorough for that reason."""
    thorough = pytest.mark.thorough(reason)
    return [
        *(pytest.param(case, id=case.name) for case in cases),
        *(pytest.param(case, id=case.name, marks=thorough) for case in further),
    ]


def train(case: Case, accumulated: bool, scope: Callable[[], Any] = nullcontext) -> Run:
    """Trains from fixed seeds, by micro-batches or as plain Keras does.

    Args:
        case: what is trained.
        accumulated: whether by micro-batches.
        scope: makes the context in which the model is built and compiled.
    """
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(1)
    with scope():
        model = case.model()
        model.compile(**case.compile())
    if accumulated:
        vb.accumulate(model, **case.sizes)
    recorder = Recorder()
    options = {"epochs": EPOCHS, "verbose": 0, "shuffle": False} | case.fit
    if isinstance(case.y, np.ndarray | list | dict) or hasattr(case.y, "iloc"):
        options = {"batch_size": BATCH} | options
    callbacks = [*options.pop("callbacks", list)(), recorder]
    x = case.x() if callable(case.x) else _first(case.x, case.rows)
    if "sample_weight" in options:
        options["sample_weight"] = _first(options["sample_weight"], case.rows)
    history = model.fit(x, _first(case.y, case.rows), callbacks=callbacks, **options)
    return Run(model, history.history, recorder.events, recorder.logs)


def _first(arrays: Any, rows: int) -> Any:
    """The first rows of arrays, frames or tensors in any structure."""
    return keras.tree.map_structure(lambda array: None if array is None else array[:rows], arrays)


def eagerly(case: Case) -> Case:
    """The same computation, for which nothing is compiled."""

    def arguments():
        given = case.compile()
        # Callbacks hear of several batches at once, which they do not eagerly.
        if given.get("steps_per_execution", 1) > 1:
            return given
        return given | {"run_eagerly": True, "jit_compile": False}

    return case._replace(compile=arguments)


def assert_equals_keras(case: Case, rtol: float = RTOL, in_its_mode: bool = False) -> Run:
    """Raises unless accumulation gives what plain Keras gives.

    Args:
        case: what is trained.
        rtol: how far numbers may be off.
        in_its_mode: compile plain Keras as the case asks for; otherwise it runs eagerly, which
            gives the same and takes a fraction of the time.

    Returns:
        The accumulated run.
    """
    expected = train(case if in_its_mode else eagerly(case), accumulated=False)
    actual = train(case, accumulated=True)
    assert_same_run(actual, expected, rtol)
    return actual


def assert_same_run(actual: Run, expected: Run, rtol: float = RTOL) -> None:
    """Raises unless weights, optimizer, History, callbacks and their logs agree."""
    assert_same_variables(actual.model.variables, expected.model.variables, rtol)
    assert_same_variables(
        actual.model.optimizer.variables, expected.model.optimizer.variables, rtol
    )
    assert actual.model.optimizer.iterations.numpy() == expected.model.optimizer.iterations.numpy()
    assert actual.events == expected.events
    assert_same_values(actual.history, expected.history, rtol)
    assert len(actual.logs) == len(expected.logs)
    for found, due in zip(actual.logs, expected.logs, strict=True):
        assert_same_values(found, due, rtol)


def assert_same_variables(actual: list[Any], expected: list[Any], rtol: float = RTOL) -> None:
    """Raises unless variables agree, but for how often a seed was drawn."""
    assert [v.path for v in actual] == [v.path for v in expected]
    for found, due in zip(actual, expected, strict=True):
        if "seed_generator" not in due.path:
            _assert_close(due.path, found.numpy(), due.numpy(), rtol)


def assert_same_values(actual: dict[str, Any], expected: dict[str, Any], rtol: float = RTOL):
    """Raises unless two dicts of numbers have the same keys, in their order, and values."""
    assert list(actual) == list(expected)
    for name, due in expected.items():
        _assert_close(name, actual[name], due, rtol)


def _assert_close(name: str, actual: Any, expected: Any, rtol: float) -> None:
    try:
        assert_close(actual, expected, rtol)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from None
