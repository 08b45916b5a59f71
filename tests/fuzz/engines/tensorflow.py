"""The verbs of the TensorFlow engine, and what only it can be given wrongly."""

from functools import partial
from random import Random
from typing import Any

import numpy as np
import tensorflow as tf
from tests.fuzz import batches, functions, options, tensorflow_losses
from tests.fuzz.call import ANY_ERROR, Call, Fault, Result
from tests.fuzz.losses import in_terms, joined, right_entries, right_loss, with_aux

import virtualbatch.tensorflow as vb
from virtualbatch import Window

COMMON = frozenset({"microbatch_size", "accumulation_steps", "weight", "has_aux"})
# Verbs that need a trace of the loss.
TRACING = ("compiled", "plan", "certify")
ALLOWED = {
    "value_and_gradients": COMMON | {"stats", "check"},
    "compiled": COMMON | {"stats"},
    "certify": COMMON,
    "plan": frozenset({"weight", "has_aux", "memory_limit"}),
    "rowwise": frozenset({"microbatch_size", "accumulation_steps", "check"}),
}


class Ops:
    """What the user's functions compute with."""

    def array(self, values: Any) -> tf.Tensor:
        return tf.constant(values)

    def mean_of(self, leaf: Any, trained: list[tf.Variable]) -> tf.Tensor:
        w, x = trained[0], self.rows(leaf)
        return tf.reduce_mean((x * w[0] - w[1]) ** 2 + x * w[2])

    def constant(self, trained: list[tf.Variable]) -> tf.Tensor:
        return tf.reduce_sum(trained[0] ** 2)

    def cast(self, value: tf.Tensor, dtype: str) -> tf.Tensor:
        return tf.cast(value, dtype)

    def rows(self, leaf: Any) -> tf.Tensor:
        if isinstance(leaf, tf.RaggedTensor):
            return tf.cast(tf.reduce_mean(leaf, 1), tf.float64)
        if isinstance(leaf, tf.SparseTensor):
            leaf = tf.sparse.to_dense(leaf)
        x = tf.cast(tf.convert_to_tensor(leaf), tf.float64)
        return tf.reduce_mean(tf.reshape(x, [tf.shape(x)[0], -1]), 1)

    def largest(self, leaf: Any) -> tf.Tensor:
        return tf.cast(tf.reduce_max(leaf), tf.float64)

    def joined(self, leaves: Any) -> tf.Tensor:
        return tf.concat([tf.cast(leaf, leaves[0].dtype) for leaf in leaves], 0)


class TensorFlow:
    """The engine."""

    name = "tensorflow"
    verbs = (*["value_and_gradients"] * 4, "compiled", "certify", "rowwise", "plan")

    def __init__(self) -> None:
        self.faults = [*batches.FAULTS, *functions.FAULTS, *options.FAULTS, *own_faults()]

    def call(self, verb: str, random: Random) -> Call:
        ops = Ops()
        weights = [tf.Variable([0.5, -1.0, 2.0], dtype=tf.float64)]
        x, y = batches.arrays(ops)
        given: dict[str, Any] = {}
        if verb != "plan":
            given["microbatch_size"] = random.choice([2, 3, 4, 6])
        loss: Any = partial(right_entries if verb == "rowwise" else right_loss, ops, weights)
        if verb != "rowwise":
            if random.random() < 0.25:
                loss = in_terms(loss)
            elif random.random() < 0.25:
                loss, given["has_aux"] = with_aux(loss, ops), True
        return Call(
            verb,
            ops,
            {"x": x, "y": y},
            loss,
            weights,
            given,
            ALLOWED[verb],
            weights=weights,
            compiled=verb == "compiled",
        )

    def uncut(self, call: Call) -> Result:
        if call.is_empty:
            return _result(np.zeros(()), [], None)
        batch = joined(call.ops, call.batch) if isinstance(call.batch, Window) else call.batch
        if call.verb == "rowwise":
            found = _of_rows(call, call.loss, batch)
            return found._replace(traced=_traced(call, batch))
        with tf.GradientTape() as tape:
            result, aux = call.loss(batch), None
            if call.options.get("has_aux"):
                result, aux = result
            if isinstance(result, dict):
                result = sum(result.values())
        found = _result(result, tape.gradient(result, call.weights), aux)
        return found._replace(traced=_traced(call, batch) if call.verb in TRACING else None)

    def run(self, call: Call) -> Result | None:
        given = dict(call.options)
        # TensorFlow would write the user's functions anew, in files of its own.
        loss = _unconverted(call.loss)
        if "weight" in given:
            given["weight"] = _unconverted(given["weight"])
        match call.verb:
            case "plan":
                vb.plan(loss, call.batch, call.trained, **given)
                return None
            case "certify":
                if not vb.certify(loss, call.batch, call.trained, **given).exact:
                    return None
                given["check"] = False
            case "rowwise":
                return _of_rows(call, vb.rowwise(call.loss, **given), call.batch)
        run = partial(vb.value_and_gradients, loss, call.batch, call.trained, **given)
        found = tf.function(run, autograph=False)() if call.compiled else run()
        loss, gradients = found[:2]
        aux = None
        if call.options.get("has_aux"):
            loss, aux = loss
        return _result(loss, tf.nest.flatten(gradients), aux)

    def state(self, call: Call) -> dict[str, Any]:
        return {str(k): _numpy(variable) for k, variable in enumerate(call.weights)}


