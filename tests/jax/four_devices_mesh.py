"""Checks of a mesh in use, over which the engine itself spreads rows; see `four_devices`."""

import logging
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from tests.jax.four_devices import AXIS, mesh, reductions, run_checks, squares
from tests.jax.problems import (
    assert_same,
    batch,
    loss,
    outputs,
    params,
    pieces,
    term_weights,
    terms,
    tokens,
    uncut,
)
from tests.replicas import BY_HAND

import virtualbatch.jax as vb

ROWS = 24
BY_ROWS = P(AXIS)
PARAMS, BATCH = params(), batch(ROWS)
KINDS = (AxisType.Auto, AxisType.Explicit)


def host(tree):
    return jax.tree.map(np.asarray, tree)


def on(spec, tree=BATCH):
    return jax.device_put(tree, spec)


def padded(numbers, rows):
    return [*numbers, *[0] * (rows - len(numbers))]


def laws_by_hand():
    """Devices have equally many rows in a program, so those that a case lacks weigh nothing."""

    def fun(w, batch):
        x, m = batch
        return {"mean": (m * w * x).sum() / m.sum(), "penalty": factor * w**2}

    def weight(batch):
        return {"mean": batch[1].sum(), "penalty": None}

    with jax.set_mesh(jax.make_mesh((2,), (AXIS,), devices=jax.devices()[:2])):
        for name, case in BY_HAND.items():
            factor = case.factor
            rows = max(map(len, case.x))
            given = [
                np.concatenate([padded(own, rows) for own in both]).astype(float)
                for both in (case.x, case.mask)
            ]
            run = vb.value_and_grad(fun, microbatch_size=case.size, weight=weight, axis_name=AXIS)
            found = jax.jit(run)(1.0, tuple(given))
            assert np.allclose(found, (case.loss, case.gradient), rtol=1e-14), (name, found)


def rows_of_all_devices():
    """Even micro-batches and a remainder; wherever the batch is before."""
    due = host(uncut(terms, PARAMS, BATCH))
    axes = ("data", "model")
    mixed = jax.make_mesh((2, 2), axes, axis_types=KINDS)
    for used, names, size, given in (
        (mesh(KINDS[0]), AXIS, 4, lambda: on(P(AXIS))),
        (mesh(KINDS[1]), AXIS, 4, lambda: BATCH),
        (mixed, axes, 2, lambda: on(P())),
    ):
        with jax.set_mesh(used):
            run = vb.value_and_grad(
                terms, microbatch_size=size, weight=term_weights, axis_name=names
            )
            assert_same(host(jax.jit(run)(PARAMS, given())), due)


def outside_of_a_trace():
    due = uncut(terms, PARAMS, BATCH)
    for used, spec in ((mesh(AxisType.Explicit), P()), (both(AxisType.Auto), P("data"))):
        with jax.set_mesh(used):
            run = vb.value_and_grad(
                terms, accumulation_steps=2, weight=term_weights, axis_name="data"
            )
            assert_same(host(run(PARAMS, on(spec))), host(due))


def a_first_window_proves_itself():
    def sum_of_rows(params, batch):
        return ((outputs(params, batch) - batch["y"]) ** 2).sum()

    for kind in KINDS:
        with jax.set_mesh(mesh(kind)):
            run = vb.value_and_grad(sum_of_rows, microbatch_size=6, axis_name=AXIS)
            with pytest.raises(ValueError, match=r"must add up.*Got a loss whose.*sum_loss"):
                run(PARAMS, on(P(AXIS)))


