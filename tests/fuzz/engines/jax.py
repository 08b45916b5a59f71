"""The verbs of the JAX engine, and what only it can be given wrongly."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tests.fuzz import batches, functions, jax_losses, options
from tests.fuzz.call import Call, Fault, Result
from tests.fuzz.losses import in_terms, joined, right_entries, right_loss, with_aux

import virtualbatch.jax as vb
from virtualbatch import Window

SIZES = frozenset({"microbatch_size", "accumulation_steps"})
COMMON = SIZES | {
    "weight", "has_aux", "argnums", "batch_argnum", "accumulator_dtype", "key_argnum", "grad_fn",
}  # fmt: skip
ALLOWED = {
    "value_and_grad": COMMON | {"axis_name", "aux_merge", "stats", "check"},
    "compiled": COMMON | {"aux_merge", "stats"},
    "certify": COMMON,
    "plan": COMMON - SIZES | {"aux_merge", "memory_limit"},
    "rowwise": SIZES | {"batch_argnum", "key_argnum", "axis_name", "check"},
}


@contextmanager
def whole_tracebacks() -> Iterator[None]:
    """Errors with all of their frames, which tell who raised them."""
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    try:
        yield
    finally:
        jax.config.update("jax_traceback_filtering", before)


class Ops:
    """What the user's functions compute with."""

    def array(self, values: Any) -> Any:
        return jnp.asarray(values)

    def mean_of(self, leaf: Any, trained: Any) -> Any:
        w, x = trained["w"], self.rows(leaf)
        return jnp.mean((x * w[0] - w[1]) ** 2 + x * w[2])

    def constant(self, trained: Any) -> Any:
        return jnp.sum(trained["w"] ** 2)

    def cast(self, value: Any, dtype: str) -> Any:
        return value.astype(dtype)

    def rows(self, leaf: Any) -> Any:
        x = jnp.asarray(leaf).astype(float)
        return jnp.mean(x.reshape(x.shape[0], -1), 1)

    def largest(self, leaf: Any) -> Any:
        return jnp.max(jnp.asarray(leaf))

    def joined(self, leaves: Any) -> Any:
        return jnp.concatenate(leaves)


class Jax:
    """The engine."""

    name = "jax"
    verbs = (*["value_and_grad"] * 4, "compiled", "certify", "rowwise", "plan")

    def __init__(self) -> None:
        self.faults = [*batches.FAULTS, *functions.FAULTS, *options.FAULTS, *own_faults()]

    def call(self, verb: str, random: Random) -> Call:
        ops = Ops()
        weights = {"w": jnp.asarray([0.5, -1.0, 2.0])}
        x, y = batches.arrays(ops)
        given: dict[str, Any] = {}
        if verb != "plan":
            given["microbatch_size"] = random.choice([2, 3, 4, 6])
        loss: Any = partial(right_entries if verb == "rowwise" else right_loss, ops)
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

    @whole_tracebacks()
    def uncut(self, call: Call) -> Result:
        if call.is_empty:
            return _result(np.zeros(()), [], None)
        batch = joined(call.ops, call.batch) if isinstance(call.batch, Window) else call.batch
        if call.verb == "rowwise":
            return _of_rows(call.loss, call.trained, batch)

        def scalar(*args: Any) -> Any:
            result, aux = call.loss(*args), None
            if call.options.get("has_aux"):
                result, aux = result
            if isinstance(result, dict):
                result = sum(result.values())
            return result, aux

        differentiated = jax.value_and_grad(scalar, has_aux=True)
        # Compiled the batch is an argument too, and what is no array is refused by JAX.
        is_traced = call.compiled or call.verb == "plan"
        run = jax.jit(differentiated) if is_traced else differentiated
        (loss, aux), gradients = run(call.trained, batch)
        return _result(loss, gradients, aux)

    @whole_tracebacks()
    def run(self, call: Call) -> Result | None:
        given = dict(call.options)
        match call.verb:
            case "plan":
                vb.plan(call.loss, **given)(call.trained, call.batch)
                return None
            case "certify":
                if not vb.certify(call.loss, **given)(call.trained, call.batch).exact:
                    return None
                given["check"] = False
            case "rowwise":
                return _of_rows(vb.rowwise(call.loss, **given), call.trained, call.batch)
        run = vb.value_and_grad(call.loss, **given)
        run = jax.jit(run) if call.compiled else run
        loss, gradients = run(call.trained, call.batch)[:2]
        aux = None
        if call.options.get("has_aux"):
            loss, aux = loss
        return _result(loss, gradients, aux)

    def state(self, call: Call) -> dict[str, Any]:
        return {"w": np.asarray(call.weights["w"])}