def _unconverted(function: Any) -> Any:
    """A function that TensorFlow traces as it is written."""
    if not callable(function):
        return function
    return tf.autograph.experimental.do_not_convert(function)


def _traced(call: Call, batch: Any) -> Exception | None:
    """What TensorFlow says of a loss or weight that cannot be traced."""
    for function in (call.loss, call.options.get("weight")):

        def run(given: Any, function: Any = function) -> None:
            function(given)

        try:
            if callable(function):
                tf.function(run, autograph=False)(batch)
        except ANY_ERROR as error:
            return error
    return None


def _of_rows(call: Call, fn: Any, batch: Any) -> Result:
    """What rows give, and the gradients of their sum."""
    with tf.GradientTape() as tape:
        found = fn(batch)
        leaves = [leaf for leaf in tf.nest.flatten(found) if leaf.dtype.is_floating]
        total = sum((tf.cast(tf.reduce_sum(leaf), tf.float64) for leaf in leaves), 0.0)
    return _result(total, tape.gradient(total, call.weights) if leaves else [], found)


def _result(loss: Any, gradients: Any, aux: Any) -> Result:
    leaves = [] if aux is None else tf.nest.flatten(aux)
    return Result(_numpy(loss), list(map(_numpy, gradients)), list(map(_numpy, leaves)))


def _numpy(value: Any) -> Any:
    if isinstance(value, tf.IndexedSlices):
        value = tf.convert_to_tensor(value)
    return np.array(value) if hasattr(value, "numpy") else value


def own_faults() -> list[Fault]:
    """What only TensorFlow knows."""

    def batch(name: str, make: Any) -> Fault:
        def change(call: Call, random: Random) -> None:
            call.batch = make(call, *batches.arrays(call.ops))

        return Fault(f"batch: {name}", "batch", change)

    def trained(name: str, make: Any) -> Fault:
        def change(call: Call, random: Random) -> None:
            call.trained = make(call.weights)
            call.is_judged = call.is_judged and name in ("in a tuple", "in a dict")

        return Fault(f"variables: {name}", "trained", change)

    def loss(name: str) -> Fault:
        def change(call: Call, random: Random) -> None:
            call.loss = partial(tensorflow_losses.LOSSES[name], call, call.loss)
            call.keeps_state = name != "assigns a variable"
            call.is_judged = call.is_judged and call.keeps_state

        return Fault(f"loss: {name}", "loss", change)

    ragged = tf.ragged.constant([[1.0] * (k + 1) for k in range(6)])
    return [
        batch("ragged", lambda c, x, y: {"x": ragged, "y": y}),
        batch("ragged of other rows", lambda c, x, y: {"x": ragged[:3], "y": y}),
        batch("sparse", lambda c, x, y: {"x": tf.sparse.from_dense(x), "y": y}),
        batch("a variable", lambda c, x, y: {"x": tf.Variable(x), "y": y}),
        batch("a graph", lambda c, x, y: {"x": x * c.weights[0], "y": y}),
        batch("a dataset", lambda c, x, y: tf.data.Dataset.from_tensor_slices(x)),
        batch("an iterator", lambda c, x, y: iter(tf.data.Dataset.from_tensor_slices(x))),
        batch("a spec", lambda c, x, y: tf.TensorSpec([6, 3])),
        batch("text tensors", lambda c, x, y: tf.constant(["a"] * 6)),
        batch("a TensorArray", lambda c, x, y: {"x": x, "t": tf.TensorArray(tf.float64, 6)}),
        batch("slices", lambda c, x, y: tf.IndexedSlices(x, tf.range(6), [6, 3])),
        batch("a shape", lambda c, x, y: {"x": x, "s": x.shape}),
        batch("a quantised dtype", lambda c, x, y: tf.cast(x, tf.qint8)),
        trained("None", lambda w: None),
        trained("nothing", lambda w: []),
        trained("a number", lambda w: 3),
        trained("text", lambda w: "weights"),
        trained("with None", lambda w: [*w, None]),
        trained("one alone", lambda w: w[0]),
        trained("in a tuple", tuple),
        trained("in a dict", lambda w: {"w": w[0]}),
        trained("twice", lambda w: [w[0], w[0]]),
        trained("another", lambda w: [tf.Variable(1.0)]),
        trained("integers", lambda w: [tf.Variable(1)]),
        trained("a tensor", lambda w: [tf.ones(2)]),
        trained("an array", lambda w: [np.ones(2)]),
        trained("texts", lambda w: [tf.Variable("a")]),
        trained("not trained", lambda w: [*w, tf.Variable(1.0, trainable=False)]),
        trained("a generator", lambda w: iter(w)),
        trained("a class", lambda w: tf.Variable),
        trained("mixed keys", lambda w: {"w": w[0], 1: w[0]}),
        *map(loss, tensorflow_losses.LOSSES),
    ]
