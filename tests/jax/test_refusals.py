"""Bad input: a clear error, before anything is computed; texts are those of the other engines."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.jax.problems import MODES

import virtualbatch.jax as vb

X = np.ones((6, 2))
W = np.ones(2)


class Call:
    """A call that would work, whose arguments can be changed to ones that do not."""

    def __init__(self, **changes):
        self.calls = 0
        self.batch = changes.pop("batch", X)
        self.options = {"fun": self.loss, "microbatch_size": 2} | changes

    def loss(self, weights, batch, *rest):
        self.calls += 1
        return jnp.mean(jax.tree.leaves(batch)[0] @ weights)

    def run(self, mode):
        options = dict(self.options)
        if mode == "jit":
            # Whatever the batch is, the trace sees it as it is.
            return jax.jit(lambda w: vb.value_and_grad(**options)(w, self.batch))(W)
        return vb.value_and_grad(**options)(W, self.batch)

    def refused(self, mode, error, text, calls=0):
        with pytest.raises(error, match=text):
            self.run(mode)
        if calls is not None:
            assert self.calls == calls
        assert (W == 1).all()


@pytest.mark.parametrize("mode", MODES)
def test_the_call_works_unchanged(mode):
    assert float(Call().run(mode)[0]) == 2.0


NO_SIZE = {"microbatch_size": None}
SIZES = {
    "none": (NO_SIZE, r"A batch needs a size .*Got neither microbatch_size nor.*Pass microbatch_s"),
    "zero": ({"microbatch_size": 0}, r"microbatch_size must be a positive .* microbatch_size=0\."),
    "negative": ({"microbatch_size": -1}, r"Got microbatch_size=-1\."),
    "fraction": ({"microbatch_size": 2.5}, r"Got microbatch_size=2\.5\."),
    "boolean": ({"microbatch_size": True}, r"Got microbatch_size=True\."),
    "text": ({"microbatch_size": "big"}, r"Got microbatch_size='big'\."),
    "array": ({"microbatch_size": np.array(2)}, r"Got microbatch_size=array\(2\)\."),
    "no steps": (
        NO_SIZE | {"accumulation_steps": 0},
        r"accumulation_steps must be a positive integer\. Got accumulation_steps=0\.",
    ),
    "disagree": (
        {"accumulation_steps": 2},
        r"same cut\. Got microbatch_size=2 and accumulation_steps=2 for 6 rows / 2 = 3 micro-batch",
    ),
    "rows differ": (
        {"batch": {"x": X, "y": [X[:5]]}},
        r"same number of rows\. Got 6 rows in batch\['x'\] and 5 rows in batch\['y'\]\[0\]\.",
    ),
    "wrong axis": ({"batch": (X, np.ones((3, 6)))}, r"Got 6 rows in batch\[0\] and 3 rows"),
    "no rows": ({"batch": (X[:0], X[:0])}, r"at least one row\. Got 0 rows in batch\[0\]\."),
    "scalar": ({"batch": {"x": X, "s": np.array(1)}}, r"Got the scalar batch\['s'\]\."),
    "no array": ({"batch": {"a": None, "b": 3}}, r"must hold at least one array\. Got none\."),
    "empty window": (
        NO_SIZE | {"batch": vb.Window([])},
        r"must hold at least one micro-batch\. Got an empty Window\.",
    ),
    "window of nothing": (
        NO_SIZE | {"batch": vb.Window([X, None])},
        r"at least one array\. Got no",
    ),
    "window and size": (
        {"batch": vb.Window([X])},
        r"already cut\. Got microbatch_size=2 and accumulation_steps=None with a Window\. Leave",
    ),
    "window and steps": (
        NO_SIZE | {"batch": vb.Window([X]), "accumulation_steps": 2},
        r"Got microbatch_size=None and accumulation_steps=2 with a Window\. Leave both out\.",
    ),
    "rows differ in a window": (
        NO_SIZE | {"batch": vb.Window([(X, X), (X, X[:4])])},
        r"Got 6 rows in window\[1\]\[0\] and 4 rows in window\[1\]\[1\]\.",
    ),
    "structures": (
        NO_SIZE | {"batch": vb.Window([{"x": X}, {"y": X}])},
        r"same structure\. Got microbatch\['x'\] an array in window\[0\] and "
        r"microbatch\['y'\] an array in window\[1\]\. Make them with the same collate function\.",
    ),
    "leaves": (
        NO_SIZE | {"batch": vb.Window([{"x": X, "m": X}, {"x": X, "m": 3}])},
        r"microbatch\['m'\] of type int.* in window\[1\]\.",
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SIZES)
def test_sizes_and_rows(name, mode):
    changes, text = SIZES[name]
    Call(**changes).refused(mode, ValueError, text)


def test_an_automatic_size_with_a_number_of_micro_batches():
    Call(microbatch_size="auto", accumulation_steps=2).refused(
        "eager", ValueError, "Leave one of them out"
    )


POSITION = r"must hold positions of arguments, 0 or more\. Got {}\. Count the arguments of fun"
OPTIONS = {
    "fun": ({"fun": 3}, TypeError, r"fun must be a function\. Got fun=3\. Pass a function\."),
    "no fun": ({"fun": None}, TypeError, r"fun must be a function\. Got fun=None\."),
    "weight": (
        {"weight": 4.0},
        TypeError,
        r"weight must be a function of one batch\. Got weight=4\.0\.",
    ),
    "grad_fn": ({"grad_fn": True}, TypeError, r"grad_fn must be a function\. Got grad_fn=True\."),
    "negative": ({"argnums": -1}, TypeError, POSITION.format("argnums=-1")),
    "one is negative": ({"argnums": (0, -1)}, TypeError, POSITION.format(r"argnums=\(0, -1\)")),
    "boolean": ({"argnums": True}, TypeError, POSITION.format("argnums=True")),
    "name": ({"argnums": "params"}, TypeError, POSITION.format("argnums='params'")),
    "fraction": ({"batch_argnum": 1.0}, TypeError, POSITION.format(r"batch_argnum=1\.0")),
    "no batch": ({"batch_argnum": ()}, TypeError, POSITION.format(r"batch_argnum=\(\)")),
    "a batch is negative": (
        {"batch_argnum": (1, -2)},
        TypeError,
        POSITION.format(r"batch_argnum=\(1, -2\)"),
    ),
    "a batch twice": (
        {"batch_argnum": (1, 1)},
        ValueError,
        r"Got argnums=0, batch_argnum=\(1, 1\)",
    ),
    "a batch is the key": (
        {"batch_argnum": (1, 2), "key_argnum": 2},
        ValueError,
        r"must be different arguments\.",
    ),
    "key": ({"key_argnum": -2}, TypeError, POSITION.format("key_argnum=-2")),
    "batch is differentiated": (
        {"argnums": (0, 1)},
        ValueError,
        r"must be different arguments\. Got argnums=\(0, 1\), batch_argnum=1 and key_argnum=None\.",
    ),
    "key is differentiated": ({"key_argnum": 0}, ValueError, r"and key_argnum=0\. Differentiate"),
    "key is the batch": ({"key_argnum": 1}, ValueError, r"batch_argnum=1 and key_argnum=1\."),
}


@pytest.mark.parametrize("verb", [vb.value_and_grad, vb.plan, vb.certify])
def test_arguments_of_the_loss_beside_the_loss(verb):
    with pytest.raises(TypeError, match=r"pass the arguments themselves to the function that this"):
        verb(Call().options["fun"], {"w": 1.0}, [1.0, 2.0])


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    changes, error, text = OPTIONS[name]
    with pytest.raises(error, match=text):
        vb.value_and_grad(**Call(**changes).options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["batch_argnum", "key_argnum"])
def test_positions_that_the_call_lacks(name, mode):
    Call(**{name: 3}).refused(
        mode,
        TypeError,
        rf"{name} must be the position of a positional argument\. "
        rf"Got {name}=3 and 2 positional arguments\. Pass that argument by position\.",
    )


def test_an_axis_that_there_is_not():
    text = r"Got axis_name='rows' outside of shard_map and no mesh\. Call it under jax\.set_mesh"
    for mode in MODES:
        with pytest.raises(ValueError, match=text):
            Call(axis_name="rows").run(mode)


FORMS = {
    "vector": (lambda b: jnp.ones(2), r"Got shape \(2,\) for term 'loss'\. Reduce it"),
    "NumPy vector": (lambda b: np.ones(3), r"Got shape \(3,\) for term 'loss'\."),
    "list": (lambda b: [1, 2], r"Got \[1, 2\] for term 'loss'\."),
    "None": (lambda b: None, r"one number per micro-batch and term\. Got None for term 'loss'"),
    "text": (lambda b: "3", r"Got '3' for term 'loss'"),
    "vector of a term": (lambda b: {"a": np.ones(2)}, r"Got shape \(2,\) for term 'a'\."),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FORMS)
def test_weights_that_are_no_numbers(name, mode):
    weight, text = FORMS[name]
    Call(weight=weight).refused(mode, ValueError, text)


VALUES = {
    "negative": (lambda b: b.sum() - 5, r"0 or more\. Got weight=-1\.0 for micro-batch 0\. Return"),
    "NaN": (lambda b: b.sum() * np.nan, r"Got weight=nan for micro-batch 0\."),
    "infinite": (lambda b: float("inf"), r"Got weight=inf for micro-batch 0\."),
    "later": (iter([1, 1, -3]).__next__, r"Got weight=-3\.0 for micro-batch 2\."),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_of_weights_are_read_where_they_can_be(name):
    weight, text = VALUES[name]
    Call(weight=(lambda b: weight()) if name == "later" else weight).refused(
        "eager", ValueError, text
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("first", [None, 1.0])
def test_a_term_is_independent_of_the_rows_always_or_never(first, mode):
    def weight(batch):
        return {"loss": first if len(batch) == 4 else {None: 1.0}.get(first)}

    call = Call(**NO_SIZE, batch=vb.Window([X[:4], X[4:]]), weight=weight)
    text = r"same terms for every micro-batch, None for the same ones\. Got .* and later .*Return 0"
    call.refused(mode, ValueError, text)


TERMS = [
    (lambda b: {"a": 1}, r"Got loss terms \['a', 'b'\] and weight terms \['a'\]\."),
    (lambda b: {"a": 1, "c": 1}, r"and weight terms \['a', 'c'\]\. Return one weight"),
    (lambda b: 1, r"and weight terms \['loss'\]\."),
    (lambda b: {}, r"and weight terms \[\]\."),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("weight", "text"), TERMS)
def test_weights_of_other_terms(weight, text, mode):
    call = Call(weight=weight)
    call.options["fun"] = lambda w, b: {"a": call.loss(w, b), "b": w.sum()}
    call.refused(mode, ValueError, text, calls=None)


@pytest.mark.parametrize("mode", MODES)
def test_weights_of_terms_for_a_loss_without_terms(mode):
    call = Call(weight=lambda b: {"a": 1})
    call.refused(
        mode, ValueError, r"Got loss terms \['loss'\] and weight terms \['a'\]\.", calls=None
    )


LOSSES = {
    "one per row": (
        lambda w: w * 1,
        ValueError,
        r"scalar mean\. Got .* with shape \(2,\)\. Reduce",
    ),
    "one row": (lambda w: w[:1], ValueError, r"with shape \(1,\)\."),
    "one in a list": (lambda w: [w[0]], TypeError, r"Got loss_fn\(batch\) of type list"),
    "number": (lambda w: 3.0, TypeError, r"must be a scalar tensor.* Got .* of type float"),
    "nothing": (lambda w: None, TypeError, r"of type NoneType"),
    "pair": (lambda w: (w[0], 1), TypeError, r"of type tuple\. .*pass has_aux=True"),
    "no terms": (lambda w: {}, ValueError, r"at least one term\. Got an empty dict\."),
    "term of rows": (
        lambda w: {"a": w[0], "b": w},
        ValueError,
        r"\['b'\] with shape \(2,\)",
    ),
    "integer": (lambda w: w[0].astype(int), TypeError, r"a floating dtype\. Got int64\. Cast"),
    "boolean": (lambda w: w[0] > 1, TypeError, r"floating dtype\. Got bool\."),
    "complex": (lambda w: w[0] * 1j, TypeError, r"floating dtype\. Got complex128\."),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_are_no_mean(name, mode):
    result, error, text = LOSSES[name]
    Call(fun=lambda w, b: result(jnp.asarray(w))).refused(mode, error, text)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("result", "got"), [(lambda x: x, ""), (lambda x: (x, 1, 2), "tuple")])
def test_aux_without_a_pair(result, got, mode):
    call = Call(fun=lambda w, b: result(jnp.mean(b @ w)), has_aux=True)
    call.refused(mode, TypeError, rf"must return \(loss, aux\)\. Got \w*{got}\. Return a pair")


@pytest.mark.parametrize("mode", MODES)
def test_an_error_of_the_loss_is_passed_on(mode):
    def fun(weights, batch):
        raise RuntimeError("mine")

    Call(fun=fun).refused(mode, RuntimeError, "mine")
    assert float(Call().run(mode)[0]) == 2.0


def test_jit_sees_numbers_of_a_batch_as_arrays_and_says_what_to_do():
    run = jax.jit(functools.partial(vb.value_and_grad(Call().loss, microbatch_size=2), W))
    with pytest.raises(ValueError, match=r"Got the scalar batch\['scale'\]\..*pass it .*closure"):
        run({"x": X, "scale": 3.0})
