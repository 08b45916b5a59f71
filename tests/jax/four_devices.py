"""Checks that need four devices; a program of its own, because XLA makes them when it starts.

Each check is a function; the name of one is the argument. Prints "ok" at its end.
"""

import re
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tests.jax.problems import (
    assert_same,
    batch,
    loss,
    outputs,
    params,
    pieces,
    term_weights,
    terms,
    token_loss,
    tokens,
    uncut,
)

import virtualbatch.jax as vb

ROWS, AXIS = 24, "data"
PARAMS, BATCH = params(), batch(ROWS)
LOSSES = {"rows": (loss, None), "tokens": (token_loss, tokens), "terms": (terms, term_weights)}


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((4,), (AXIS,), axis_types=(kind,))


SHARED, ROWS_APART = P(), P(AXIS)
RESULTS, ARGUMENTS = (SHARED, SHARED), (SHARED, ROWS_APART)


def sharded(fun, out_specs=RESULTS, check_vma=True, in_specs=ARGUMENTS):
    return jax.jit(
        jax.shard_map(fun, mesh=mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)
    )


def reductions(compiled):
    """In which computations of a program devices are reduced over."""
    place, found = "", []
    for line in compiled.as_text().splitlines():
        start = re.match(r"(ENTRY )?%[\w.\-]+ \(", line)
        place = line.split()[0] if start else place
        if re.search(r" all-reduce(-start)?\(", line):
            found.append(place)
    return found


def one_reduction_of_all_rows():
    for check_vma in (True, False):
        for name, (fun, weight) in LOSSES.items():
            # 6 rows a device: even, with a remainder, one micro-batch.
            for size in (2, 4, 6):
                options = {"microbatch_size": size, "weight": weight, "axis_name": AXIS}
                run = sharded(vb.value_and_grad(fun, **options), check_vma=check_vma)
                assert_same(run(PARAMS, BATCH), uncut(fun, PARAMS, BATCH))
                found = reductions(run.lower(PARAMS, BATCH).compile())
                # One for the weights, which come first, and one for loss and gradients.
                assert found == ["ENTRY"] * (1 if weight is None else 2), (name, size, found)


def a_device_without_tokens():
    found = BATCH | {"mask": BATCH["mask"] & (np.arange(ROWS) >= 6)[:, None]}
    run = vb.value_and_grad(token_loss, microbatch_size=4, weight=tokens, axis_name=AXIS)
    assert_same(sharded(run)(PARAMS, found), uncut(token_loss, PARAMS, found))
    # Or with fewer than none, which the total of all devices counts too.
    fewer = found | {"mask": np.where((np.arange(ROWS) < 6)[:, None], -0.25, found["mask"])}
    assert_same(sharded(run)(PARAMS, fewer), uncut(token_loss, PARAMS, fewer))
    fewer["mask"][0] = np.nan
    assert all(np.isnan(x).all() for x in jax.tree.leaves(sharded(run)(PARAMS, fewer)))
    window = vb.Window(pieces(found, 0, 8, 16, 24))
    run = vb.value_and_grad(token_loss, weight=tokens, axis_name=AXIS)
    assert_same(sharded(run)(PARAMS, window), uncut(token_loss, PARAMS, found))


def aux_of_all_rows():
    def fun(params, batch):
        y = batch["y"]
        return loss(params, batch), {"rows": y * 2, "mean": y.mean(), "count": jnp.sum(y > 0)}

    specs = (P(), {"rows": P(AXIS), "mean": P(), "count": P()}), P()
    for size in (2, 4, 6):
        run = vb.value_and_grad(fun, has_aux=True, microbatch_size=size, axis_name=AXIS)
        found = sharded(run, specs)(PARAMS, BATCH)
        assert_same(found, jax.value_and_grad(fun, has_aux=True)(PARAMS, BATCH))


def state_of_all_devices():
    def fun(params, state, batch):
        y = batch["y"]
        aux = {"updates": state + 1, "rows": len(y), "first": state < 1, "any": (y > 0.5).any()}
        return loss(params, batch), aux | {"largest": y.max()}

    words = {"updates": None, "rows": None, "first": None, "any": "max", "largest": "max"}
    run = vb.value_and_grad(
        fun, has_aux=True, batch_argnum=2, microbatch_size=4, axis_name=AXIS, aux_merge=words
    )
    found = sharded(run, in_specs=(P(), P(), P(AXIS)))(PARAMS, jnp.asarray(5), BATCH)
    assert_same(found, jax.value_and_grad(fun, has_aux=True)(PARAMS, jnp.asarray(5), BATCH))


def without_axis_name_like_jax():
    def per_device(run):
        # Gradients of replicated parameters are summed over devices by JAX itself.
        return sharded(lambda p, b: (lambda v, g: (v[None], g))(*run(p, b)), (P(AXIS), P()))

    due = per_device(jax.value_and_grad(loss))(PARAMS, BATCH)
    for size in (2, 4, 6):
        ours = per_device(vb.value_and_grad(loss, microbatch_size=size))
        assert_same(ours(PARAMS, BATCH), due)


def a_model_per_device_on_one_batch():
    # The remainder must not become a value of one device: the scan of this loss would refuse it.
    def fun(params, batch):
        def turn(carry, x):
            return carry + x.sum(), None

        total, _ = jax.lax.scan(turn, jnp.zeros(()), batch["x"])
        return loss(params, batch) + total * 0

    models = jax.tree.map(lambda x: np.stack([x * (k + 1) for k in range(4)]), PARAMS)

    def first(tree):
        return jax.tree.map(lambda x: x[0], tree)

    ours = vb.value_and_grad(fun, microbatch_size=5)
    run = sharded(
        lambda p, b: jax.tree.map(lambda x: x[None], ours(first(p), b)),
        P(AXIS),
        in_specs=(P(AXIS), P()),
    )
    due = jax.vmap(jax.value_and_grad(loss), (0, None))(models, BATCH)
    assert_same(run(models, BATCH), due)


