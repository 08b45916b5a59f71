"""What is refused, with which words, and that nothing has changed by then."""

from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from tests.keras import problems
from tests.keras.problems import FEATURES, X, crossentropy

import virtualbatch.keras as vb

LABELS = problems.LABELS
optimizers = keras.optimizers


def compiled_model(make=problems.classifier, optimizer="sgd", **options):
    model = make()
    model.compile(optimizer, crossentropy(), **options)
    return model


def accumulating_optimizer():
    return optimizers.SGD(gradient_accumulation_steps=2)


class OwnStep(keras.Sequential):
    """A train_step of the user's own."""

    def train_step(self, data):
        return super().train_step(data)


def own_step():
    return OwnStep([keras.Input((FEATURES,)), layers.Dense(3)])


def own_step_on_the_instance():
    model = compiled_model()
    model.train_step = lambda data: {}
    return model


def stateful():
    recurrent = layers.LSTM(2, stateful=True, name="memory")
    return keras.Sequential([keras.Input((3, 2), batch_size=10), recurrent, layers.Dense(3)])


def on_two_replicas():
    model = compiled_model()
    model._distribute_strategy = SimpleNamespace(num_replicas_in_sync=2)
    return model


SIZES = {
    "zero": ({"microbatch_size": 0}, ValueError, "Got microbatch_size=0. Pass the number of rows"),
    "negative": ({"microbatch_size": -3}, ValueError, "Got microbatch_size=-3"),
    "boolean": ({"microbatch_size": True}, ValueError, "Got microbatch_size=True"),
    "fraction": ({"microbatch_size": 2.5}, ValueError, "Got microbatch_size=2.5"),
    "text": ({"microbatch_size": "16"}, ValueError, "Got microbatch_size='16'"),
    "none": ({}, ValueError, "Got neither microbatch_size nor accumulation_steps"),
    "zero steps": ({"accumulation_steps": 0}, ValueError, "Got accumulation_steps=0"),
    "half a step": ({"accumulation_steps": 0.5}, ValueError, "Got accumulation_steps=0.5"),
    "auto": ({"microbatch_size": "auto"}, NotImplementedError, "is not planned by this version"),
}

MODELS = {
    "not a model": (
        lambda: layers.Dense(3),
        TypeError,
        "accumulate takes a Keras model. Got Dense",
    ),
    "not compiled": (problems.classifier, ValueError, "not compiled. Call model.compile"),
    "a train_step of its own": (
        lambda: compiled_model(own_step),
        ValueError,
        "Got OwnStep with a train_step of its own. In that train_step, call "
        "virtualbatch.tensorflow.value_and_gradients",
    ),
    "a train_step set by hand": (
        own_step_on_the_instance,
        ValueError,
        "Got Sequential with a train_step of its own",
    ),
    "an accumulating optimizer": (
        lambda: compiled_model(optimizer=accumulating_optimizer()),
        ValueError,
        "Got an optimizer with gradient_accumulation_steps=2. Compile with an optimizer without",
    ),
    "an accumulating optimizer in a LossScaleOptimizer": (
        lambda: compiled_model(optimizer=optimizers.LossScaleOptimizer(accumulating_optimizer())),
        ValueError,
        "gradient_accumulation_steps=2",
    ),
    "stateful layers": (
        lambda: compiled_model(stateful),
        ValueError,
        "Got stateful=True in memory. Use stateful=False",
    ),
    "two replicas": (on_two_replicas, ValueError, "with 2 replicas. Build"),
}


def everything(model):
    """Values of a model and its optimizer, and what its instance and class hold."""
    attributes = {name: vars(model).get(name) for name in ("train_step", "make_train_function")}
    return attributes, [v.numpy().tolist() for v in [*model.variables, *model.optimizer.variables]]


@pytest.mark.parametrize(("sizes", "error", "text"), SIZES.values(), ids=SIZES)
def test_sizes_that_are_refused(sizes, error, text):
    model = compiled_model()
    vb.accumulate(model, microbatch_size=16)
    before = everything(model)
    with pytest.raises(error) as refusal:
        vb.accumulate(model, **sizes)
    assert text in str(refusal.value)
    assert everything(model) == before


@pytest.mark.parametrize(("make", "error", "text"), MODELS.values(), ids=MODELS)
def test_models_that_are_refused(make, error, text):
    model = make()
    before = dict(vars(model))
    with pytest.raises(error) as refusal:
        vb.accumulate(model, microbatch_size=16)
    assert text in str(refusal.value)
    assert vars(model) == before


def generated(x, y):
    """Batches that a generator makes: their rows are open, or known if it is a dataset of one."""

    def rows():
        while True:
            yield x, y

    return rows


def as_known_dataset(x, y):
    return tf.data.Dataset.from_tensors((x, y))


def as_open_dataset(x, y):
    def open_rows(array):
        return tf.TensorSpec([None, *array.shape[1:]], array.dtype)

    return tf.data.Dataset.from_generator(
        generated(x, y), output_signature=(open_rows(x), open_rows(y))
    )


def fit(data, **options):
    return lambda model: model.fit(data(), verbose=0, shuffle=False, **options)