def reductions_once_and_own_rows():
    """As many reductions for any number of micro-batches, and each device multiplies its rows."""
    width, rows = 5, 32
    traces = []

    def fun(w, x):
        traces.append(len(x))
        return jnp.mean(jnp.tanh(x @ w) ** 2)

    x = np.random.default_rng(0).normal(size=(rows, 3))
    with jax.set_mesh(mesh()):
        for count in (1, 2, 4, 8):
            run = vb.value_and_grad(fun, microbatch_size=8 // count, axis_name=AXIS, weight=len)
            compiled = jax.jit(run).lower(np.ones((3, width)), on(P(AXIS), x)).compile()
            assert reductions(compiled) == ["ENTRY"] * 2, (count, reductions(compiled))
            sizes = re.findall(rf"f64\[(\d+),{width}\]\S* dot\(", compiled.as_text())
            assert str(8 // count) in sizes, (count, sizes)
            assert str(rows) not in sizes, (count, sizes)
    assert traces == [8, 4, 2, 1]


def two_layers(params, batch):
    # Contracted over what `model` may hold: an explicit mesh asks where the sum goes.
    z = jnp.dot(jnp.tanh(batch["x"] @ params["a"]), params["b"], out_sharding=whole())
    return (((z - batch["y"][:, None]) ** 2) * batch["mask"]).sum() / batch["mask"].sum()


def whole():
    mesh = jax.sharding.get_abstract_mesh()
    return P() if AxisType.Explicit in mesh.axis_types else None


LAYERS = {"a": np.linspace(-1, 1, 24).reshape(3, 8), "b": np.cos(np.arange(32.0)).reshape(8, 4)}
FSDP = {"a": P(None, "data"), "b": P("data")}
TENSOR = {"a": P(None, "model"), "b": P("model")}


def both(kind):
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)


def window_of_layers(used, specs):
    """Checked gradients of parameters that are sharded, with a remainder; and all-gathers."""
    with jax.set_mesh(used):
        given = on(specs, LAYERS)
        run = vb.value_and_grad(two_layers, microbatch_size=5, weight=tokens, axis_name="data")
        compiled = jax.jit(run).lower(given, on(P("data"))).compile()
        found = compiled(given, on(P("data")))
        assert_same(host(found), host(uncut(two_layers, LAYERS, BATCH)))
        gathered = len(re.findall(r" all-gather(?:-start)?\(", compiled.as_text()))
        alike = [
            found[1][name].sharding.is_equivalent_to(x.sharding, x.ndim)
            for name, x in given.items()
        ]
        return gathered, all(alike)


def parameters_spread_over_the_axis():
    # Types tell where gradients belong.
    assert window_of_layers(mesh(AxisType.Explicit), FSDP) == (len(FSDP), True)


def parameters_spread_in_all_ways():
    assert window_of_layers(mesh(AxisType.Auto), FSDP)[0] == len(FSDP)
    assert window_of_layers(both(AxisType.Auto), TENSOR) == (0, True)
    # JAX itself gathers what other explicit axes hold where a shard_map begins.
    assert window_of_layers(both(AxisType.Explicit), TENSOR)[1]


def a_shard_map_over_some_axes():
    """One of the user's; the other axis stays automatic."""
    due = host(uncut(two_layers, LAYERS, BATCH))
    with jax.set_mesh(both(AxisType.Auto)):
        given = on(TENSOR, LAYERS), on(P("data"))
        for size in (12, 4, 5):
            for check_vma in (True, False):
                run = vb.value_and_grad(
                    two_layers, microbatch_size=size, weight=tokens, axis_name="data"
                )
                entered = jax.shard_map(
                    run,
                    in_specs=(P(), P("data")),
                    out_specs=(P(), P()),
                    axis_names={"data"},
                    check_vma=check_vma,
                )
                assert_same(host(jax.jit(entered)(*given)), due)


def aux_of_all_kinds():
    def fun(params, state, x, y, key, *, factor):
        found = {"x": x, "y": y}
        aux = {
            "rows": y * 2,
            "ones": jnp.ones(len(y)),
            "mean": y.mean(),
            "count": jnp.sum(y > 0),
            "state": state["n"] + 1,
            "key": key,
            "last": y[-1],
            "none": None,
        }
        return loss(params[0], found) * factor * state["scale"] + params[1], aux

    words = dict.fromkeys(["rows", "ones", "mean", "count", "state", "none"])
    words |= {"key": "keep", "last": "keep"}
    words["none"] = None
    x, y, key = BATCH["x"], BATCH["y"], jax.random.key(3)
    state = {"n": np.asarray(5), "scale": 2.0, "name": "not an array"}
    given = (PARAMS, 1.0), state, x, y, key
    options = {"argnums": (0,), "has_aux": True}
    due = jax.value_and_grad(fun, **options)(*given, factor=np.asarray(3.0))
    cuts = 0, 8, 20, 24
    windows = [vb.Window(pieces(part, *cuts)) for part in (x, y)]
    for kind in KINDS:
        with jax.set_mesh(mesh(kind)):
            run = vb.value_and_grad(
                fun,
                batch_argnum=(2, 3),
                microbatch_size=4,
                axis_name=AXIS,
                stats=True,
                aux_merge=words,
                **options,
            )
            (value, gradients, stats) = jax.jit(
                lambda p, *rows, run=run, **named: run(p, state, *rows, **named)
            )((PARAMS, 1.0), x, y, key, factor=np.asarray(3.0))
            found = host((value[1].pop("key"), value, gradients)[1:])
            expected = due[0][0], {k: v for k, v in due[0][1].items() if k != "key"}
            assert_same(found, host((expected, due[1])))
            assert (stats.rows, stats.microbatches) == (24, 8)
            run = vb.value_and_grad(
                fun, batch_argnum=(2, 3), axis_name=AXIS, aux_merge=words, **options
            )
            for way in (run,):
                ((value, aux), gradients) = way(
                    (PARAMS, 1.0), state, *windows, key, factor=np.asarray(3.0)
                )
                aux.pop("key")
                assert_same(host(((value, aux), gradients)), host((expected, due[1])))


def keys_differ():
    """By device and by micro-batch; one device, or a window of one micro-batch, is no exception."""

    def fun(w, x, key):
        noise = jax.random.normal(key, x.shape)
        return jnp.mean(w * x), noise

    key = jax.random.key(1)
    with jax.set_mesh(mesh()):
        for size in (2, 6):
            run = vb.value_and_grad(
                fun, has_aux=True, microbatch_size=size, key_argnum=2, axis_name=AXIS
            )
            noise = np.asarray(jax.jit(run)(1.0, np.ones(ROWS), key)[0][1])
            assert len(set(noise.tolist())) == ROWS, size


def losses_that_start_from_zeros():
    def fun(params, batch):
        total, _ = jax.lax.scan(
            lambda carry, x: (carry + x @ params["w"], None), jnp.zeros(()), batch["x"]
        )
        return total / len(batch["x"])

    with jax.set_mesh(mesh()):
        run = vb.value_and_grad(fun, microbatch_size=4, axis_name=AXIS)
        assert_same(host(jax.jit(run)(PARAMS, BATCH)), host(uncut(fun, PARAMS, BATCH)))


def refusals():
    run = vb.value_and_grad(loss, microbatch_size=2, axis_name=AXIS)
    odd = jax.tree.map(lambda x: x[:22], BATCH)
    pad = r"Got 22 rows in batch for the 4 devices of axis 'data'\. Pad them to 24 with rows of"
    with jax.set_mesh(mesh()):
        for way in (run, jax.jit(run)):
            with pytest.raises(ValueError, match=pad):
                way(PARAMS, odd)
        with pytest.raises(ValueError, match=r"Got 10 rows in window\[1\] for the 4 devices"):
            vb.value_and_grad(loss, axis_name=AXIS)(PARAMS, vb.Window(pieces(BATCH, 0, 8, 18)))
        with pytest.raises(TypeError, match=r"one beside 24 rows, on a mesh\. Pass an array"):
            run(PARAMS, BATCH | {"names": ["a"] * ROWS})
        with pytest.raises(
            ValueError, match=r"Got axis_name='rows' outside of shard_map and a mesh"
        ):
            vb.value_and_grad(loss, microbatch_size=2, axis_name="rows")(PARAMS, BATCH)
        with pytest.raises(
            TypeError, match=r"a tuple of names\. Got axis_name=\['data'\]\. Pass a t"
        ):
            vb.value_and_grad(loss, microbatch_size=2, axis_name=["data"])(PARAMS, BATCH)
        with pytest.raises(ValueError, match=r"beside a batch of 24 rows"):
            run(PARAMS, BATCH, np.ones(ROWS))
        negative = vb.value_and_grad(
            loss, microbatch_size=2, weight=lambda batch: -len(batch["y"]), axis_name=AXIS
        )
        with pytest.raises(ValueError, match=r"Got weight=-2\.0 for micro-batch 0"):
            negative(PARAMS, on(P(AXIS)))
    with jax.set_mesh(mesh(AxisType.Explicit)):
        table = jnp.ones(3)
        run = vb.value_and_grad(
            lambda params, batch: loss(params, batch) * table.sum(),
            microbatch_size=2,
            axis_name=AXIS,
        )
        with pytest.raises(ValueError, match=r"Got one that it closes over f64\[3\].*Pass it as"):
            jax.jit(run)(PARAMS, BATCH)


def embeddings_of_all_devices():
    def contrastive(params, batch, encode=outputs):
        return squares(encode(params, batch))

    due = host(jax.value_and_grad(contrastive)(PARAMS, BATCH))
    for kind in KINDS:
        with jax.set_mesh(mesh(kind)):
            for size in (2, 4, 6):
                encode = vb.rowwise(outputs, microbatch_size=size, axis_name=AXIS)

                def fun(params, batch, encode=encode):
                    z = encode(params, batch)
                    return squares(z if whole() is None else jax.reshard(z, P()))

                given = PARAMS, on(P(AXIS))
                assert_same(host(jax.jit(jax.value_and_grad(fun))(*given)), due)
                assert np.allclose(encode(*given), outputs(PARAMS, BATCH), rtol=1e-14)


class Said(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def outputs_loss(params, batch):
    return loss(params, batch)


def said_once():
    said = Said()
    logging.getLogger("virtualbatch").addHandler(said)

    def told(used, options, spec=BY_ROWS, enter=jax.jit):
        def fun(params, batch):
            return loss(params, batch)

        # A code of its own, as any other loss has.
        fun.__code__ = fun.__code__.replace(co_name=f"loss{len(seen)}")
        seen.append(fun)
        run = vb.value_and_grad(fun, microbatch_size=4, **options)
        said.texts.clear()
        with jax.set_mesh(used):
            for _ in range(2):
                jax.clear_caches()
                enter(run).trace(PARAMS, on(spec))
        return [text[:70] for text in said.texts]

    def entered(run):
        specs = {"in_specs": (P(), P(AXIS)), "out_specs": P(AXIS), "axis_names": {AXIS}}
        return jax.jit(jax.shard_map(lambda *args: run(*args)[0][None], **specs))

    seen = []
    automatic, explicit = map(mesh, KINDS)
    # One of a kind does not silence the other, of the same loss.
    several = vb.value_and_grad(outputs_loss, microbatch_size=4)
    for used in (automatic, explicit):
        with jax.set_mesh(used):
            jax.jit(several).trace(PARAMS, on(BY_ROWS))
    assert [text[:10] for text in said.texts] == ["jit cannot", "The rows o"]
    assert told(automatic, {}) == [
        "jit cannot see whether the rows of this batch are spread over automati"
    ]
    assert told(explicit, {}) == [
        "The rows of this batch are spread over 4 devices, whose gradients are "
    ]
    assert told(explicit, {}, P()) == []
    assert told(automatic, {"axis_name": AXIS}) == []
    one = jax.make_mesh((1,), (AXIS,), axis_types=KINDS[:1])
    assert told(one, {}) == []
    assert told(both(AxisType.Auto), {}, enter=entered) == []


if __name__ == "__main__":
    run_checks(sys.argv[1:], globals())
