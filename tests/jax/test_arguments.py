"""The signature of `jax.value_and_grad`, and every kind of batch."""

import dataclasses
import functools
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.jax.problems import MODES, assert_same, batch, in_mode, loss, params, pieces
from tests.tiers import tiered

import virtualbatch.jax as vb

P, B = params(), batch()
X, Y = B["x"], B["y"]


def three(a, batch, c, *, factor=2.0):
    return factor * jnp.mean(jnp.sin(batch["x"] @ a) * c + batch["y"] * a.sum())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "argnums",
    tiered([0, 2, (0, 2), (2, 0), (0,), [0, 2], np.int64(2)], [2, (2, 0)], "further forms"),
)
def test_argnums_and_keywords(argnums, mode):
    args = P["w"], B, P["b"]
    ours = in_mode(mode, vb.value_and_grad(three, argnums, microbatch_size=4))
    assert_same(ours(*args, factor=3.0), jax.value_and_grad(three, argnums)(*args, factor=3.0))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("position", [0, 2])
def test_batch_argnum(position, mode):
    def fun(*args):
        return loss(args[1], args[position]) * (args[0] if position else 1.0)

    args = (2.0, P, B) if position else (B, P)
    ours = in_mode(
        mode, vb.value_and_grad(fun, 1, batch_argnum=np.int64(position), microbatch_size=4)
    )
    assert_same(ours(*args), jax.value_and_grad(fun, 1)(*args))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", tiered([1, 3, 12], [3], "further cuts"))
def test_accumulation_steps(steps, mode):
    ours = in_mode(mode, vb.value_and_grad(loss, accumulation_steps=steps))
    assert_same(ours(P, B), jax.value_and_grad(loss)(P, B))


def by_parts(params, x, scale, y):
    return scale * loss(params, {"x": x, "y": y})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1, 4, 12])
def test_several_arguments_hold_rows(size, mode):
    run = vb.value_and_grad(by_parts, batch_argnum=(1, 3), microbatch_size=size)
    found = in_mode(mode, run)(P, X, 2.0, Y)
    assert_same(found, jax.value_and_grad(by_parts)(P, X, 2.0, Y))


@pytest.mark.parametrize("mode", MODES)
def test_a_weight_takes_all_arguments_that_hold_rows(mode):
    def masked(params, x, y, mask):
        errors = (x @ params["w"] + params["b"] - y) ** 2
        return jnp.sum(errors * mask) / jnp.sum(mask)

    mask = jnp.asarray(np.arange(len(Y)) % 3 > 0, Y.dtype)
    run = vb.value_and_grad(
        masked, batch_argnum=[1, 2, 3], microbatch_size=4, weight=lambda x, y, mask: mask.sum()
    )
    assert_same(in_mode(mode, run)(P, X, Y, mask), jax.value_and_grad(masked)(P, X, Y, mask))


@pytest.mark.parametrize("mode", MODES)
def test_several_windows(mode):
    run = vb.value_and_grad(by_parts, batch_argnum=(1, 3))
    windows = vb.Window([X[:4], X[4:]]), 2.0, vb.Window([Y[:4], Y[4:]])
    assert_same(in_mode(mode, run)(P, *windows), jax.value_and_grad(by_parts)(P, X, 2.0, Y))


@pytest.mark.parametrize("other", [Y, vb.Window([Y])], ids=["an array", "a shorter window"])
def test_windows_beside_something_else_are_refused(other):
    run = vb.value_and_grad(by_parts, batch_argnum=(1, 3))
    with pytest.raises(
        ValueError, match=r"must all be Windows of one length, or none of them a Window\. Got a Win"
    ):
        run(P, vb.Window([X[:4], X[4:]]), 2.0, other)


VERBS = {
    "value_and_grad": lambda fun: vb.value_and_grad(fun, microbatch_size=1),
    "auto": lambda fun: vb.value_and_grad(fun, microbatch_size="auto"),
    "plan": vb.plan,
    "certify": lambda fun: vb.certify(fun, microbatch_size=1),
}


