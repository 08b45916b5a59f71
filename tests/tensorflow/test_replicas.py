"""The law inside `strategy.run`: whatever rows each replica has, all get the uncut batch's."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tests.oracle import assert_all_close, assert_close
from tests.replicas import BY_HAND, Case
from tests.tensorflow.modes import uncut
from tests.tensorflow.replicated import (
    CUTS,
    DEVICES,
    collectives,
    given,
    local,
    open_rows,
    parts,
    run,
    three_terms,
    together,
    two,
    variable,
    window_of,
)
from tests.tiers import tiered

import virtualbatch.tensorflow as vb

X = np.random.default_rng(3).normal(size=(24, 3))


def assert_by_hand(cases, size):
    """One graph for any number of rows on each replica, and any penalty."""
    w, factor = variable(1.0), variable(0.0)

    def terms(batch):
        mean = tf.reduce_sum(batch["mask"] * w * batch["x"]) / tf.reduce_sum(batch["mask"])
        return {"mean": mean, "penalty": factor * w**2}

    def weight(batch):
        return {"mean": tf.reduce_sum(batch["mask"]), "penalty": None}

    numbers = tf.zeros([2], tf.float64)
    spec = open_rows({"x": numbers, "mask": numbers})
    step = run(window_of(terms, w, microbatch_size=size, weight=weight), spec)
    for case in cases:
        factor.assign(case.factor)
        rows = [
            {"x": np.asarray(x, np.float64), "mask": np.asarray(mask, np.float64)}
            for x, mask in zip(case.x, case.mask, strict=True)
        ]
        losses, gradients = step(given(rows))
        assert_close(local(losses), [case.loss] * 2)
        assert_close(together(gradients)[0], case.gradient)


def test_one_parameter_by_hand():
    # In a graph a negative weight is not read, and counts as in the uncut batch.
    negative = Case([[1, 2], [3, 4]], [[1, 1], [-0.25, -0.25]], 3, 0, 5 / 6, 5 / 6)
    assert_by_hand([*BY_HAND.values(), negative], 3)


@pytest.mark.thorough("a graph for each of the sizes of the same laws")
@pytest.mark.parametrize("name", BY_HAND)
def test_one_parameter_by_hand_by_the_size_of_the_law(name):
    assert_by_hand([BY_HAND[name]], BY_HAND[name].size)


def assert_three_terms(known_rows, size, cuts):
    with two().scope():
        terms, weight, batch, variables = three_terms()
    replica = window_of(terms, variables, microbatch_size=size, weight=weight)
    step = run(replica, None if known_rows else open_rows(batch))
    alone, _, _, variables = three_terms()
    loss, due = uncut(alone, batch, variables)
    for cut in cuts:
        losses, gradients = step(given(parts(batch, CUTS[cut])))
        first, second = local(losses)
        assert first.tobytes() == second.tobytes()
        assert_close(first, loss)
        assert_all_close(together(gradients), due)
    found = step.get_concrete_function(given(parts(batch, CUTS[cut])))
    assert collectives(found.graph) == {"top": 4}


@pytest.mark.parametrize("size", tiered([24, 4, 1], [4], "another size of the same graph"))
def test_three_terms_that_are_means_over_different_things(size):
    assert_three_terms(False, size, CUTS)


@pytest.mark.thorough("a graph for each takes seconds; other tests know rows, of simpler losses")
@pytest.mark.parametrize("cut", CUTS)
def test_three_terms_where_the_trace_knows_the_rows(cut):
    assert_three_terms(True, 4, [cut])


def mean_square(kernel):
    return lambda x: tf.reduce_mean((x @ kernel) ** 2)


def test_two_reductions_however_many_micro_batches_and_none_in_a_loop():
    kernel = variable(np.ones((3, 1)))
    found = []
    for size in (8, 4, 2, 1):
        step = run(window_of(mean_square(kernel), [kernel], microbatch_size=size))
        batch = given(parts(X[:16], (8, 8)))
        found.append(collectives(step.get_concrete_function(batch).graph))
    # Two on each of two replicas: rows before the loop, the loss after it.
    assert found == [{"top": 4}] * 4


def test_a_reduction_can_be_counted_in_a_loop():
    # What the counts above would find, if there were one.
    def replica(x):
        loop = tf.function(lambda i, y: (i + 1, _reduced(y)), autograph=False)
        return tf.while_loop(lambda i, y: i < 3, loop, (0, x))[1]

    step = tf.function(replica, autograph=False)
    assert collectives(step.get_concrete_function(tf.ones([2])).graph).keys() - {"top"}


def _reduced(x):
    return tf.raw_ops.CollectiveReduceV2(
        input=x,
        group_size=1,
        group_key=901,
        instance_key=901,
        ordering_token=[],
        merge_op="Add",
        final_op="Id",
    )


ONE = {
    "one device": lambda: tf.distribute.OneDeviceStrategy("CPU:0"),
    "a mirror of one": lambda: tf.distribute.MirroredStrategy(DEVICES[:1]),
}


@pytest.mark.parametrize(
    "name", tiered(ONE, ["a mirror of one"], "a strategy that does less than the other")
)
def test_one_replica_is_the_graph_without_a_strategy(name):
    strategy = ONE[name]()

    def operations(run_it):
        with strategy.scope():
            kernel = tf.Variable(np.ones((3, 1)))
        replica = window_of(
            mean_square(kernel), [kernel], microbatch_size=4, weight=lambda x: tf.shape(x)[0]
        )
        spec = tf.TensorSpec([None, 3], tf.float64)
        graph = tf.function(run_it(replica), autograph=False).get_concrete_function(spec).graph
        definition = graph.as_graph_def()
        return [
            [node.op for node in nodes]
            for nodes in (definition.node, *(f.node_def for f in definition.library.function))
        ]

    within = operations(lambda replica: lambda x: strategy.run(replica, args=(x,)))
    assert sorted(within) == sorted(operations(lambda replica: replica))


def trained(strategy, batches, replica_of):
    """Weights and losses after an update for each batch, by Adam."""
    with strategy.scope():
        kernel = tf.Variable(np.linspace(-1, 1, 3)[:, None])
        optimizer = keras.optimizers.Adam(0.1)
        optimizer.build([kernel])
    step = run(replica_of(kernel, optimizer), batches.element_spec, strategy)
    losses = [strategy.experimental_local_results(step(batch))[0] for batch in batches]
    return kernel.numpy(), losses


def by_windows(kernel, optimizer):
    def replica(x):
        loss, gradients = vb.value_and_gradients(
            mean_square(kernel), x, [kernel], microbatch_size=3
        )
        optimizer.apply_gradients(zip(gradients, [kernel], strict=True))
        return loss

    return replica


def by_whole_batches(kernel, optimizer):
    def replica(x):
        with tf.GradientTape() as tape:
            loss = mean_square(kernel)(x)
        optimizer.apply_gradients([(tape.gradient(loss, kernel), kernel)])
        return loss

    return replica


def test_updates_from_a_distributed_dataset_are_those_of_one_device():
    # 4 and 4 rows, twice, and one row, which leaves a replica without any.
    data = tf.data.Dataset.from_tensor_slices(X[:17]).batch(8)
    weights, losses = trained(two(), two().experimental_distribute_dataset(data), by_windows)
    due, due_losses = trained(tf.distribute.get_strategy(), data, by_whole_batches)
    assert_close(weights, due)
    assert_close(losses, due_losses)


@pytest.mark.thorough("another way to give rows to replicas, in seconds")
def test_each_replica_may_have_rows_of_its_own():
    def pieces(*cut):
        return tf.data.Dataset.from_generator(
            lambda: (X[slice(*rows)] for rows in cut),
            output_signature=tf.TensorSpec([None, 3], tf.float64),
        )

    # One batch for each replica in turn.
    found = two().distribute_datasets_from_function(lambda _: pieces((0, 5), (5, 24)))
    weights, losses = trained(two(), found, by_windows)
    due, due_losses = trained(tf.distribute.get_strategy(), pieces((0, 24)), by_whole_batches)
    assert_close(weights, due)
    assert_close(losses, due_losses)
