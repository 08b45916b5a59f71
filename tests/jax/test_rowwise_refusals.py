"""What `rowwise` refuses: outputs that are not those of rows, by their shapes and by a proof."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.jax.problems import MODES, in_mode

import virtualbatch.jax as vb

RANDOM = np.random.default_rng(3)


REFUSED = {
    "mean": (lambda p, x: {"mean": x.mean(0)}, r"one entry per row\. Got output\['mean'\] with"),
    "number": (lambda p, x: x.sum(), r"one entry per row\. Got output with shape \(\)"),
    "constant": (lambda p, x: (x, 3.0), r"or None\. Got output\[1\] of type float"),
    "joined": (lambda p, x: jnp.concatenate([x, x]), "Return the 2 views as outputs of their own"),
    "coincidence": (lambda p, x: x[:, :2].mean(0), r"Got output with shape \(2,\) for 4 rows"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", REFUSED)
def test_outputs_that_are_not_those_of_rows_are_refused(mode, name):
    fn, text = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=text):
        in_mode(mode, vb.rowwise(fn, microbatch_size=2, check=False))(1.0, np.ones((6, 4)))


@pytest.mark.parametrize("mode", MODES)
def test_a_structure_that_changes_is_refused(mode):
    def changing(params, x):
        return (x,) if len(x) == 2 else {"z": x}

    with pytest.raises(ValueError, match=r"Got output\[0\], and later output\['z'\]"):
        in_mode(mode, vb.rowwise(changing, microbatch_size=2, check=False))(1.0, np.ones((5, 4)))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"fn": None, "microbatch_size": 2}, "fn must be a function"),
        ({"microbatch_size": 0}, "must be a positive integer"),
        ({"microbatch_size": 2, "key_argnum": 1}, "batch_argnum and key_argnum must be different"),
    ],
)
def test_options_that_no_call_can_satisfy(options, text):
    with pytest.raises((ValueError, TypeError), match=text):
        vb.rowwise(**{"fn": jnp.multiply} | options)


def test_float8_state_is_refused():
    params = {"_overwrite_with_gradient": jnp.ones(3)}
    ours = vb.rowwise(lambda p, x: x, microbatch_size=2)
    with pytest.raises(
        ValueError, match=r"the gradient of float8 state is its new value\. Got \[0\]\[0\]\['_over"
    ):
        ours(params, jnp.ones(4))


PROVEN = {
    "centred": lambda p, x: (x - x.mean(0)) * p,
    "sorted": lambda p, x: jnp.sort(x * p, 0),
    "running": lambda p, x: jnp.cumsum(x, 0),
    "integers": lambda p, x: jnp.argsort(x[:, 0] * p),
}


@pytest.mark.thorough("certificates, one by one")
@pytest.mark.proves_itself
@pytest.mark.parametrize("name", PROVEN)
def test_the_first_call_proves_that_rows_stand_alone(name):
    ours, x = vb.rowwise(PROVEN[name], microbatch_size=4), RANDOM.normal(size=(12, 4))
    with pytest.raises(ValueError, match=r"^What rowwise wraps .*: coupled_rows at .*check=False"):
        jax.vjp(lambda p: ours(p, x), 2.0)
    # Under a trace nothing can be read.
    jax.jit(ours)(2.0, x)


@pytest.mark.proves_itself
def test_a_function_is_tried_once(caplog):
    seen = []

    def encode(params, rows):
        seen.append(len(rows["x"]))
        return rows["x"] * params

    ours = vb.rowwise(encode, microbatch_size=4)
    keys = jax.random.wrap_key_data(np.zeros((12, 2), np.uint32))
    for _ in range(2):
        ours(2.0, {"x": jnp.ones(12), "keys": keys})
    # The parts and the whole of them, then what was asked for.
    assert seen == [3, 7, 4, 4, 4]
    assert not caplog.records


def test_the_sum_that_is_tried_tells_all_entries_apart():
    ours = vb.rowwise(lambda params, batch: batch, microbatch_size=2)
    batch = {"x": jnp.ones((3, 2)), "y": jnp.ones(3)}
    program, (parameters, (_, numbers), keys) = ours.as_loss((None, batch))
    weights = jax.jit(jax.grad(lambda rows: program.fun(parameters, (rows, numbers), keys)))(batch)
    assert len({round(float(w), 6) for x in weights.values() for w in x.ravel()}) == 9


def test_what_certify_refuses_of_a_function():
    ours = vb.rowwise(lambda params, x: x, microbatch_size="auto")
    with pytest.raises(ValueError, match=r"needs a size\. Got .*'auto'"):
        vb.certify(ours)
    with pytest.raises(ValueError, match="keeps the options that it was made with"):
        vb.certify(ours, weight="sum", microbatch_size=2)


@pytest.mark.thorough("two certificates")
def test_certify_takes_the_function():
    ours = vb.rowwise(lambda params, x: x * params["w"], microbatch_size=2)
    given = {"w": jnp.asarray(2.0), "unused": jnp.ones(2)}
    found = vb.certify(ours)(given, np.arange(6.0))
    assert found.exact
    names = {"['params']['w']", "['params']['unused']", "['the outputs']"}
    assert set(found.parameters) == names
    centred = vb.rowwise(lambda params, x: x * params - x.mean(), microbatch_size="auto")
    found = vb.certify(centred, microbatch_size=2)(2.0, np.arange(6.0))
    assert [finding.kind for finding in found.findings] == ["coupled_rows"]
