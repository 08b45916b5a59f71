"""Packed windows in TensorFlow: the gradient of the padded batch, by few traces."""

from functools import partial

import numpy as np
import pytest
import tensorflow as tf
from tests import packed
from tests.oracle import EXACT, assert_all_close, tolerance
from tests.packed import MICROBATCH_TOKENS, ROWS, SUMMANDS
from tests.tiers import tiered

import virtualbatch.tensorflow as vb
from virtualbatch import pack


def problem(dtype):
    """(functions, variables, batch) in a dtype of floats."""
    variables = {name: tf.Variable(value) for name, value in packed.parameters(dtype).items()}
    functions = packed.Functions(tf.einsum, tf.nn.softmax, tf.gather, lambda x: tf.cast(x, dtype))
    return functions, variables, tensors(packed.batch(dtype))


def tensors(batch):
    return {name: tf.constant(leaf) for name, leaf in batch.items()}


def tokens(batch):
    return tf.math.count_nonzero(batch["ids"])


def arrays(loss, found):
    return [loss.numpy(), *(tf.convert_to_tensor(gradient).numpy() for gradient in found)]


def padded(loss):
    """Loss and gradients of the whole padded batch in float64."""
    functions, variables, batch = problem("float64")
    with tf.GradientTape() as tape:
        value = loss(functions, variables, batch)
    return arrays(value, tape.gradient(value, list(variables.values())))


def compiled_loss(loss, functions, variables, **options):
    """A loss that is traced once, whatever the rows and lengths."""
    traces = []
    spec = {
        "ids": tf.TensorSpec([None, None], tf.int32),
        "targets": tf.TensorSpec([None, None], variables["head"].dtype),
        "row": tf.TensorSpec([None], variables["head"].dtype),
    }

    def run(batch):
        traces.append(batch["ids"].shape)
        return loss(functions, variables, batch)

    return tf.function(run, input_signature=[spec], **options), traces


@pytest.mark.parametrize("mode", ["eager", "compiled loss", "compiled window"])
@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [
        ("float64", EXACT),
        pytest.param("float32", None, marks=pytest.mark.thorough("a further dtype")),
    ],
)
@pytest.mark.parametrize(
    "round_to", tiered([None, 4], [4], "without rounding, more shapes are compiled")
)
def test_the_gradient_is_that_of_the_padded_batch(round_to, dtype, rtol, mode):
    functions, variables, batch = problem(dtype)
    window = pack(batch, packed.lengths(), microbatch_tokens=MICROBATCH_TOKENS, round_to=round_to)
    loss = partial(packed.token_loss, functions, variables)
    if mode == "compiled loss":
        loss, _ = compiled_loss(packed.token_loss, functions, variables)

    def run(window):
        return vb.value_and_gradients(loss, window, list(variables.values()), weight=tokens)

    run = tf.function(run) if mode == "compiled window" else run
    assert len(window) > 3
    found = arrays(*run(window))
    assert_all_close(found, padded(packed.token_loss), rtol or tolerance(dtype, SUMMANDS))


def test_a_compiled_loss_is_traced_once_whatever_the_lengths():
    functions, variables, _ = problem("float32")
    loss, traces = compiled_loss(packed.token_loss, functions, variables)
    shapes = set()
    for seed in range(10):
        window = pack(
            tensors(packed.batch("float32", seed)),
            packed.lengths(seed),
            microbatch_tokens=MICROBATCH_TOKENS,
        )
        shapes |= {tuple(found["ids"].shape) for found in window}
        vb.value_and_gradients(loss, window, list(variables.values()), weight=tokens)
    assert len(shapes) > 10
    assert len(traces) == 1


def test_round_to_and_relaxed_shapes_bound_the_traces_of_a_compiled_window():
    functions, variables, _ = problem("float32")
    traces = []

    @tf.function(reduce_retracing=True)
    def run(window):
        traces.append(len(window))
        return vb.value_and_gradients(
            partial(packed.token_loss, functions, variables),
            window,
            list(variables.values()),
            weight=tokens,
        )[0]

    for seed in range(10):
        run(
            pack(
                tensors(packed.batch("float32", seed)),
                packed.lengths(seed),
                microbatch_tokens=MICROBATCH_TOKENS,
                round_to=4,
            )
        )
    # With round_to the number of micro-batches depends on the rows alone.
    assert set(traces) == {ROWS // (MICROBATCH_TOKENS // packed.LENGTH)}
    assert len(traces) <= 5


@pytest.mark.parametrize("compiled", [False, True])
def test_noise_statistics_are_refused(compiled):
    functions, variables, batch = problem("float32")
    window = pack(batch, packed.lengths(), microbatch_tokens=MICROBATCH_TOKENS)

    def run(window):
        loss = partial(packed.row_loss, functions, variables)
        return vb.value_and_gradients(loss, window, list(variables.values()), stats=True)

    with pytest.raises(ValueError, match="Noise statistics need micro-batches of random rows"):
        (tf.function(run) if compiled else run)(window)


@pytest.mark.parametrize("loss", [packed.padding_loss, packed.coupled_loss])
def test_losses_that_are_not_safe_to_pack_differ(loss):
    functions, variables, batch = problem("float64")
    window = pack(batch, packed.lengths(), microbatch_tokens=MICROBATCH_TOKENS)
    found = vb.value_and_gradients(
        partial(loss, functions, variables), window, list(variables.values())
    )
    with pytest.raises(AssertionError, match="off by"):
        assert_all_close(arrays(*found), padded(loss), 1e-3)


def test_arrays_stay_tensors_and_lengths_may_be_one():
    _, _, batch = problem("float32")
    lengths = tf.math.count_nonzero(batch["ids"], 1)
    for found in pack(batch, lengths, microbatch_tokens=MICROBATCH_TOKENS):
        assert all(tf.is_tensor(leaf) for leaf in found.values())
        assert found["ids"].dtype is tf.int32
        np.testing.assert_array_equal(
            found["targets"], batch["targets"].numpy()[found["row"].numpy().astype(int)][
                :, : found["targets"].shape[1]
            ]
        )  # fmt: skip


def test_lengths_inside_a_graph_are_refused():
    @tf.function
    def run(ids):
        return pack(ids, tf.math.count_nonzero(ids, 1), microbatch_tokens=9)[0]

    with pytest.raises(ValueError, match=r"by the values of their lengths\. Got lengths inside a"):
        run(tf.ones([3, 4], tf.int32))


@pytest.mark.parametrize(
    "leaf", [tf.ragged.constant([[1], [2, 3]]), tf.sparse.eye(2)], ids=["ragged", "sparse"]
)
def test_arrays_that_are_not_dense_are_refused(leaf):
    with pytest.raises(TypeError, match=r"pack sorts dense arrays .* Got batch\['x'\] of type"):
        pack({"ids": tf.ones([2, 4], tf.int32), "x": leaf}, [1, 2], microbatch_tokens=4)