def _of_rows(fn: Any, params: Any, batch: Any) -> Result:
    """What rows give, and the gradients of their sum."""

    def total(given: Any) -> Any:
        found = fn(given, batch)
        numbers = [x for x in jax.tree.leaves(found) if jnp.issubdtype(x.dtype, jnp.inexact)]
        return sum(map(jnp.sum, numbers), jnp.zeros(())), found

    (value, found), gradients = jax.value_and_grad(total, has_aux=True)(params)
    return _result(value, gradients, found)


def _result(loss: Any, gradients: Any, aux: Any) -> Result:
    leaves = [jax.tree.leaves(x) for x in (gradients, aux)]
    return Result(_numpy(loss), *([_numpy(x) for x in found] for found in leaves))


def _numpy(value: Any) -> Any:
    return np.asarray(value) if hasattr(value, "dtype") else value


def own_faults() -> list[Fault]:
    """What only JAX knows."""

    def batch(name: str, make: Any) -> Fault:
        def change(call: Call, random: Random) -> None:
            call.batch = make(call, *batches.arrays(call.ops))

        return Fault(f"batch: {name}", "batch", change)

    def params(name: str, make: Any) -> Fault:
        def change(call: Call, random: Random) -> None:
            call.trained = make(call.weights)

        return Fault(f"params: {name}", "trained", change)

    def loss(name: str, made: Any) -> Fault:
        def change(call: Call, random: Random) -> None:
            call.loss = partial(made, call, call.loss)

        return Fault(f"loss: {name}", "loss", change)

    positions = {
        "-1": -1, "0": 0, "1": 1, "2": 2, "5": 5, "twice": (0, 0), "both": (0, 1), "two": (1, 2),
        "none": (), "None": None, "text": "0", "a fraction": 0.5, "True": True, "a list": [0],
        "NumPy": np.int64(0), "an array": np.array([0, 1]), "an object": object(),
        "a generator": (k for k in [0]), "a set": {0}, "a dict": {"w": 0}, "huge": 10**30,
        "nested": ((0,), 1), "words": ("a", "b"),
    }  # fmt: skip
    merges = {
        **options.WORDS, "keep": "keep", "sum": "sum", "rows": "rows", "max": "max",
        "mean": "mean", "of a dict": {"mean": "sum"}, "in a list": ["sum"], "None inside": [None],
        "of parts": {"mean": "mean", "rows": "rows"}, "of others": {"no": "sum"},
    }  # fmt: skip
    return [
        batch("keys", lambda c, x, y: jax.random.split(jax.random.key(0), 6)),
        batch("one key", lambda c, x, y: {"x": x, "k": jax.random.key(0)}),
        batch("a shape struct", lambda c, x, y: jax.ShapeDtypeStruct((6, 3), "float32")),
        batch("a registered class", lambda c, x, y: jax.tree_util.Partial(len, x)),
        batch("deleted", lambda c, x, y: _deleted(x)),
        batch("bfloat16", lambda c, x, y: {"x": x.astype("bfloat16"), "y": y}),
        batch("params", lambda c, x, y: c.weights),
        params("None", lambda w: None),
        params("nothing", lambda w: {}),
        params("integers", lambda w: {"w": jnp.arange(3)}),
        params("NumPy", lambda w: {"w": np.ones(3)}),
        params("a number", lambda w: 3.0),
        params("text", lambda w: {"w": "text"}),
        params("numbers", lambda w: {"w": [1.0, 2.0, 3.0]}),
        params("with text", lambda w: {**w, "name": "net"}),
        params("with None", lambda w: {**w, "none": None}),
        params("with a function", lambda w: {**w, "act": len}),
        params("with integers", lambda w: {**w, "count": jnp.arange(2)}),
        params("complex", lambda w: {"w": w["w"].astype("complex64")}),
        params("half", lambda w: {"w": w["w"].astype("float16")}),
        params("an object", lambda w: object()),
        params("mixed keys", lambda w: {**w, 1: w["w"]}),
        params("as long as the batch", lambda w: {**w, "more": jnp.ones(6)}),
        *(loss(name, made) for name, made in jax_losses.LOSSES.items()),
        *options.option("argnums", positions),
        *options.option("batch_argnum", positions),
        *options.option("key_argnum", positions),
        *options.option("aux_merge", merges, aux_is_judged=False),
        *options.option("axis_name", options.WORDS),
        *options.option(
            "grad_fn", {**options.WORDS, "right": jax.value_and_grad, "grad": jax.grad}
        ),
        *options.coarse(
            "accumulator_dtype",
            {**options.WORDS, "int32": "int32", "half": "bfloat16", "complex": "complex64"},
        ),
    ]


def _deleted(x: Any) -> Any:
    x = x + 1
    x.delete()
    return x