@pytest.mark.parametrize("verb", VERBS)
def test_rows_that_would_not_be_cut_are_refused(verb):
    # One row of outputs would be broadcast against all targets.
    fun = lambda params, x, y: jnp.mean((x @ params["w"] + params["b"] - y) ** 2)  # noqa: E731
    with pytest.raises(
        ValueError,
        match=rf"cut with the batch\. Got argument 2, an array of shape \({len(Y)},\), beside a "
        rf"batch of {len(Y)} rows\. Pass it by position and name all.*or.* close over it\.",
    ):
        VERBS[verb](fun)(P, X, Y)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("other", "got"),
    [
        (Y, "an array of shape"),
        ({"y": Y, "none": None}, "a dict"),
        (vb.Window([Y]), "a Window of 1"),
    ],
    ids=["array", "all arrays of a pytree", "window"],
)
def test_rows_in_a_keyword_are_refused(other, got, mode):
    run = vb.value_and_grad(lambda params, batch, y: 0.0, microbatch_size=4)
    with pytest.raises(ValueError, match=rf"cut with the batch\. Got argument 'y', {got}"):
        in_mode(mode, run)(P, B, y=other)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "table",
    [
        np.ones(len(Y) + 1),
        np.ones((3, len(Y))),
        {"mean": np.ones(len(Y)), "count": np.ones(())},
        np.float32(1),
    ],
    ids=["another length", "another axis", "some leaves only", "scalar"],
)
def test_arrays_that_belong_to_every_row(table, mode):
    def fun(params, batch, table):
        return loss(params, batch) * jnp.mean(jax.tree.leaves(table)[0])

    run = vb.value_and_grad(fun, microbatch_size=4)
    assert_same(in_mode(mode, run)(P, B, table), jax.value_and_grad(fun)(P, B, table))


@pytest.mark.parametrize("mode", MODES)
def test_an_uncut_batch_is_the_ordinary_computation_whatever_holds_rows(mode):
    fun = lambda params, x, y: loss(params, {"x": x, "y": y})  # noqa: E731
    run = vb.value_and_grad(fun, microbatch_size=len(Y))
    assert_same(in_mode(mode, run)(P, X, Y), jax.value_and_grad(fun)(P, X, Y))


def test_a_plan_and_a_certificate_of_several_arguments():
    # Without data nothing is timed.
    specs = [jax.ShapeDtypeStruct(x.shape, "float32") for x in (X, Y)]
    found = vb.plan(by_parts, batch_argnum=(1, 3), memory_limit="1GiB")(P, specs[0], 2.0, specs[1])
    assert 1 <= found.microbatch_size <= len(Y)
    run = vb.certify(
        by_parts, batch_argnum=(1, 3), microbatch_size=4, weight=lambda x, y: float(len(y))
    )
    assert run(P, X, 2.0, Y).exact


def test_a_certificate_says_what_a_weight_of_several_arguments_takes():
    def masked(params, x, mask):
        return jnp.sum((x @ params["w"] + params["b"]) ** 2 * mask) / jnp.sum(mask)

    mask = (np.arange(len(Y)) % 4 > 0).astype(float)
    found = vb.certify(masked, batch_argnum=(1, 2), microbatch_size=5)(P, X, mask)
    assert found.findings[0].fix == "Pass weight=lambda *batch: batch[1].sum()."


Pair = namedtuple("Pair", "x y")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["x", "y"], meta_fields=["name"])
@dataclasses.dataclass
class Data:
    x: object
    y: object
    name: str = "data"


