"""`rowwise`: functions of rows whose loss needs all of them, and whatever differentiates that."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.jax.problems import MODES, assert_same, in_mode
from tests.tiers import tiered

import virtualbatch
import virtualbatch.jax as vb

ROWS = 7
RANDOM = np.random.default_rng(3)
PARAMS = {"a": RANDOM.normal(size=(4, 3)), "b": RANDOM.normal(size=(4, 3))}
PARAMS["scale"] = np.asarray(0.7)
BATCH = {"x": RANDOM.normal(size=(ROWS, 4)), "y": RANDOM.normal(size=(ROWS, 4))}


def first(params, batch):
    return jnp.tanh(batch["x"] @ params["a"])


def second(params, batch):
    return jnp.tanh(batch["y"] @ params["b"])


def both(params, batch):
    return first(params, batch), second(params, batch)


def compared(z, w, scale):
    """All rows with all others, in their order."""
    return jnp.std(scale * z @ w.T * jnp.cos(jnp.arange(ROWS)))


def loss(encode):
    return lambda params, batch: compared(*encode(params, batch), params["scale"])


def of_two(params, batch):
    """Two encoders, with sizes of their own."""
    a, b = vb.rowwise(first, microbatch_size=2), vb.rowwise(second, microbatch_size=3)
    return compared(a(params, batch), b(params, batch), params["scale"])


def in_blocks(params, batch):
    """The loss in blocks of rows, so that it never has all products at once."""

    def squares(given, rows):
        columns, scale = given
        return ((scale * rows @ columns.T) ** 2).sum(1)

    z, w = vb.rowwise(both, microbatch_size=3)(params, batch)
    return jnp.std(vb.rowwise(squares, microbatch_size=2)((w, params["scale"]), z))


def in_blocks_uncut(params, batch):
    z, w = both(params, batch)
    return jnp.std(((params["scale"] * z @ w.T) ** 2).sum(1))


def chained(params, batch):
    """The outputs of one are the rows of another."""
    square = vb.rowwise(lambda p, z: (z * p["scale"]) ** 2, microbatch_size=3)
    z, w = vb.rowwise(both, microbatch_size=2)(params, batch)
    return compared(square(params, z), w, params["scale"])


def chained_uncut(params, batch):
    z, w = both(params, batch)
    return compared((z * params["scale"]) ** 2, w, params["scale"])


CASES = {
    "two encoders": (of_two, loss(both)),
    "loss in blocks": (in_blocks, in_blocks_uncut),
    "chained": (chained, chained_uncut),
}


@pytest.mark.parametrize("mode", tiered(MODES, ["jit"], "the same rules, one by one"))
@pytest.mark.parametrize("name", tiered(CASES, ["chained"], "plainer, or in the conformance suite"))
def test_exact_in_parameters_and_rows(mode, name):
    ours, uncut = CASES[name]
    found = in_mode(mode, jax.value_and_grad(ours, (0, 1)))(PARAMS, BATCH)
    assert_same(found, jax.jit(jax.value_and_grad(uncut, (0, 1)))(PARAMS, BATCH))


def hessian_vector(fun, params, batch):
    return jax.jvp(jax.grad(lambda p: fun(p, batch)), (params,), (params,))[1]


def models(fun, params, batch):
    several = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    return jax.vmap(jax.grad(fun), (0, None))(several, batch)


TRANSFORMATIONS = {"hessian_vector": hessian_vector, "models": models}


@pytest.mark.parametrize("mode", tiered(MODES, ["jit"], "the same rules, one by one"))
@pytest.mark.parametrize(
    "name", tiered(TRANSFORMATIONS, ["hessian_vector"], "a further transformation")
)
def test_every_transformation_goes_through(mode, name):
    transformed = TRANSFORMATIONS[name]
    params = jnp.asarray(PARAMS["a"])

    def of(encode):
        return lambda p, x: transformed(lambda p, x: jnp.std(encode(p, x)), p, x)

    def encode(p, x):
        return jnp.tanh(x @ p)

    found = in_mode(mode, of(vb.rowwise(encode, microbatch_size=3)))(params, BATCH["x"])
    assert_same(found, jax.jit(of(encode))(params, BATCH["x"]))


def scaled(factor, x, key):
    return factor * x * (jax.random.key_data(key)[1] % 100)


@pytest.mark.parametrize("mode", tiered(MODES, ["jit"], "the same keys, one by one"))
def test_keys_are_those_of_the_micro_batches(mode):
    key, x = jax.random.key(5), np.arange(7.0)
    # Even ones, as in every un-jitted window.
    rows = (3, 2, 2) if mode == "eager" else (3, 3, 1)
    drawn = [jax.random.key_data(jax.random.fold_in(key, k))[1] % 100 for k in range(3)]
    assert len({*map(int, drawn)}) == 3
    ours = vb.rowwise(scaled, microbatch_size=3, key_argnum=2)
    found = in_mode(mode, jax.grad(lambda factor: (ours(factor, x, key) ** 2).sum()))(0.5)
    assert_same(found, jnp.asarray(((x * np.repeat(drawn, rows)) ** 2).sum()))


@pytest.mark.parametrize("mode", tiered(MODES, ["jit"], "the same outputs, one by one"))
def test_outputs_of_every_kind_in_order_of_rows(mode):
    def many(params, batch):
        number = batch["number"]
        return {
            "z": batch["x"] @ params["a"],
            "integer": number,
            "boolean": number > 3,
            "none": None,
            "complex": number * 1j,
            "key": jax.random.wrap_key_data(batch["bits"]),
        }

    bits = np.arange(2 * ROWS, dtype=np.uint32).reshape(ROWS, 2)
    batch = {"x": BATCH["x"], "number": np.arange(ROWS), "bits": bits}
    found = in_mode(mode, vb.rowwise(many, microbatch_size=3))(PARAMS, batch)
    due = many(PARAMS, batch)
    assert jax.tree.structure(found) == jax.tree.structure(due)
    assert (jax.random.key_data(found.pop("key")) == jax.random.key_data(due.pop("key"))).all()
    assert_same(found, due)


@pytest.mark.parametrize("mode", tiered(MODES, ["jit"], "the same Window, one by one"))
def test_windows_are_taken_as_they_are(mode):
    x = np.arange(7.0)
    window = vb.Window([x[:2], x[2:4], x[4:5], x[5:]])
    ours = vb.rowwise(lambda factor, x: factor * x)
    found = in_mode(mode, jax.jacrev(ours))(2.0, window)
    assert_same(found, jnp.asarray(x))


def test_rows_of_a_packed_window_come_back_by_their_numbers():
    lengths = np.array([3, 1, 4, 2, 2])
    tokens = RANDOM.normal(size=(5, 4)) * (np.arange(4) < lengths[:, None])
    given, padded = {"x": tokens, "row": np.arange(5)}, {"x": True, "row": False}
    packed = virtualbatch.pack(given, lengths, microbatch_tokens=6, padded=padded)

    def encode(w, batch):
        return jnp.tanh(batch["x"].sum(1) * w), batch["row"]

    def total(w):
        z, rows = vb.rowwise(encode)(w, packed)
        z = jnp.zeros(5).at[rows].set(z)
        return z[0] * z[1] * z[2] + z[3] ** z[4]

    def uncut(w):
        z = jnp.tanh(jnp.asarray(tokens).sum(1) * w)
        return z[0] * z[1] * z[2] + z[3] ** z[4]

    found, due = (jax.jit(jax.value_and_grad(fun))(0.7) for fun in (total, uncut))
    assert_same(found, due)


def test_lists_of_rows_are_cut_un_jitted():
    def encode(factor, batch):
        return factor * batch["x"] * np.array([float(name[1:]) for name in batch["names"]])

    # Equal micro-batches, so that one of twice the rows is traced too.
    batch = {"x": np.arange(1.0, 7), "names": [f"n{k}" for k in range(6)]}
    ours = vb.rowwise(encode, microbatch_size=3)
    value, gradient = jax.value_and_grad(lambda factor: ours(factor, batch)[4])(2.0)
    assert (value, gradient) == (40.0, 20.0)


def test_several_arguments_hold_rows():
    def encode(x, params, y, *, factor):
        return x @ params["a"] * factor, y @ params["b"]

    ours = vb.rowwise(encode, batch_argnum=(0, 2), microbatch_size=3)
    given = BATCH["x"], PARAMS, BATCH["y"]
    assert_same(jax.jit(ours)(*given, factor=2.0), encode(*given, factor=2.0))


class Encoder:
    def __init__(self, factor):
        self.factor = factor

    @partial(vb.rowwise, microbatch_size=2)
    def encode(self, x):
        return x * self.factor


def test_a_method_is_bound_as_any_function_is():
    found = jax.jit(jax.grad(lambda factor: Encoder(factor).encode(jnp.arange(3.0))[2]))(1.0)
    assert found == 2.0
