"""What `rowwise` refuses, before it gives anything back; and what proves that rows stand alone."""

import logging

import keras
import numpy as np
import pytest
import tensorflow as tf
from tests.tiers import tiered

import virtualbatch.tensorflow as vb

ROWS, SIZE = 8, 4
KERNEL = np.random.default_rng(0).normal(size=(4, 3))


def batch():
    return tf.constant(np.random.default_rng(1).normal(size=(ROWS, 4)))


def run(fn, compiled=False, microbatch_size=SIZE, given=None):
    """The gradient of a kernel for a loss of `fn(batch, kernel)`."""
    kernel = tf.Variable(KERNEL)

    def call(batch):
        encode = vb.rowwise(lambda batch: fn(batch, kernel), microbatch_size=microbatch_size)
        with tf.GradientTape() as tape:
            loss = sum(tf.math.reduce_std(x) for x in tf.nest.flatten(encode(batch)))
        return tape.gradient(loss, kernel)

    call = tf.function(call) if compiled else call
    return call(batch() if given is None else given)


def changing(batch, kernel):
    return {"z": batch @ kernel} if batch.shape[0] == 3 else ({"z": batch @ kernel},)


@pytest.mark.parametrize(
    ("fn", "said"),
    [
        (
            lambda x, k: {"mean": tf.reduce_mean(x @ k, 0)},
            r"must have one entry per row\. Got output\['mean'\] with shape \(3,\) for 4 rows\. "
            r"Return one entry per row, and reduce over rows in the loss\.",
        ),
        (
            lambda x, k: [x @ k, tf.reduce_sum(x @ k)],
            r"one entry per row\. Got output\[1\] with shape \(\) for 4 rows",
        ),
        (
            lambda x, k: tf.concat([x @ k, x @ k], 0),
            r"Got output with shape \(8, 3\) for 4 rows\. Return the 2 views",
        ),
        (lambda x, k: [x @ k, 3.0], r"must be arrays .* Got output\[1\] of type float"),
        (
            lambda x, k: tf.RaggedTensor.from_tensor(x @ k),
            "must be dense tensors. Got output of type RaggedTensor",
        ),
        (
            lambda x, k: tf.nn.dropout(x @ k, 0.5),
            r"drawn again\. Got the operations RandomUniform, whose state TensorFlow keeps",
        ),
    ],
    ids=["mean", "number", "joined", "no array", "ragged", "hidden random state"],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_outputs_that_are_refused(fn, said, compiled):
    with pytest.raises((ValueError, TypeError), match=said):
        run(fn, compiled)


def test_a_structure_that_changes_is_refused():
    rows = tf.constant(np.ones([5, 4]))
    for compiled in (False, True):
        with pytest.raises(ValueError, match="must return the same structure for every"):
            run(changing, compiled, microbatch_size=3, given=rows)


def test_outputs_of_open_rows_are_refused_as_the_graph_runs():
    kernel = tf.Variable(KERNEL)
    encode = vb.rowwise(lambda x: tf.concat([x @ kernel] * 2, 0), microbatch_size=2)
    call = tf.function(encode, input_signature=[tf.TensorSpec([None, 4], tf.float64)])
    with pytest.raises(tf.errors.InvalidArgumentError, match="must have one entry per row"):
        call(batch())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_tensor_from_outside_that_takes_a_gradient_is_refused(compiled):
    kernel = tf.Variable(KERNEL)

    def call(batch):
        with tf.GradientTape() as tape:
            temperature = tf.exp(kernel[0, 0])
            loss = tf.reduce_sum(
                vb.rowwise(lambda x: x @ kernel * temperature, microbatch_size=2)(batch)
            )
        return tape.gradient(loss, kernel)

    with pytest.raises(ValueError, match=r"computed outside of it with a gradient.*\n?.*argument"):
        (tf.function(call) if compiled else call)(batch())


def test_the_same_where_the_tape_is_outside_of_the_graph():
    kernel = tf.Variable(KERNEL)

    @tf.function
    def call(batch):
        temperature = tf.exp(kernel[0, 0])
        return vb.rowwise(lambda x: x @ kernel * temperature, microbatch_size=2)(batch)

    with (
        pytest.raises(ValueError, match="computed outside of it with a gradient"),
        tf.GradientTape(),
    ):
        call(batch())


def test_arguments_that_are_refused():
    with pytest.raises(TypeError, match=r"fn must be a function of a batch\. Got fn=3"):
        vb.rowwise(3, microbatch_size=2)
    with pytest.raises(ValueError, match="microbatch_size must be"):
        vb.rowwise(lambda x: x, microbatch_size=0)
    with tf.GradientTape():
        with pytest.raises(ValueError, match="A batch needs a size"):
            vb.rowwise(lambda x: x)(batch())
        with pytest.raises(ValueError, match="A Window is already cut"):
            vb.rowwise(lambda x: x, microbatch_size=2)(vb.Window([batch()]))


@pytest.mark.parametrize("compiled", [False, True])
def test_forward_mode_is_refused(compiled):
    kernel = tf.Variable(KERNEL)
    encode = vb.rowwise(lambda x: x @ kernel, microbatch_size=2)
    with (
        tf.autodiff.ForwardAccumulator(kernel, tf.ones_like(kernel)),
        pytest.raises(ValueError, match="Nest two tapes"),
    ):
        (tf.function(encode) if compiled else encode)(batch())


COUPLED = {
    "centred": lambda x, k: x @ k - tf.reduce_mean(x @ k, 0),
    "without a variable": lambda x, k: x - tf.reduce_mean(x, 0),
    "sorted": lambda x, k: tf.sort(x @ k, 0),
    "a mean by chance": lambda x, k: tf.reduce_mean(tf.concat([x @ k, (x @ k)[:, :1]], 1), 0),
}


@pytest.mark.proves_itself
@pytest.mark.parametrize(
    "name",
    tiered(COUPLED, ["centred", "a mean by chance"], "each is certified, which takes a second"),
)
def test_a_function_that_couples_rows_is_refused(name):
    rule = "one entry per row" if name == "a mean by chance" else "each row from that row alone"
    with pytest.raises(ValueError, match=rule):
        run(COUPLED[name])


@pytest.mark.proves_itself
def test_the_proof_is_made_once_and_changes_nothing(caplog):
    model = keras.Sequential([keras.layers.Dense(3), keras.layers.Dropout(0.5)])
    model(tf.zeros([1, 4]))
    seed = model.layers[1].seed_generator.state
    start, calls = seed.numpy(), []
    of_model = {id(x.value) for x in model.trainable_variables}
    rows = tf.cast(batch(), tf.float32)

    def fn(x):
        calls.append(None)
        return model(x, training=True)

    def states(encode):
        found = []
        for _ in range(2):
            calls.clear()
            with tf.GradientTape() as tape:
                loss = tf.math.reduce_std(encode(rows))
            # It hears of the function's variables only.
            assert {*map(id, tape.watched_variables())} == of_model
            gradients = tape.gradient(loss, model.trainable_variables)
            found += [len(calls), seed.numpy().tolist(), [x.numpy().tolist() for x in gradients]]
        seed.assign(start)
        return found

    with caplog.at_level(logging.WARNING, "virtualbatch"):
        proved = states(vb.rowwise(fn, microbatch_size=SIZE))
    plain = states(vb.rowwise(fn, microbatch_size=SIZE, check=False))
    assert not caplog.messages
    # Once more for the trace; the rest is the proof, which is not made again.
    assert plain[0] == 5
    assert proved[0] > 10
    assert proved[3] == plain[3] == 4
    assert [*proved[1:3], *proved[4:]] == [*plain[1:3], *plain[4:]]


@pytest.mark.thorough("the same proof in another dtype")
@pytest.mark.proves_itself
# NumPy warns of how random numbers in bfloat16 are kept.
@pytest.mark.filterwarnings("default::DeprecationWarning")
def test_a_proof_in_half_precision_changes_nothing(caplog):
    model = keras.Sequential(
        [keras.layers.Dense(3, dtype="bfloat16"), keras.layers.Dropout(0.5, dtype="bfloat16")]
    )
    model(tf.zeros([1, 4]))
    seed = model.layers[1].seed_generator.state
    start = seed.numpy()
    with caplog.at_level(logging.WARNING, "virtualbatch"), tf.GradientTape():
        vb.rowwise(lambda x: model(x, training=True), microbatch_size=SIZE)(batch())
    assert not caplog.messages
    # Each of two micro-batches has drawn once.
    once = seed.numpy() - start
    seed.assign(start)
    model(batch()[:4], training=True)
    model(batch()[4:], training=True)
    assert (seed.numpy() - start == once).all()


@pytest.mark.proves_itself
def test_batch_normalisation_is_said_and_not_refused(caplog):
    layer = keras.layers.BatchNormalization(dtype="float64")
    layer(tf.zeros([2, 3], tf.float64))
    with caplog.at_level(logging.WARNING, "virtualbatch"):
        found = run(lambda x, k: layer(x @ k, training=True))
    assert found is not None
    (said,) = caplog.messages
    assert "BatchNormalization in training mode normalises each micro-batch" in said


def test_a_certificate_of_a_rowwise_function():
    kernel = tf.Variable(KERNEL)
    exact = vb.rowwise(lambda x: {"z": tf.tanh(x @ kernel)}, microbatch_size=3)
    found = vb.certify(exact, batch(), [kernel])
    assert found.exact
    assert len(found.parameters) == 2
    wrong = vb.rowwise(lambda x: x @ kernel - tf.reduce_mean(x @ kernel, 0))
    found = vb.certify(wrong, batch(), [kernel], microbatch_size=3)
    assert not found.exact
    assert found.findings[0].kind == "coupled_rows"
    assert "test_rowwise_refusals.py" in found.findings[0].where
    with pytest.raises(ValueError, match="whose outputs have none"):
        vb.certify(vb.rowwise(lambda x: x > 0, microbatch_size=2), batch(), [kernel])