CONTAINERS = {
    "tuple": (X, Y),
    "list": [X, Y],
    "None": (X, Y, None),
    "namedtuple": Pair(X, Y),
    "dataclass": Data(X, Y),
    "nested": (X, (Y, {"nothing": None})),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", tiered(CONTAINERS, ["None", "dataclass"], "further containers"))
def test_containers(name, mode):
    def fun(params, found):
        x, y = jax.tree.leaves(found)
        return loss(params, {"x": x, "y": y})

    ours = in_mode(mode, vb.value_and_grad(fun, microbatch_size=4))
    assert_same(ours(P, CONTAINERS[name]), jax.value_and_grad(loss)(P, B))


@dataclasses.dataclass
class NoPytree:
    y: object


@pytest.mark.parametrize("batch", [{"x": X, "rest": NoPytree(Y)}, NoPytree(Y)], ids=str)
def test_arrays_that_jax_does_not_see_are_refused(batch):
    # They would reach every micro-batch whole.
    run = vb.value_and_grad(lambda params, batch: 0.0, microbatch_size=1)
    with pytest.raises(
        TypeError, match=r"Got batch.*\.y inside of NoPytree, which is no pytree\. Pass a dict"
    ):
        run(P, batch)


@pytest.mark.parametrize("size", tiered([3, 4, 10], [4], "further cuts"))
def test_arrays_of_numpy_outside_and_inside_jit(size):
    run = vb.value_and_grad(loss, microbatch_size=size)
    due = jax.value_and_grad(loss)(P, B)
    assert_same(run(P, B), due)
    assert_same(jax.jit(lambda params: run(params, B))(P), due)
    window = vb.Window([{"x": X[:4], "y": Y[:4]}, {"x": X[4:], "y": Y[4:]}])
    run = vb.value_and_grad(loss)
    assert_same(run(P, window), due)
    assert_same(jax.jit(lambda params: run(params, window))(P), due)


@pytest.mark.parametrize("mode", MODES)
def test_leaves_of_integers_and_booleans(mode):
    found = {"x": X, "on": X[:, 0] > 0, "i": np.arange(10) % 4, "u": np.arange(10, dtype="uint8")}

    def fun(params, batch):
        output = batch["x"] @ params["w"] * batch["i"]
        return jnp.mean(jnp.where(batch["on"], output, batch["u"] * params["b"]))

    ours = in_mode(mode, vb.value_and_grad(fun, microbatch_size=4))
    assert_same(ours(P, found), jax.value_and_grad(fun)(P, found))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("key", [jax.random.key, jax.random.PRNGKey])
@pytest.mark.parametrize("size", tiered([4, 5], [4], "further cuts"))
def test_one_key_per_row(size, key, mode):
    found = {"x": X, "y": Y, "key": jax.random.split(key(0), 10)}

    def fun(params, batch):
        noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(batch["key"])
        return loss(params, {"x": batch["x"] * noise, "y": batch["y"]})

    ours = in_mode(mode, vb.value_and_grad(fun, microbatch_size=size))
    assert_same(ours(P, found), jax.value_and_grad(fun)(P, found))
    window = vb.Window(pieces(found, *range(0, 11, 2)))
    assert_same(in_mode(mode, vb.value_and_grad(fun))(P, window), jax.value_and_grad(fun)(P, found))


@pytest.mark.parametrize("size", tiered([4, 5], [4], "further cuts"))
@pytest.mark.parametrize("value", tiered([3.0, "three", None], ["three"], "further leaves"))
def test_leaves_without_rows_go_to_every_micro_batch(value, size):
    found = {"x": X, "y": Y, "extra": value}

    def fun(params, batch):
        assert batch["extra"] is value
        return loss(params, batch), batch["y"]

    # As arguments of jit they would be arrays, so there they are closed over.
    run = vb.value_and_grad(fun, has_aux=True, microbatch_size=size)
    for ours in (run, lambda params, found: jax.jit(lambda params: run(params, found))(params)):
        (total, rows), gradients = ours(P, found)
        assert_same((total, gradients), jax.value_and_grad(loss)(P, B))
        assert_same(rows, Y)


@pytest.mark.parametrize("mode", MODES)
def test_parameters_that_are_unused_missing_or_python_numbers(mode):
    def fun(params, batch):
        return jnp.mean(batch["x"] @ (params["w"] if params else jnp.ones(3)))

    ours = in_mode(mode, vb.value_and_grad(fun, microbatch_size=4))
    for found in (P, {}, None, {"w": P["w"], "b": 2.0}):
        assert_same(ours(found, B), jax.value_and_grad(fun)(found, B))


@pytest.mark.parametrize("mode", MODES)
def test_complex_parameters(mode):
    complex_params = {"w": P["w"] * (1 + 0.5j)}

    def fun(params, batch):
        return jnp.mean(jnp.abs(batch["x"] @ params["w"] - batch["y"]) ** 2)

    ours = in_mode(mode, vb.value_and_grad(fun, microbatch_size=4))
    assert_same(ours(complex_params, B), jax.value_and_grad(fun)(complex_params, B))


@pytest.mark.parametrize("mode", MODES)
def test_arguments_that_are_functions(mode):
    def fun(params, batch, activation):
        return {"a": jnp.mean(activation(batch["x"] @ params["w"])), "b": loss(params, batch)}

    def by_rows(batch):
        return dict.fromkeys("ab", len(batch["x"]))

    ours = vb.value_and_grad(fun, microbatch_size=4, weight=by_rows)
    ours = jax.jit(ours, static_argnums=2) if mode == "jit" else ours
    due = jax.value_and_grad(lambda *args: sum(fun(*args).values()))(P, B, jnp.tanh)
    assert_same(ours(P, B, jnp.tanh), due)


@pytest.mark.parametrize("mode", MODES)
def test_one_micro_batch_is_the_ordinary_computation_bit_for_bit(mode):
    due = in_mode(mode, jax.value_and_grad(loss))(P, B)
    for weight in (None, lambda batch: 7.0):
        for size in (10, 99):
            ours = in_mode(mode, vb.value_and_grad(loss, microbatch_size=size, weight=weight))
            assert all(map(np.array_equal, jax.tree.leaves(ours(P, B)), jax.tree.leaves(due)))


def test_the_function_keeps_its_name_and_says_what_it_does():
    assert vb.value_and_grad(loss, microbatch_size=4).__name__ == "loss"
    assert vb.value_and_grad(loss, microbatch_size=4).__doc__ == "A mean over rows."
