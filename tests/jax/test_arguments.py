"""The signature of `jax.value_and_grad`, and every kind of batch."""

import dataclasses
import functools
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.jax.problems import MODES, assert_same, batch, in_mode, loss, params, pieces

import virtualbatch.jax as vb

P, B = params(), batch()
X, Y = B["x"], B["y"]


def three(a, batch, c, *, factor=2.0):
    return factor * jnp.mean(jnp.sin(batch["x"] @ a) * c + batch["y"] * a.sum())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("argnums", [0, 2, (0, 2), (2, 0), (0,), [0, 2], np.int64(2)])
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
@pytest.mark.parametrize("steps", [1, 3, 12])
def test_accumulation_steps(steps, mode):
    ours = in_mode(mode, vb.value_and_grad(loss, accumulation_steps=steps))
    assert_same(ours(P, B), jax.value_and_grad(loss)(P, B))


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
@pytest.mark.parametrize("name", CONTAINERS)
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


@pytest.mark.parametrize("size", [3, 4, 10])
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
@pytest.mark.parametrize("size", [4, 5])
def test_one_key_per_row(size, key, mode):
    found = {"x": X, "y": Y, "key": jax.random.split(key(0), 10)}

    def fun(params, batch):
        noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(batch["key"])
        return loss(params, {"x": batch["x"] * noise, "y": batch["y"]})

    ours = in_mode(mode, vb.value_and_grad(fun, microbatch_size=size))
    assert_same(ours(P, found), jax.value_and_grad(fun)(P, found))
    window = vb.Window(pieces(found, *range(0, 11, 2)))
    assert_same(in_mode(mode, vb.value_and_grad(fun))(P, window), jax.value_and_grad(fun)(P, found))


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("value", [3.0, "three", None])
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
