"""`fit` on two replicas trains as one device does on the same batches."""

import collections
import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from tensorflow.python.distribute import distribute_lib
from tests.keras.problems import TARGETS, X
from tests.keras.tensorflow.replicas import (
    CASES,
    FURTHER,
    SIZE,
    TWO_OUTPUTS,
    case,
    on_replicas,
    regression,
    squares,
    strategy,
)
from tests.keras.training import (
    RTOL,
    assert_same_run,
    assert_same_values,
    assert_same_variables,
    eagerly,
    in_tiers,
    train,
)
from tests.oracle import assert_close

import virtualbatch.keras as vb

SLOW = "each traces a model twice for each of two replicas"


@pytest.mark.filterwarnings("ignore:The model does not have any trainable weights")
@pytest.mark.parametrize("case", in_tiers(CASES, FURTHER, SLOW))
def test_equals_one_device(case):
    # One device trains on the uncut batch, eagerly, which computes the same.
    expected = train(eagerly(case), accumulated=False)
    found = on_replicas(case)
    assert found.events == expected.events or case.compile().get("steps_per_execution", 1) > 1
    assert_same_run(found, expected)


@pytest.mark.thorough(SLOW)
def test_two_outputs_equal_one_device():
    # In a graph on both sides: where rows are open, Keras weighs batches of such losses alike.
    assert_same_run(on_replicas(TWO_OUTPUTS), train(TWO_OUTPUTS, accumulated=False))


def test_private_names_of_tensorflow_and_its_optimizers():
    for name in ("_get_default_replica_mode", "_pop_per_thread_mode", "_push_per_thread_mode"):
        assert callable(getattr(distribute_lib, name))
    mode = distribute_lib._ThreadMode("strategy", None, "replica")
    assert (mode.strategy, mode.replica_context) == ("strategy", "replica")
    asked = inspect.signature(keras.optimizers.SGD()._all_reduce_sum_gradients)
    assert list(asked.parameters) == ["grads_and_vars"]
    rows = tf.data.Dataset.range(4).batch(2)
    spec = strategy().experimental_distribute_dataset(rows).element_spec
    assert len(spec._component_specs) == 2
    asked = inspect.signature(keras.Model._maybe_symbolic_build)
    assert list(asked.parameters) == ["self", "iterator", "data_batch"]


def test_every_batch_of_a_generator_is_trained_on():
    # What Keras looks at to build the model, through an iterator that reads ahead, would be lost.
    given = case("one", regression, squares(), X, TARGETS)
    with strategy().scope():
        model = compiled_model(given)
    vb.accumulate(model, **SIZE)
    batches = ((X[k : k + 4], TARGETS[k : k + 4]) for k in range(0, 20, 4))
    with pytest.warns(UserWarning, match="ran out of data"):
        model.fit(batches, shuffle=False, verbose=0)
    assert model.optimizer.iterations.numpy() == 5
    expected = train(eagerly(given)._replace(rows=20, fit={"batch_size": 4, "epochs": 1}), False)
    assert_same_variables(model.variables, expected.model.variables)


def test_moving_averages_are_those_of_all_rows():
    # Without a learning rate each window normalises by other statistics, but merges the same.
    given = case(
        "moments",
        lambda: regression(layers.BatchNormalization(momentum=0.9)),
        squares(lambda: keras.optimizers.SGD(0.0)),
        X,
        TARGETS,
    )
    expected = train(eagerly(given), accumulated=False).model.layers[0]
    found = on_replicas(given).model.layers[0]
    for mine, due in zip(
        (found.moving_mean, found.moving_variance),
        (expected.moving_mean, expected.moving_variance),
        strict=True,
    ):
        for local in mine.value.values:
            assert_close(local.numpy(), due.numpy(), 1e-12)


