"""Inside tf.function: one loop, one trace per micro-batch shape, and the user's Python."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from tests.oracle import assert_close
from tests.tensorflow.modes import TIERED, compiled, open_rows
from tests.tiers import tiered

import virtualbatch.tensorflow as vb


def count_of(mode, batch, **options):
    """How often the loss and the outer function are traced over three calls."""
    variable = tf.Variable(np.float64(1))
    traced = []

    def loss_fn(x):
        traced.append(x.shape)
        loss = tf.reduce_mean(x) * variable
        return (loss, x[:, 0]) if options.get("has_aux") else loss

    def train(batch):
        return vb.value_and_gradients(loss_fn, batch, [variable], **options)

    run = compiled(mode, train, batch)
    for _ in range(3):
        run(tf.nest.map_structure(lambda x: x + 1, batch))
    return len(traced), run.experimental_get_tracing_count()


def ones(*rows):
    window = vb.Window(tf.ones([n, 2], tf.float64) for n in rows)
    return window if len(rows) > 1 else window[0]


@pytest.mark.parametrize(
    "mode", tiered(["static", "jit"], ["static"], "XLA takes seconds for a program")
)
@pytest.mark.parametrize(
    ("batch", "options", "shapes"),
    [
        (ones(12), {"microbatch_size": 4}, 1),
        (ones(10), {"microbatch_size": 4}, 2),
        (ones(4), {"microbatch_size": 4}, 1),
        (ones(10), {"accumulation_steps": 100}, 1),
        (ones(12), {"microbatch_size": 4, "weight": lambda x: tf.reduce_sum(x)}, 1),
        # The shapes of aux are judged at another number of rows, which a remainder has already.
        (ones(12), {"microbatch_size": 4, "has_aux": True}, 2),
        (ones(10), {"microbatch_size": 4, "has_aux": True}, 2),
        (ones(4, 4, 4), {}, 1),
        (ones(4, 4, 2), {}, 2),
        (ones(4, 2, 4, 2), {}, 2),
    ],
)
def test_the_loss_is_traced_once_per_shape(batch, options, shapes, mode):
    assert count_of(mode, batch, **options) == (shapes, 1)


@pytest.mark.parametrize(
    ("options", "traces"),
    [
        ({"microbatch_size": 4}, 1),
        ({"accumulation_steps": 3}, 1),
        ({"microbatch_size": 4, "weight": lambda x: tf.reduce_sum(x)}, 1),
        ({"microbatch_size": 4, "has_aux": True}, 2),
    ],
)
def test_open_rows_need_one_trace_for_every_size(options, traces):
    assert count_of("dynamic", ones(10), **options) == (traces, 1)


def test_the_weight_is_traced_once_per_shape():
    traced = []

    def weight(x):
        traced.append(x.shape)
        return tf.shape(x)[0]

    assert count_of("static", ones(10), microbatch_size=4, weight=weight) == (2, 1)
    assert traced == [(4, 2), (2, 2)]


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_the_graph_does_not_grow_with_the_micro_batches(mode):
    variable = tf.Variable(np.float64(1))

    def operations(rows):
        def train(x):
            return vb.value_and_gradients(
                lambda x: tf.reduce_mean(x) * variable,
                x,
                [variable],
                microbatch_size=2,
                weight=lambda x: tf.shape(x)[0],
            )

        x = tf.ones([rows, 2], tf.float64)
        graph = compiled(mode, train, x).get_concrete_function(x).graph
        return [operation.type for operation in graph.get_operations()]

    few, many = operations(6), operations(600)
    assert few == many
    # One loop over the weights and one over the gradients.
    assert [kind for kind in many if "While" in kind] == ["StatelessWhile", "While"]


def test_equal_micro_batches_of_a_window_are_one_loop():
    variable = tf.Variable(np.float64(1))

    @tf.function
    def train(window):
        return vb.value_and_gradients(lambda x: tf.reduce_mean(x) * variable, window, [variable])

    graph = train.get_concrete_function(ones(*[2] * 30)).graph
    kinds = [operation.type for operation in graph.get_operations()]
    assert kinds.count("While") == 1
    assert kinds.count("StatefulPartitionedCall") == 1


def test_one_function_serves_any_number_of_rows():
    variable = tf.Variable(np.float64(1))

    def train(x):
        return vb.value_and_gradients(
            lambda x: tf.reduce_mean(x) * variable, x, [variable], microbatch_size=4
        )

    run = compiled("dynamic", train, ones(4))
    for rows in (1, 3, 4, 5, 8, 9, 130):
        x = np.random.default_rng(rows).normal(size=(rows, 2))
        loss, (gradient,) = run(x)
        assert_close([loss, gradient], [x.mean()] * 2)


@pytest.mark.parametrize(
    "mode", tiered(["static", "dynamic", "jit"], ["dynamic"], "further programs")
)
def test_python_control_flow_of_the_user_is_converted(mode):
    variable = tf.Variable(np.float64(1))

    def loss_fn(x):
        total = tf.constant(0.0, tf.float64)
        if tf.reduce_sum(x) > 0:
            total = total + tf.reduce_mean(x) * variable
        else:
            total = total - tf.reduce_mean(x) * variable * 10
        for i in tf.range(3):
            total += tf.cast(i, tf.float64) * variable
        return total

    def weight(x):
        count = tf.constant(1.0)
        if tf.reduce_sum(x) > 0:
            count += 2.0
        return count

    def train(x):
        return vb.value_and_gradients(loss_fn, x, [variable], microbatch_size=1, weight=weight)

    x = tf.constant([[2.0], [-4.0]], tf.float64)
    loss, (gradient,) = compiled(mode, train, x)(x)
    due = 0.75 * 2 + 0.25 * 40 + 3
    assert_close([loss, gradient], [due, due])


def test_a_function_without_autograph_stays_without_it():
    variable = tf.Variable(np.float64(1))

    def loss_fn(x):
        if tf.reduce_sum(x) > 0:
            return tf.reduce_mean(x) * variable
        return variable

    @tf.function(autograph=False)
    def train(x):
        return vb.value_and_gradients(loss_fn, x, [variable], microbatch_size=1)

    with pytest.raises(tf.errors.OperatorNotAllowedInGraphError):
        train(tf.ones([2]))


class Callables:
    def __call__(self, x, variable):
        return tf.reduce_mean(x) * variable

    def method(self, x, variable):
        return tf.reduce_mean(x) * variable


@pytest.mark.parametrize("mode", ["eager", "static"])
@pytest.mark.parametrize(
    "function",
    [Callables(), Callables().method, tf.function(Callables().method)],
    ids=["instance", "method", "tf.function"],
)
def test_any_callable_is_a_loss(function, mode):
    variable = tf.Variable(np.float64(1))
    loss_fn = functools.partial(function, variable=variable)

    def train(x):
        return vb.value_and_gradients(loss_fn, x, [variable], microbatch_size=2)

    x = tf.constant([1.0, 2, 6], tf.float64)
    assert_close(compiled(mode, train, x)(x)[1][0], 3.0)


def test_losses_and_weights_may_close_over_tensors_of_the_graph():
    variable = tf.Variable(np.float64(1))

    @tf.function
    def train(x, temperature):
        scale = temperature * 2

        def loss_fn(x):
            return tf.reduce_mean(x) * variable * scale, x * scale

        def weight(x):
            return tf.cast(tf.shape(x)[0], tf.float64) * scale

        total = tf.constant(0.0, tf.float64)
        for _ in tf.range(2):
            (_, aux), (gradient,) = vb.value_and_gradients(
                loss_fn, x, [variable], microbatch_size=2, weight=weight, has_aux=True
            )
            total += gradient
        return total, aux

    x = tf.constant([1.0, 2, 6], tf.float64)
    total, aux = train(x, tf.constant(0.5, tf.float64))
    assert_close(total, 6.0)
    assert_close(aux, x)


@pytest.mark.parametrize("mode", TIERED)
def test_state_of_the_loss_changes_once_per_micro_batch_and_in_order(mode):
    variable, seen = tf.Variable(np.float64(1)), tf.Variable(np.float64(0))

    def loss_fn(x):
        # Order matters: the digits of the rows, read from first to last.
        seen.assign(seen * 10 + tf.reduce_sum(x))
        return tf.reduce_mean(x) * variable

    def train(x):
        return vb.value_and_gradients(loss_fn, x, [variable], microbatch_size=2)

    x = tf.constant([1.0, 0, 2, 0, 3, 0, 4], tf.float64)
    compiled(mode, train, x)(x)
    assert float(seen) == 1234


def test_functions_that_are_run_eagerly():
    variable = tf.Variable(np.float64(1))

    @tf.function
    def train(x):
        return vb.value_and_gradients(
            lambda x: tf.reduce_mean(x) * variable, x, [variable], microbatch_size=2
        )

    tf.config.run_functions_eagerly(True)
    try:
        _, (gradient,) = train(tf.constant([1.0, 2, 6], tf.float64))
    finally:
        tf.config.run_functions_eagerly(False)
    assert_close(gradient, 3.0)


@pytest.mark.parametrize("shape", tiered([(), (1,), (1, 1)], [(1,)], "further shapes"))
@pytest.mark.parametrize("size", tiered([1, 2, 8], [2], "further cuts"))
def test_broadcast_variables_keep_their_shape_in_the_loop(shape, size):
    # The static shape of such a gradient is easily lost with open rows.
    variable = tf.Variable(np.ones(shape))

    def train(x):
        return vb.value_and_gradients(
            lambda x: tf.reduce_mean((x + variable) ** 2), x, [variable], microbatch_size=size
        )

    x = tf.constant([[1.0], [2.0], [3.0]], tf.float64)
    run = tf.function(train, input_signature=[open_rows(x)])
    _, (gradient,) = run(x)
    assert_close(gradient, np.full(shape, 6.0))


def test_a_loss_of_unknown_rank():
    variable = tf.Variable(np.float64(1))

    def loss_fn(x):
        return tf.py_function(tf.reduce_mean, [x], tf.float64) * variable

    @tf.function
    def train(x):
        return vb.value_and_gradients(loss_fn, x, [variable], microbatch_size=2)

    loss, (gradient,) = train(tf.constant([1.0, 2, 6], tf.float64))
    assert_close([loss, gradient], [3.0, 3.0])


def test_a_loss_of_unknown_rank_that_is_no_scalar_is_refused_at_run_time():
    variable = tf.Variable(np.float64(1))

    @tf.function
    def train(x):
        return vb.value_and_gradients(
            lambda x: tf.py_function(tf.identity, [x], tf.float64) * variable,
            x,
            [variable],
            microbatch_size=2,
        )

    with pytest.raises(tf.errors.InvalidArgumentError, match="not compatible with expected shape"):
        train(tf.constant([1.0, 2, 6], tf.float64))


def test_a_batch_of_unknown_rank():
    variable = tf.Variable(np.float64(1))

    @tf.function(input_signature=[tf.TensorSpec(None, tf.float64)])
    def train(x):
        return vb.value_and_gradients(
            lambda x: tf.reduce_mean(x) * variable, x, [variable], microbatch_size=2
        )

    assert_close(train(tf.constant([[1.0], [2], [6]], tf.float64))[1][0], 3.0)


def test_a_step_that_reads_no_row_does_not_run_where_rows_are_refused():
    calls, variable = tf.Variable(0), tf.Variable(1.0)
    spec = tf.TensorSpec([None, 1])

    @tf.function(input_signature=[{"x": spec, "y": spec}])
    def train(batch):
        def loss_fn(batch):
            calls.assign_add(1)
            return tf.reduce_mean(batch["x"]) * variable

        return vb.value_and_gradients(loss_fn, batch, [variable], microbatch_size=2)

    train({"x": tf.ones([4, 1]), "y": tf.ones([4, 1])})
    assert calls.numpy() == 2
    for _ in range(10):
        with pytest.raises(tf.errors.InvalidArgumentError):
            train({"x": tf.ones([4, 1]), "y": tf.ones([3, 1])})
    assert calls.numpy() == 2
