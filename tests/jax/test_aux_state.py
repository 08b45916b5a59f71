"""State in aux: what no row changes comes back once; what counts on is refused, or said how."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tests.jax.problems import MODES, assert_same, in_mode

import virtualbatch.jax as vb

X = np.arange(10.0)
PARAMS = {"w": np.asarray(2.0)}


def loss(params, x):
    return jnp.mean(x * params["w"])


def window(fun, **options):
    options = {"batch_argnum": 2, "microbatch_size": 4, "has_aux": True} | options
    return vb.value_and_grad(fun, **options)


def aux_of(mode, fun, state, **options):
    return in_mode(mode, window(fun, **options))(PARAMS, state, X)[0][1]


def counted(params, state, x):
    """The state of the issue: a counter, in every form in which it gets through a program."""

    def layer(carry, _):
        hidden, n = carry
        return (jnp.tanh(hidden), n + 1), n

    (hidden, layers), each = jax.lax.scan(layer, (x * params["w"], state["n"]), None, 3)
    inner = jax.jit(lambda hidden, n: (hidden + 1, n + 1))(hidden, state["n"])[1]
    remat = jax.checkpoint(lambda hidden, n: (hidden + 1, n + 1))(hidden, state["n"])[1]
    branch = jax.lax.cond(state["n"] > 1, lambda n: n + 5, lambda n: n + 1, state["n"])
    loop = jax.lax.while_loop(lambda c: c[1] < 9, lambda c: (c[0] * 2, c[1] + 2), (hidden, 0))[1]
    new = {
        "n": state["n"] + 1,
        "layers": layers,
        "each": each,
        "inner": inner,
        "remat": remat,
        "branch": branch,
        "loop": loop,
        "first": jnp.zeros((), bool),
        "constant": 3,
        "flag": True,
        "key": jax.random.split(state["key"])[0],
        "raw": jax.random.split(state["raw"])[0],
        "table": state["table"] + jnp.arange(3),
    }
    return loss(params, x), new


def start(n=0):
    key = jax.random.key(0)
    return {"n": n, "key": key, "raw": jax.random.key_data(key), "table": jnp.arange(3)}


@pytest.mark.parametrize("mode", MODES)
def test_state_that_no_row_changes_is_that_of_the_whole_batch(mode):
    ours, whole = start(), start()
    # A function that is jitted by itself is looked into.
    run, uncut = in_mode(mode, window(jax.jit(counted))), jax.jit(counted)
    for update in range(3):
        aux, due = run(PARAMS, ours, X)[0][1], uncut(PARAMS, whole, X)[1]
        assert int(aux["n"]) == update + 1
        assert jax.random.key_data(aux["key"]).tolist() == jax.random.key_data(due["key"]).tolist()
        assert_same(aux | {"key": 0}, due | {"key": 0})
        keep = ("n", "key", "raw", "table")
        ours, whole = {k: aux[k] for k in keep}, {k: due[k] for k in keep}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "count",
    [
        lambda n, x: len(x),
        lambda n, x: (x > 3).sum(),
        lambda n, x: jnp.sum(jnp.where(n > 100, 0, x > 3)),
        lambda n, x: jax.lax.scan(lambda c, row: (c + (row > 3), None), 0, x)[0],
        lambda n, x: jnp.ones_like(x, int).sum(),
    ],
)
def test_counts_of_rows_are_summed(count, mode):
    def fun(params, state, x):
        return loss(params, x), count(state, x)

    assert int(aux_of(mode, fun, 5)) == int(count(5, X))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "count",
    [
        lambda n, x: n + (x > 3).sum(),
        lambda n, x: n + len(x),
        lambda n, x: jnp.where(jnp.isfinite(x).all(), n + 1, n),
        lambda n, x: jax.lax.cond(x.sum() > 0, lambda: n + 1, lambda: n),
        lambda n, x: jax.lax.scan(lambda c, row: (c + (row > 3), None), n, x)[0],
        lambda n, x: jax.lax.while_loop(lambda c: c < x.sum(), lambda c: c + 1, n),
        lambda n, x: jax.jit(lambda n, x: n + (x > 3).sum())(n, x),
        # From one carried value to the other.
        lambda n, x: jax.lax.scan(
            lambda c, _: ((c[0] + c[1], (x > 3).sum()), None), (n, 0), length=3
        )[0][0],
    ],
)
def test_a_count_that_goes_on_is_refused(count, mode):
    def fun(params, state, x):
        return loss(params, x), {"seen": count(state["n"], x)}

    for state in ({"n": 5}, {"n": jnp.asarray(5)}):
        with pytest.raises(
            ValueError, match=r"aux\['seen'\], which adds to an integer .*aux_merge="
        ):
            aux_of(mode, fun, state)


@pytest.mark.parametrize("mode", MODES)
def test_a_count_that_goes_on_from_what_the_loss_closes_over_is_refused(mode):
    def update(params, seen, x):
        def fun(params, x):
            return loss(params, x), seen + (x > 3).sum()

        return vb.value_and_grad(fun, has_aux=True, microbatch_size=4)(params, x)

    with pytest.raises(ValueError, match="adds to an integer"):
        in_mode(mode, update)(PARAMS, jnp.asarray(5), X)


@pytest.mark.parametrize("mode", MODES)
def test_the_user_says_how_aux_is_put_together(mode):
    def fun(params, state, x):
        aux = {
            "seen": state + (x > 3).sum(),
            "largest": {"int": x.max().astype(int), "float": -x.max(), "bool": (x > 8).any()},
            "total": x.sum().astype(jnp.float32),
            "mean": (x.mean(), x.mean() * 1j),
            "pairs": jnp.stack([x.min(), x.max()]),
            "last": x[-1],
            "rows": x,
        }
        return loss(params, x), aux

    words = {
        "seen": "max",
        "largest": "max",
        "total": "sum",
        "mean": "mean",
        "pairs": "rows",
        "last": "keep",
        "rows": None,
    }
    aux = aux_of(mode, fun, 5, aux_merge=words)
    due = {
        "seen": jnp.asarray({"jit": 5 + 4, "eager": 5 + 3}[mode]),
        "largest": {"int": jnp.asarray(9), "float": jnp.asarray(-3.0)},
        "total": jnp.asarray(45, jnp.float32),
        "mean": (jnp.asarray(4.5), jnp.asarray(4.5j)),
        "last": jnp.asarray(9.0),
        "rows": jnp.asarray(X),
    }
    assert bool(aux["largest"].pop("bool"))
    pairs = aux.pop("pairs")
    assert pairs.shape == (6,)
    assert pairs[0] == 0
    assert pairs[-1] == 9
    assert_same(aux, due)


def test_one_word_says_it_of_all():
    def fun(params, state, x):
        return loss(params, x), [state + len(x), x]

    assert aux_of("jit", fun, 1, aux_merge=["sum", "rows"])[0] == 3 + 10
    kept = aux_of("jit", fun, 1, aux_merge="keep", microbatch_size=5)
    assert int(kept[0]) == 1 + 5
    assert_same(kept[1], jnp.asarray(X[5:]))
    with pytest.raises(
        ValueError, match=r"must have the same shape .*\. Got \(4,\) and \(2,\)\. Use"
    ):
        aux_of("jit", fun, 1, aux_merge="keep")


def test_constants_beside_one_micro_batch_and_a_remainder():
    def fun(params, state, x):
        return loss(params, x), {"flag": True, "number": 7, "typed": jnp.int8(3)}

    found = aux_of("jit", fun, None, microbatch_size=6)
    due = {"flag": np.asarray(True), "number": np.asarray(7), "typed": np.int8(3)}
    assert_same(found, due)


@pytest.mark.parametrize("words", ["total", {"n": "add"}, ["keep", 3]])
def test_words_that_mean_nothing(words):
    with pytest.raises(ValueError, match=r"aux_merge must name .*Pass has_aux=True, and 'keep'"):
        window(counted, aux_merge=words)
    with pytest.raises(ValueError, match=r"aux_merge must name .*has_aux=False"):
        vb.plan(loss, aux_merge="keep")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("words", "got"),
    [("mean", r"leaf \['n'\] of int"), ({"n": "rows"}, r"of int\d\d, shape \(\)"), ("sum", "bool")],
)
def test_words_that_do_not_fit_a_leaf(words, got, mode):
    def fun(params, state, x):
        aux = {"flag": True} if words == "sum" else {"n": jnp.asarray(1)}
        return loss(params, x), aux

    with pytest.raises(TypeError, match=rf"must fit the leaf that it names.*{got}"):
        aux_of(mode, fun, 0, aux_merge=words)


def test_words_that_do_not_fit_the_structure():
    def fun(params, state, x):
        return loss(params, x), {"a": 1, "b": 2}

    with pytest.raises(ValueError, match=r"(?s)a prefix of aux .*Give each key of aux"):
        aux_of("jit", fun, 0, aux_merge={"a": "sum"})


def test_a_loss_that_cannot_be_traced_says_how_its_integers_are_put_together():
    # Un-jitted a loss may read values; what its integers are computed from cannot be seen then.
    def fun(params, state, x):
        return loss(params, x), {"n": state["n"] + int((x > 3).sum())}

    with pytest.raises(TypeError, match=r"(?s)must be traceable .*aux_merge="):
        aux_of("eager", fun, {"n": 1})
    assert aux_of("eager", fun, {"n": 0}, aux_merge="sum")["n"] == 6

    # A number of Python may be no count, but part of the program.
    def repeated(params, times, x):
        for _ in range(times):
            x = x + 1
        return loss(params, x), {"positive": (x > 3).sum(), "times": times}

    aux = aux_of("eager", repeated, 2)
    assert int(aux["positive"]) == 8
    assert aux["times"] == 2


def test_un_jitted_what_is_known_of_a_loss_is_not_asked_again():
    traced = []

    def fun(params, state, x):
        traced.append(isinstance(x, jax.core.Tracer))
        return loss(params, x), {"n": state["n"] + 1}

    run = window(fun, microbatch_size=5)
    for n in range(3):
        assert run(PARAMS, {"n": n}, jnp.asarray(X))[0][1]["n"] == n + 1
    # Differentiation traces, too: once for each micro-batch.
    assert len(traced) == 3 * 2 + 2


def test_state_over_devices():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shard = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P()
    )

    def fun(params, state, x):
        new, key = state["n"] + 1, jax.random.split(state["key"])[0]
        aux = {"n": new, "first": new < 0, "key": key, "own": params["n"] + 1, "k": params["k"]}
        return loss(params, x), aux | {"largest": x.max(), "any": (x > 8).any()}

    words = {"largest": "max", "any": "max"} | dict.fromkeys(["n", "first", "key", "own", "k"])
    options = {"axis_name": "data", "aux_merge": words}
    params = PARAMS | {"n": jnp.asarray(6), "k": jax.random.key(3)}
    grads = functools.partial(eqx.filter_value_and_grad)
    run = jax.jit(shard(window(fun, grad_fn=grads, **options)))
    (_, aux), _ = run(params, {"n": jnp.asarray(2), "key": jax.random.key(0)}, jnp.asarray(X))
    assert [int(aux[k]) for k in ("n", "own", "first", "any", "largest")] == [3, 7, 0, 1, 9]
    due = jax.random.key_data(jax.random.split(jax.random.key(0))[0])
    assert_same(jax.random.key_data(aux["key"]), due)


class Normed(eqx.Module):
    norm: eqx.nn.BatchNorm

    def __call__(self, x, state):
        return jax.vmap(self.norm, axis_name="rows", in_axes=(0, None), out_axes=(0, None))(
            x, state
        )


@pytest.mark.parametrize("mode", ["ema", "batch"])
def test_equinox_batchnorm_at_inference(mode):
    model, state = eqx.nn.make_with_state(Normed)(eqx.nn.BatchNorm(2, "rows", mode=mode))
    x = jnp.stack([X, X + 1], 1)
    _, state = model(x, state)
    quiet = eqx.nn.inference_mode(model)

    def fun(model, state, x):
        output, new = model(x, state)
        return output.mean(), new

    run = window(fun, grad_fn=eqx.filter_value_and_grad)
    (_, found), _ = eqx.filter_jit(run)(quiet, state, x)
    assert_same(found, fun(quiet, state, x)[1])
