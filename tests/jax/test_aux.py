"""What a loss gives beside itself: rows concatenated, means averaged, integers summed."""

import jax
import jax.numpy as jnp
import pytest
from tests.jax.problems import MODES, assert_same, batch, in_mode, loss, outputs, params, pieces
from tests.tiers import tiered

import virtualbatch.jax as vb

P, B = params(), batch()


def fun(params, batch):
    output = outputs(params, batch)
    aux = {
        "rows": output[:, None] * jnp.ones(4),
        "flags": output > 0,
        "half rows": output.astype(jnp.float16),
        "mean": output.mean(),
        "complex": output.mean() * (1 + 1j),
        "per feature": batch["x"].mean(0),
        "count": len(output),
        "positive": jnp.sum(output > 0),
        "none": None,
        "nested": [(jnp.int8(2) * len(output),), 0.5],
    }
    return loss(params, batch), aux


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", tiered([1, 4, 5, 10], [4], "further cuts"))
def test_the_aux_of_the_whole_batch(size, mode):
    ours = in_mode(mode, vb.value_and_grad(fun, has_aux=True, microbatch_size=size))
    (value, aux), gradients = ours(P, B)
    (due_value, due), due_gradients = in_mode(mode, jax.value_and_grad(fun, has_aux=True))(P, B)
    assert_same((value, gradients), (due_value, due_gradients))
    # Counts of several micro-batches come back in 32 bits: 100 rows would be too many for int8.
    ((narrow,), half) = due["nested"]
    due["nested"] = [(narrow.astype("int32" if size < 10 else "int8"),), half]
    assert_same(aux, due)
    # Means of other dtypes are formed in the buffer's dtype and rounded once.
    half = vb.value_and_grad(
        lambda p, b: (loss(p, b), jnp.mean(b["y"]).astype(jnp.bfloat16)),
        has_aux=True,
        microbatch_size=size,
    )
    found = in_mode(mode, half)(P, B)[0][1]
    assert found.dtype == jnp.bfloat16
    assert abs(float(found) - B["y"].mean()) <= 2.0**-7 * abs(B["y"]).max()


@pytest.mark.parametrize("mode", MODES)
def test_classes_are_not_taken_for_rows(mode):
    # Five rows and five classes: the shapes of one micro-batch cannot tell.
    seen = []

    def five(params, batch):
        seen.append(len(batch["y"]))
        output = outputs(params, batch)
        return jnp.mean(output), (jnp.ones(5) * output.mean(), output)

    ours = in_mode(mode, vb.value_and_grad(five, has_aux=True, microbatch_size=5))
    (_, (classes, rows)), _ = ours(P, B)
    assert_same(rows, in_mode(mode, outputs)(P, B))
    assert_same(classes, jnp.ones(5) * rows.mean())
    # Asked once, and not on data.
    assert seen.count(10) == 1
    window = vb.Window(pieces(B, 0, 5, 8, 10))
    ours = in_mode(mode, vb.value_and_grad(five, has_aux=True))
    (_, (classes, rows)), _ = ours(P, window)
    assert classes.shape == (5,)
    assert rows.shape == (10,)


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_that_takes_rows_in_pairs(mode):
    # An odd number of rows could not even be traced.
    def pairs(params, batch):
        return loss(params, batch) + batch["y"].reshape(-1, 2).mean(), batch["y"]

    eight = pieces(B, 0, 8)[0]
    ours = in_mode(mode, vb.value_and_grad(pairs, has_aux=True, microbatch_size=2))
    assert_same(ours(P, eight), jax.value_and_grad(pairs, has_aux=True)(P, eight))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("flag", [lambda y: y.max() > 0, lambda y: len(y) > 3])
def test_booleans_of_rows_are_neither_summed_nor_averaged(flag, mode):
    def fun(params, batch):
        return loss(params, batch), flag(batch["y"])

    run = vb.value_and_grad(fun, has_aux=True, microbatch_size=4)
    with pytest.raises(
        TypeError, match=r"one entry per row, or be a number .*Got bool\. Cast it to"
    ):
        in_mode(mode, run)(P, B)


@pytest.mark.parametrize("leaf", ["text", object()])
def test_leaves_that_cannot_be_merged(leaf):
    run = vb.value_and_grad(
        lambda p, b: (loss(p, b), (b["y"], leaf)), has_aux=True, microbatch_size=5
    )
    with pytest.raises(TypeError, match=rf"one entry per row.*Got {type(leaf).__name__}\. Cast"):
        run(P, B)


@pytest.mark.parametrize("mode", MODES)
def test_structures_that_differ(mode):
    def differing(params, batch):
        return loss(params, batch), {"a": 1} if len(batch["y"]) == 4 else {"b": 1}

    run = in_mode(mode, vb.value_and_grad(differing, has_aux=True))
    with pytest.raises(ValueError, match="aux must have the same structure for every micro-batch"):
        run(P, vb.Window(pieces(B, 0, 4, 10)))


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_that_only_knows_its_own_number_of_rows(mode):
    def fixed(params, batch):
        return loss(params, batch) + jnp.sum(batch["y"] * jnp.ones(5)), batch["y"]

    run = in_mode(mode, vb.value_and_grad(fixed, has_aux=True, microbatch_size=5))
    with pytest.raises(
        TypeError,
        match=r"traceable with any number of rows.* Got TypeError with 10 rows: .*Use JAX",
    ):
        run(P, B)