def named_vmap_and_pmap():
    cut = jax.tree.map(lambda x: x.reshape(4, 6, *x.shape[1:]), BATCH)
    due = jax.tree.map(lambda x: jnp.stack([x] * 4), uncut(terms, PARAMS, BATCH))
    run = vb.value_and_grad(terms, microbatch_size=4, weight=term_weights, axis_name=AXIS)
    assert_same(jax.vmap(run, (None, 0), axis_name=AXIS)(PARAMS, cut), due)
    assert_same(jax.pmap(run, AXIS, in_axes=(None, 0))(PARAMS, cut), due)


def two_axes():
    both = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    for axes in (("a", "b"), "a"):
        run = vb.value_and_grad(token_loss, microbatch_size=4, weight=tokens, axis_name=axes)
        specs = {"in_specs": (P(), P(axes)), "out_specs": (P(), P())}
        found = jax.jit(jax.shard_map(run, mesh=both, **specs))(PARAMS, BATCH)
        assert_same(found, uncut(token_loss, PARAMS, BATCH))


def fun_with_rows(params, batch):
    return token_loss(params, batch), (batch["y"] * 2, batch["x"] * 1)


def sharded_batches():
    due = jax.value_and_grad(fun_with_rows, has_aux=True)(PARAMS, BATCH)
    for kind in (AxisType.Auto, AxisType.Explicit):
        with jax.set_mesh(mesh(kind)):
            given = jax.device_put(BATCH, NamedSharding(mesh(kind), P(AXIS)))
            weights = jax.device_put(PARAMS, NamedSharding(mesh(kind), P()))
            # Equal ones of fewer rows than asked for; rounded down to the devices; one.
            for size in (16, 7, 24):
                run = vb.value_and_grad(
                    fun_with_rows, has_aux=True, microbatch_size=size, weight=tokens
                )
                for way in (run, jax.jit(run)):
                    assert_same(jax.tree.map(np.asarray, way(weights, given)), numpy(due))
            # 20 rows by 8 leave 4.
            twenty = jax.tree.map(lambda x: x[:20], BATCH)
            given = jax.device_put(twenty, NamedSharding(mesh(kind), P(AXIS)))
            run = vb.value_and_grad(fun_with_rows, has_aux=True, microbatch_size=8, weight=tokens)
            expected = jax.value_and_grad(fun_with_rows, has_aux=True)(PARAMS, twenty)
            for way in (run, jax.jit(run)):
                assert_same(jax.tree.map(np.asarray, way(weights, given)), numpy(expected))


def numpy(tree):
    return jax.tree.map(np.asarray, tree)


def rows_of_every_device():
    # Every micro-batch has as many rows of each device, and none moves to another.
    seen = []

    def fun(params, batch):
        seen.append(jax.typeof(batch["y"]).sharding.spec[0])
        return loss(params, batch)

    with jax.set_mesh(mesh(AxisType.Explicit)):
        given = jax.device_put(BATCH, NamedSharding(mesh(AxisType.Explicit), P(AXIS)))
        for options in ({"microbatch_size": 8}, {"accumulation_steps": 5}):
            compiled = jax.jit(vb.value_and_grad(fun, **options)).lower(PARAMS, given).compile()
            assert not re.search(r" (all-gather|all-to-all|collective-permute)", compiled.as_text())
        assert set(seen) == {AXIS}
        run = vb.value_and_grad(fun, microbatch_size=3)
        for way in (run, jax.jit(run)):
            with pytest.raises(
                ValueError,
                match=r"a row on every device\. Got micro-batches of 3 rows and 4 devices\. Pass",
            ):
                way(PARAMS, given)


def squares(z):
    """A loss in which each row meets all others, and their order counts."""
    return jax.nn.logsumexp(z[:, None] * jnp.roll(z, 1)[None]) + (z * jnp.cos(jnp.arange(ROWS))) @ z


def embeddings_of_all_devices():
    def uncut(params, batch):
        return squares(outputs(params, batch))

    due = jax.value_and_grad(uncut)(PARAMS, BATCH)
    # 6 rows a device: even, and with a remainder.
    for size in (2, 4):
        encode = vb.rowwise(outputs, microbatch_size=size, axis_name=AXIS)

        def local(params, batch, encode=encode):
            z = jax.lax.all_gather(encode(params, batch), AXIS, tiled=True)
            return jax.lax.pmean(squares(z), AXIS)

        run = sharded(jax.value_and_grad(local))
        assert_same(run(PARAMS, BATCH), due)
        found = reductions(run.lower(PARAMS, BATCH).compile())
        # None of them inside of a loop.
        assert set(found) == {"ENTRY"}, (size, found)
    for kind in (AxisType.Auto, AxisType.Explicit):
        with jax.set_mesh(mesh(kind)):
            given = jax.device_put(BATCH, NamedSharding(mesh(kind), P(AXIS)))
            # 24 rows by 16 leave 8.
            for size in (8, 16):
                encode = vb.rowwise(outputs, microbatch_size=size)
                for way in (encode, jax.jit(encode)):
                    assert_same(np.asarray(way(PARAMS, given)), np.asarray(outputs(PARAMS, BATCH)))


def run_checks(names, checks):
    warnings.simplefilter("error")
    jax.config.update("jax_enable_x64", True)
    assert len(jax.devices()) == 4
    for name in names:
        checks[name]()
        print("ok", name, flush=True)


if __name__ == "__main__":
    run_checks(sys.argv[1:], globals())
