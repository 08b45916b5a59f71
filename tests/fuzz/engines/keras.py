"""The verbs of the Keras engine, on the backend of this process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import keras
import numpy as np
from tests.fuzz import batches, keras_losses, options
from tests.fuzz.call import ROWS, Call, Fault, Result

import virtualbatch.keras as vb

ACCUMULATE = frozenset(
    {"microbatch_size", "accumulation_steps", "microbatch_tokens", "lengths", "check", "gather"}
)
FIT = frozenset({"sample_weight", "loss_function", "batch_size", "targets"})
ALLOWED = {
    "fit": ACCUMULATE | FIT,
    "train_on_batch": ACCUMULATE | FIT,
    "accumulate": ACCUMULATE,
    "certify": frozenset({"microbatch_size", "accumulation_steps", "loss_function", "targets"}),
    "plan": frozenset({"memory_limit", "loss_function", "targets"}),
    "restore": frozenset(),
}


class Ops:
    """What batches are made of: NumPy, as `fit` takes it."""

    def array(self, values: Any) -> Any:
        return np.asarray(values)

    def cast(self, value: Any, dtype: str) -> Any:
        return value.astype(dtype)


@contextmanager
def whole_tracebacks() -> Iterator[None]:
    """Errors with all of their frames, which tell who raised them."""
    before = keras.config.is_traceback_filtering_enabled()
    keras.config.disable_traceback_filtering()
    try:
        yield
    finally:
        if before:
            keras.config.enable_traceback_filtering()


class Keras:
    """The engine."""

    name = "keras"
    verbs = ("fit", "fit", "train_on_batch", "train_on_batch", "accumulate", "certify", "plan",
             "restore")  # fmt: skip

    def __init__(self) -> None:
        self.backend = os.environ.get("KERAS_BACKEND", "")
        self.faults = [*batches.FAULTS, *options.FAULTS, *own_faults()]

    def call(self, verb: str, random: Random) -> Call:
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        x, y = batches.arrays(Ops())
        given: dict[str, Any] = {}
        if verb not in ("plan", "restore"):
            given["microbatch_size"] = random.choice([2, 3, 4, 6])
        call = Call(verb, Ops(), x, None, model, given, ALLOWED[verb], weights=model)
        call.options["targets"] = y
        call.eager = random.random() < 0.7
        return call

    def _compiled(self, call: Call) -> None:
        given = call.options
        loss = given.get("loss_function", "mse")
        if isinstance(loss, str) and loss in keras_losses.LOSSES:
            loss = keras_losses.LOSSES[loss]()
        call.weights.compile(optimizer=keras.optimizers.SGD(0.1), loss=loss, run_eagerly=call.eager)

    def uncut(self, call: Call) -> Result:
        self._compiled(call)
        return self._trained(call)

    def _trained(self, call: Call) -> Result:
        given = {k: v for k, v in call.options.items() if k == "sample_weight"}
        x, y = call.batch, call.options.get("targets")
        if call.verb == "train_on_batch":
            loss = call.weights.train_on_batch(x, y, **given)
        else:
            size = {"batch_size": call.options.get("batch_size", ROWS)}
            history = call.weights.fit(x, y, epochs=1, shuffle=False, verbose=0, **size, **given)
            loss = history.history["loss"][-1]
        return Result(np.float32(loss), [np.array(w) for w in call.weights.get_weights()], [])

    @whole_tracebacks()
    def run(self, call: Call) -> Result | None:
        self._compiled(call)
        given = {k: v for k, v in call.options.items() if k not in FIT}
        pair = (call.batch, call.options.get("targets"))
        match call.verb:
            case "plan":
                vb.plan(call.trained, pair, **given)
            case "certify":
                vb.certify(call.trained, pair, **given)
            case "restore":
                vb.restore(call.trained)
            case "accumulate":
                vb.accumulate(call.trained, **given)
            case _:
                vb.accumulate(call.trained, **given)
                return self._trained(call)
        return None

    def state(self, call: Call) -> dict[str, Any]:
        return {str(k): np.array(w) for k, w in enumerate(call.weights.get_weights())}


def own_faults() -> list[Fault]:
    """What only Keras' verbs are given."""

    def model(name: str, make: Any) -> Fault:
        def change(call: Call, random: Random) -> None:
            call.trained = make(call)
            call.is_judged = False

        return Fault(f"model: {name}", "trained", change)

    weights = {
        **options.WORDS, "per row": np.arange(ROWS) + 1.0, "negative": -np.ones(ROWS),
        "zeros": np.zeros(ROWS), "NaN": np.full(ROWS, np.nan), "too few": np.ones(2),
        "columns": np.ones((ROWS, 1)), "integers": np.arange(ROWS), "texts": ["a"] * ROWS,
    }  # fmt: skip
    targets = {
        **options.WORDS, "too few": np.ones(2), "columns": np.ones((ROWS, 1)), "wide": np.ones(
            (ROWS, 5)), "NaN": np.full(ROWS, np.nan), "integers": np.arange(ROWS),
        "texts": np.array(["a"] * ROWS), "a scalar": np.float64(1), "no rows": np.ones((0,)),
    }  # fmt: skip
    lengths = {
        **options.WORDS,
        "ones": lambda x: keras.ops.ones((ROWS,), "int32"),
        "too few": lambda x: [1, 2],
        "floats": lambda x: keras.ops.ones((ROWS,)),
        "raises": keras_losses.raising,
    }
    losses = {
        **options.WORDS,
        **{name: name for name in keras_losses.LOSSES},
        "mae": "mae",
        "a loss": keras.losses.Huber(),
        "a sum of rows": keras.losses.MeanSquaredError(reduction="sum"),
    }
    return [
        model("None", lambda c: None),
        model("a number", lambda c: 3),
        model("a class", lambda c: keras.Sequential),
        model("a layer", lambda c: keras.layers.Dense(1)),
        model("not compiled", lambda c: keras.Sequential([keras.layers.Dense(1)])),
        model("a list", lambda c: [c.weights]),
        *options.option("sample_weight", weights),
        *options.option("targets", targets),
        *options.option("lengths", lengths),
        *options.option("gather", options.WORDS),
        *options.option("microbatch_tokens", options.SIZES),
        *options.option("batch_size", {"4": 4, "1": 1, "100": 100, "5": 5}),
        *options.option("loss_function", losses),
    ]