SHORT = (X[:20], LABELS[:19])
BOTH = {"microbatch_size": 16, "accumulation_steps": 3}
DISAGREE = "Got microbatch_size=16 and accumulation_steps=3 for"
TRAINING = {
    "rows differ, generator": (
        {"microbatch_size": 8}, {},
        fit(generated(*SHORT), steps_per_epoch=1),
        "All arrays of a batch must have the same number of rows",
    ),
    "rows differ, known": (
        {"microbatch_size": 8}, {}, fit(lambda: as_known_dataset(*SHORT)),
        "Got 20 rows in batch[0] and 19 rows in batch[1]",
    ),
    "rows differ, eager": (
        {"microbatch_size": 8}, {"run_eagerly": True},
        fit(lambda: as_open_dataset(*SHORT), steps_per_epoch=1),
        "Got 20 rows in batch[0] and 19 rows in batch[1]",
    ),
    "rows differ, found at run time": (
        {"microbatch_size": 8}, {},
        fit(lambda: as_open_dataset(*SHORT), steps_per_epoch=1),
        "All arrays of a batch must have the same number of rows, at least one. Got rows 20 19",
    ),
    "rows differ, train_on_batch": (
        {"microbatch_size": 8}, {}, lambda model: model.train_on_batch(*SHORT),
        "Got 20 rows in batch[0] and 19 rows in batch[1]",
    ),
    "sizes disagree": (
        BOTH, {}, lambda model: model.fit(X, LABELS, batch_size=50, verbose=0), DISAGREE,
    ),
    "sizes disagree, eager": (
        BOTH, {"run_eagerly": True},
        lambda model: model.fit(X, LABELS, batch_size=50, verbose=0), DISAGREE,
    ),
    "sizes disagree, steps_per_execution": (
        BOTH, {"steps_per_execution": 2},
        lambda model: model.fit(X, LABELS, batch_size=50, verbose=0), DISAGREE,
    ),
    "sizes disagree, train_on_batch": (
        BOTH, {}, lambda model: model.train_on_batch(X[:20], LABELS[:20]), DISAGREE,
    ),
    "no rows": (
        {"microbatch_size": 8}, {}, lambda model: model.train_on_batch(X[:0], LABELS[:0]),
        "A batch must have at least one row. Got 0 rows in batch[0]",
    ),
    "a later compile that accumulates": (
        {"microbatch_size": 8}, {}, lambda model: (
            model.compile(accumulating_optimizer(), crossentropy()),
            model.fit(X, LABELS, verbose=0),
        ), "Got an optimizer with gradient_accumulation_steps=2",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("sizes", "mode", "act", "text"), TRAINING.values(), ids=TRAINING)
def test_batches_that_are_refused(sizes, mode, act, text):
    model = compiled_model(optimizer=optimizers.SGD(0.1, momentum=0.9), **mode)
    vb.accumulate(model, **sizes)
    step, weights = model.train_step, model.get_weights()
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        act(model)
    assert text in str(refusal.value)
    assert "assertion failed" not in str(refusal.value)
    assert vars(model)["train_step"] is step
    assert int(model.optimizer.iterations) == 0
    assert float(model._loss_tracker.count) == 0
    for found, due in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(found, due)
    for slot in model.optimizer.variables[2:]:
        assert not slot.numpy().any()


def test_a_refused_batch_can_be_followed_by_a_good_one():
    model = compiled_model()
    vb.accumulate(model, **BOTH)
    with pytest.raises(ValueError, match=DISAGREE):
        model.fit(X, LABELS, batch_size=50, verbose=0)
    model.fit(X, LABELS, batch_size=40, verbose=0)
    assert int(model.optimizer.iterations) == 4


def test_later_short_batches_are_exempt_and_later_long_ones_are_not():
    def rows(*sizes):
        for size in sizes:
            yield X[:size], LABELS[:size]

    model = compiled_model()
    vb.accumulate(model, **BOTH)
    model.fit(rows(40, 33, 10, 1), steps_per_epoch=4, verbose=0, shuffle=False)
    assert int(model.optimizer.iterations) == 4
    with pytest.raises(ValueError, match=DISAGREE):
        model.fit(rows(40, 49), steps_per_epoch=2, verbose=0, shuffle=False)


@pytest.mark.parametrize("mode", [{}, {"run_eagerly": True}, {"steps_per_execution": 2}], ids=str)
@pytest.mark.parametrize("source", ["arrays", "dataset"])
def test_no_data_is_refused(mode, source):
    model = compiled_model(**mode)
    vb.accumulate(model, microbatch_size=8)
    data = (X[:0], LABELS[:0]) if source == "arrays" else (as_known_dataset(X, LABELS).take(0),)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"Got no data\. A generator can be read only once"):
            model.fit(*data, verbose=0, shuffle=False)
        assert int(model.optimizer.iterations) == 0


def test_data_that_ends_in_a_later_epoch_is_left_to_keras():
    model = compiled_model()
    vb.accumulate(model, microbatch_size=8)
    data = tf.data.Dataset.from_tensor_slices((X, LABELS)).batch(50)
    with pytest.warns(UserWarning, match="ran out of data"):
        model.fit(data, steps_per_epoch=2, epochs=2, verbose=0, shuffle=False)
    assert int(model.optimizer.iterations) == 3


def test_sparse_inputs_are_refused():
    inputs = tf.data.Dataset.from_tensor_slices((X, LABELS)).batch(50)
    inputs = inputs.map(lambda x, y: (tf.sparse.from_dense(x), y))
    model = keras.Sequential([keras.Input((FEATURES,), sparse=True), layers.Dense(3)])
    model.compile("sgd", crossentropy())
    vb.accumulate(model, microbatch_size=8)
    with pytest.raises(TypeError, match="Got a SparseTensor"):
        model.fit(inputs, verbose=0, shuffle=False)


def test_restore_leaves_what_it_did_not_set():
    model = own_step_on_the_instance()
    step = model.train_step
    vb.restore(model)
    assert model.train_step is step
    plain = compiled_model()
    before = dict(vars(plain))
    vb.restore(plain)
    assert vars(plain) == before