def test_train_on_batch_divides_the_rows():
    given = case("one", regression, squares(), X, TARGETS)
    with strategy().scope():
        model = compiled_model(given)
    other = compiled_model(given)
    vb.accumulate(model, **SIZE)
    for rows, parts in ((10, [5, 5]), (1, [1, 0])):
        logs = [
            m.train_on_batch(X[:rows], TARGETS[:rows], return_dict=True) for m in (model, other)
        ]
        assert_same_values(*logs, RTOL)
        assert [local.numpy() for local in model._loss_tracker.count.value.values] == parts
    for mine, due in zip(model.variables, other.variables, strict=True):
        assert_close(mine.numpy(), due.numpy(), RTOL)


@pytest.mark.thorough(SLOW)
def test_restored_evaluated_and_saved(tmp_path):
    given = case("one", regression, squares(), X, TARGETS)
    with strategy().scope():
        model = compiled_model(given)
    vb.accumulate(model, **SIZE)
    # Replicas of 8 and 7 rows, which plain Keras does not take as a first batch.
    model.fit(X[:15], TARGETS[:15], batch_size=16, verbose=0)
    loss, _ = model.evaluate(X[:15], TARGETS[:15], batch_size=16, verbose=0)
    predicted = model.predict(X[:15], batch_size=16, verbose=0)
    assert_close(loss, np.mean((predicted - TARGETS[:15]) ** 2), RTOL)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_close(loaded.predict(X[:15], verbose=0), predicted, RTOL)
    vb.restore(model)
    assert not {"train_step", "_maybe_symbolic_build"} & vars(model).keys()


def compiled_model(given):
    keras.utils.set_random_seed(1)
    model = given.model()
    model.compile(**given.compile())
    return model


DATA = {
    "distributed": lambda s: s.experimental_distribute_dataset(
        tf.data.Dataset.from_tensor_slices((X[:32], TARGETS[:32])).batch(16)
    ),
    "from a function": lambda s: s.distribute_datasets_from_function(
        lambda context: tf.data.Dataset.from_tensor_slices((X[:32], TARGETS[:32])).batch(8)
    ),
}


@pytest.mark.thorough(SLOW)
@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_datasets_that_are_distributed_already(data):
    given = case("one", regression, squares(), X, TARGETS, rows=32)
    devices = strategy()
    with devices.scope():
        model = compiled_model(given)
    vb.accumulate(model, **SIZE)
    model.fit(data(devices), steps_per_epoch=2, shuffle=False, verbose=0)
    expected = train(eagerly(given)._replace(fit={"batch_size": 16, "epochs": 1}), False)
    assert_same_variables(model.variables, expected.model.variables)


def collectives(model, data, size):
    """Collectives of each kind in the graph of one update: (outside of loops, inside of loops)."""
    vb.accumulate(model, microbatch_size=size)
    devices = model.distribute_strategy
    step = tf.function(lambda batch: devices.run(model.train_step, args=(batch,)), autograph=False)
    graph = step.get_concrete_function(data).graph.as_graph_def()
    found = collections.Counter(node.op for node in graph.node)
    in_loops = 0
    for function in graph.library.function:
        in_loops += sum("Collective" in node.op for node in function.node_def)
    return {op: count for op, count in found.items() if "Collective" in op}, in_loops


@pytest.mark.parametrize(
    ("layer", "due"),
    [
        (None, 3),
        pytest.param(layers.BatchNormalization, 3, marks=pytest.mark.thorough(SLOW)),
    ],
    ids=["dense", "BatchNormalization"],
)
def test_as_many_reductions_for_any_number_of_microbatches(layer, due):
    devices = strategy()
    given = case("one", lambda: regression(*([layer()] if layer else [])), squares(), X, TARGETS)
    with devices.scope():
        model = compiled_model(given)
    data = next(
        iter(
            devices.experimental_distribute_dataset(
                tf.data.Dataset.from_tensor_slices((X[:16], TARGETS[:16])).batch(16)
            )
        )
    )
    with devices.scope():
        model._symbolic_build(data_batch=(X[:2], TARGETS[:2]))
    # 8 rows a replica: 1, 2 and 8 micro-batches.
    for size in (8, 4, 1):
        assert collectives(model, data, size) == ({"CollectiveReduceV2": 2 * due}, 0)
