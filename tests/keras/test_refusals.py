"""What is refused, with which words, and that nothing has changed by then."""

import keras
import numpy as np
import pytest
from keras import layers
from tests.keras import problems
from tests.keras.backends import BACKEND
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


# What the library offers for a loop of one's own, and what it stands for there.
OWN_LOOP = {
    "tensorflow": "virtualbatch.tensorflow.value_and_gradients instead of tf.GradientTape",
    "torch": "virtualbatch.torch.backward instead of loss.backward()",
    "jax": "virtualbatch.jax.value_and_grad instead of jax.value_and_grad",
}

SIZES = {
    "zero": ({"microbatch_size": 0}, ValueError, "Got microbatch_size=0. Pass the number of rows"),
    "negative": ({"microbatch_size": -3}, ValueError, "Got microbatch_size=-3"),
    "boolean": ({"microbatch_size": True}, ValueError, "Got microbatch_size=True"),
    "fraction": ({"microbatch_size": 2.5}, ValueError, "Got microbatch_size=2.5"),
    "text": ({"microbatch_size": "16"}, ValueError, "Got microbatch_size='16'"),
    "none": ({}, ValueError, "Got neither microbatch_size nor accumulation_steps"),
    "zero steps": ({"accumulation_steps": 0}, ValueError, "Got accumulation_steps=0"),
    "half a step": ({"accumulation_steps": 0.5}, ValueError, "Got accumulation_steps=0.5"),
    "auto and counted": (
        {"microbatch_size": "auto", "accumulation_steps": 2},
        ValueError,
        "Leave one of them out",
    ),
}

MODELS = {
    "not a model": (
        lambda: layers.Dense(3),
        TypeError,
        "accumulate takes a Keras model. Got Dense. For a loop of your own use "
        + OWN_LOOP[BACKEND].split()[0],
    ),
    "not compiled": (problems.classifier, ValueError, "not compiled. Call model.compile"),
    "a train_step of its own": (
        lambda: compiled_model(own_step),
        ValueError,
        f"Got OwnStep with a train_step of its own. In that train_step, call {OWN_LOOP[BACKEND]}.",
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
    """Batches that a generator makes; a trace leaves their rows open."""

    def rows():
        while True:
            yield x, y

    return rows


def fit(data, **options):
    return lambda model: model.fit(data(), verbose=0, shuffle=False, **options)


def assert_refused(sizes, mode, act, text):
    """Raises unless training is refused with that text, and nothing has changed by then."""
    model = compiled_model(optimizer=optimizers.SGD(0.1, momentum=0.9), **mode)
    vb.accumulate(model, **sizes)
    if BACKEND != "tensorflow":
        # Elsewhere Keras builds losses before it trains, and would raise what that finds first.
        model.test_on_batch(X, LABELS)
        model.reset_metrics()
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


SHORT = (X[:20], LABELS[:19])
BOTH = {"microbatch_size": 16, "accumulation_steps": 3}
DISAGREE = "Got microbatch_size=16 and accumulation_steps=3 for"
TRAINING = {
    "rows differ, generator": (
        {"microbatch_size": 8}, {},
        fit(generated(*SHORT), steps_per_epoch=1),
        "All arrays of a batch must have the same number of rows",
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
    assert_refused(sizes, mode, act, text)


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


def test_restore_leaves_what_it_did_not_set():
    model = own_step_on_the_instance()
    step = model.train_step
    vb.restore(model)
    assert model.train_step is step
    plain = compiled_model()
    before = dict(vars(plain))
    vb.restore(plain)
    assert vars(plain) == before


@pytest.mark.parametrize(
    "verb", [vb.plan, lambda *given: vb.certify(*given, microbatch_size=2)], ids=["plan", "certify"]
)
def test_a_list_is_no_pair_of_inputs_and_targets(verb):
    model = compiled_model()
    with pytest.raises(
        ValueError, match=r"a list counts as x alone\. Got a list of 2 .*Pass a tuple: \(x"
    ):
        verb(model, [X[:4], LABELS[:4]])
    assert not model.optimizer.built


def test_a_list_of_inputs_needs_no_targets_where_the_model_adds_its_loss():
    class Distance(layers.Layer):
        def call(self, inputs):
            self.add_loss(keras.ops.mean((inputs[0] - inputs[1]) ** 2))
            return inputs[0]

    inputs = [keras.Input((FEATURES,)), keras.Input((FEATURES,))]
    model = keras.Model(inputs, Distance()([layers.Dense(FEATURES)(inputs[0]), inputs[1]]))
    model.compile("sgd")
    assert vb.certify(model, [X[:8], X[8:16]], microbatch_size=4).exact
