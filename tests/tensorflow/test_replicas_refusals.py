"""What is refused of several replicas, and what a fault of one of them does."""

import re

import numpy as np
import pytest
import tensorflow as tf
from tests.oracle import assert_all_close, assert_close
from tests.tensorflow.modes import uncut
from tests.tensorflow.replicated import given, local, parts, run, together, two, variable, window_of

import virtualbatch.tensorflow as vb

X = np.random.default_rng(6).normal(size=(24, 3))


def ones():
    return variable(np.ones((3, 1)))


def mean_square(kernel):
    return lambda x: tf.reduce_mean((x @ kernel) ** 2)


def refused(replica, message, error=ValueError):
    with pytest.raises(error, match=re.escape(message)):
        run(replica)(given(parts(X, (12, 12))))


def test_an_eager_call():
    kernel = ones()
    message = (
        "Several replicas must be trained in a graph. Got an eager call in a strategy of 2 "
        "replicas. Put strategy.run into a tf.function."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        two().run(
            window_of(mean_square(kernel), [kernel], microbatch_size=4),
            args=(given(parts(X, (12, 12))),),
        )


def test_sizes_that_are_to_be_planned():
    kernel = ones()
    message = (
        'microbatch_size="auto" plans one device. Got a strategy of 2 replicas. '
        "Call plan outside of it, and pass what it finds."
    )
    refused(window_of(mean_square(kernel), [kernel], microbatch_size="auto"), message)
    refused(vb.rowwise(mean_square(kernel), microbatch_size="auto"), message)
    refused(lambda x: vb.plan(mean_square(kernel), x, [kernel]), message)


def test_a_certificate_of_a_replica():
    kernel = ones()
    refused(
        lambda x: vb.certify(mean_square(kernel), x, [kernel], microbatch_size=4),
        "certify compares on one device. Got a strategy of 2 replicas. "
        "Call it outside of strategy.run.",
    )


def test_replicas_that_do_not_wait_for_each_other(monkeypatch):
    # A real one connects this process to servers.
    kind = tf.distribute.experimental.ParameterServerStrategy
    monkeypatch.setattr(tf.distribute, "get_strategy", lambda: kind.__new__(kind))
    kernel = tf.Variable(np.ones((3, 1)))
    with pytest.raises(
        ValueError,
        match=r"Replicas must train in step\. Got ParameterServerStrategyV2\. Use MirroredStrategy",
    ):
        vb.value_and_gradients(mean_square(kernel), X, [kernel], microbatch_size=4)


OUTSIDE = (
    "Each replica takes the gradients of its own rows. "
    "Got values of a strategy outside of strategy.run. Call it inside strategy.run."
)


def test_variables_of_a_strategy_in_its_scope():
    # Where TensorFlow itself has no gradients, in words of its own.
    kernel = ones()
    for verb in (vb.value_and_gradients, vb.certify):
        with two().scope(), pytest.raises(ValueError, match=re.escape(OUTSIDE)):
            verb(mean_square(kernel), X, [kernel], microbatch_size=4)
    with two().scope(), pytest.raises(ValueError, match=re.escape(OUTSIDE)):
        vb.plan(mean_square(kernel), X, [kernel])


def test_rows_of_several_replicas_outside_of_them():
    kernel = ones()
    with pytest.raises(ValueError, match=re.escape(OUTSIDE)):
        vb.value_and_gradients(
            mean_square(kernel), given(parts(X, (12, 12))), [kernel], microbatch_size=4
        )


def test_rows_of_one_device_outside_of_replicas_are_a_batch():
    kernel, alone = ones(), tf.Variable(np.ones((3, 1)))
    loss, gradients = vb.value_and_gradients(mean_square(kernel), X, [kernel], microbatch_size=4)
    due_loss, due = uncut(mean_square(alone), X, [alone])
    assert_close(loss, due_loss)
    assert_all_close([gradients[0].numpy()], due)


@pytest.mark.thorough("a refusal of TensorFlow's own")
def test_a_function_inside_of_the_replicas_function():
    # Refused by TensorFlow, in words that say what to do.
    kernel = ones()
    replica = tf.function(window_of(mean_square(kernel), [kernel], microbatch_size=4))
    refused(lambda x: replica(x), "contains a nested `@tf.function`", RuntimeError)


def test_a_function_as_the_replicas_function():
    kernel, alone = ones(), tf.Variable(np.ones((3, 1)))
    replica = tf.function(window_of(mean_square(kernel), [kernel], microbatch_size=4))
    losses, gradients = two().run(replica, args=(given(parts(X, (12, 12))),))
    loss, due = uncut(mean_square(alone), X, [alone])
    assert_close(local(losses), [loss] * 2)
    assert_all_close(together(gradients), due)


def test_aux_whose_shape_is_not_known():
    kernel = ones()

    def loss_fn(x):
        return mean_square(kernel)(x), tf.boolean_mask(x, x > 0)

    refused(
        window_of(loss_fn, [kernel], microbatch_size=4, has_aux=True),
        "A leaf of aux that replicas sum must have a static shape. "
        "Got shape (None,) and dtype float64.",
    )


def test_rows_that_differ_on_an_otherwise_empty_replica():
    kernel = ones()
    step = run(window_of(lambda batch: mean_square(kernel)(batch[0]), [kernel], microbatch_size=4))
    with pytest.raises(
        tf.errors.InvalidArgumentError,
        match=r"same number of rows\. Got rows\] \[0 5\] .*Pass arrays",
    ):
        step(given([(X[:0], X[:5]), (X, X)]))


def test_a_fault_of_one_replica_is_raised_and_the_next_window_is_right():
    kernel, alone = ones(), tf.Variable(np.ones((3, 1)))

    def loss_fn(x):
        large = tf.math.count_nonzero(x > 100)
        tf.debugging.Assert(tf.equal(large, 0), ["a row is too large"])
        return mean_square(kernel)(x)

    step = run(window_of(loss_fn, [kernel], microbatch_size=4))
    spoiled = X.copy()
    spoiled[20] = 1000
    with pytest.raises(tf.errors.InvalidArgumentError, match="a row is too large"):
        step(given(parts(spoiled, (12, 12))))
    losses, gradients = step(given(parts(X, (12, 12))))
    loss, due = uncut(mean_square(alone), X, [alone])
    assert_close(local(losses), [loss] * 2)
    assert_all_close(together(gradients), due)
    # What is not a number on one is none on all.
    spoiled[20] = np.nan
    losses, _ = step(given(parts(spoiled, (12, 12))))
    assert np.isnan(local(losses)).all()


def test_a_function_that_raises_while_it_is_traced():
    kernel = ones()
    traced = []

    def loss_fn(x):
        traced.append(x)
        if len(traced) == 2:
            raise KeyError("of the second replica")
        return mean_square(kernel)(x)

    refused(window_of(loss_fn, [kernel], microbatch_size=4), "of the second replica", KeyError)
    losses, _ = run(window_of(loss_fn, [kernel], microbatch_size=4))(given(parts(X, (12, 12))))
    assert_close(local(losses), [((X @ np.ones((3, 1))) ** 2).mean()] * 2)
