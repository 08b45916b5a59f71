"""certify on TensorFlow: no false alarm, the right cause, layer and line, nothing touched."""

from contextlib import nullcontext

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import context
from tests.tiers import tiered

import virtualbatch.tensorflow as vb

ROWS, CLASSES = 22, 5
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, 8)).astype("float32")
Y = RNG.integers(0, CLASSES, ROWS)
MASK = (np.arange(6) < 2 + np.arange(ROWS)[:, None] % 5).astype("float32")
TOKENS = RNG.integers(1, 12, (ROWS, 6)) * (MASK > 0)
L = keras.layers
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.fixture
def kernel():
    return tf.Variable(RNG.normal(size=(8, CLASSES)).astype("float32"), name="kernel")


def network(*layers, shape=(8,)):
    model = keras.Sequential([keras.layers.Input(shape), *layers, keras.layers.Dense(CLASSES)])

    def loss_fn(batch):
        return LOSS(batch[1], model(batch[0], training=True))

    return loss_fn, model


FURTHER = pytest.mark.thorough("further layers")


@pytest.mark.parametrize(
    ("layers", "x"),
    [
        pytest.param(lambda: [L.Dense(16, "relu")], X, marks=FURTHER),
        (lambda: [L.Dropout(0.5)], X),
        (lambda: [L.Embedding(12, 6, mask_zero=True), L.LSTM(5)], TOKENS),
        pytest.param(lambda: [L.Embedding(12, 6), L.GRU(5, dropout=0.3)], TOKENS, marks=FURTHER),
        pytest.param(lambda: [L.Reshape((4, 2)), L.Conv1D(3, 2), L.Flatten()], X, marks=FURTHER),
        pytest.param(lambda: [L.LayerNormalization()], X, marks=FURTHER),
        pytest.param(lambda: [L.BatchNormalization(trainable=False)], X, marks=FURTHER),
    ],
    ids=["MLP", "dropout", "LSTM", "GRU with dropout", "CNN", "layer norm", "frozen batch norm"],
)
def test_no_false_alarm_with_layers(layers, x):
    keras.utils.set_random_seed(0)
    loss_fn, model = network(*layers(), shape=x.shape[1:])
    found = vb.certify(loss_fn, (x, Y), model.trainable_variables, microbatch_size=7)
    assert found.findings == (), found
    assert found.exact
    assert set(found.parameters) == {v.path for v in model.trainable_variables}


def squares(batch, kernel):
    return tf.reduce_mean((batch @ kernel) ** 2)


def test_no_false_alarm_with_variables(kernel):
    @tf.function
    def compiled(batch):
        return squares(batch, kernel)

    masked = {"x": X, "mask": MASK}
    for loss_fn, batch, options in [
        (lambda b: squares(b, kernel), X, {}),
        (compiled, X, {}),
        (lambda b: squares(tf.nn.dropout(b, 0.4), kernel), X, {}),
        (lambda b: squares(b + tf.random.normal(tf.shape(b)), kernel), X, {}),
        (lambda b: (squares(b, kernel), b), X, {"has_aux": True}),
        (of_mask(kernel), masked, {"weight": lambda b: tf.reduce_sum(b["mask"])}),
        (
            lambda b: {"a": of_mask(kernel)(b), "b": squares(b["x"], kernel)},
            masked,
            {"weight": lambda b: {"a": tf.reduce_sum(b["mask"]), "b": len(b["x"])}},
        ),
    ]:
        found = vb.certify(loss_fn, batch, [kernel], microbatch_size=7, **options)
        assert found.findings == (), found
        assert found.exact


def of_mask(kernel):
    def loss_fn(batch):
        each = tf.reduce_mean((batch["x"] @ kernel) ** 2, 1, keepdims=True)
        return tf.reduce_sum(each * batch["mask"]) / tf.reduce_sum(batch["mask"])

    return loss_fn


def contrastive(kernel):
    def loss_fn(batch):
        z = tf.math.l2_normalize(batch @ kernel, 1)
        return tf.reduce_mean(tf.reduce_logsumexp(z @ tf.transpose(z), 1))

    return loss_fn


def wrong(kernel):
    """name -> (loss function, batch, options, kind, text of why or fix)."""
    poisoned = X.copy()
    poisoned[3, 1] = np.nan
    masked = {"x": X, "mask": MASK}
    return {
        "mask by rows": (of_mask(kernel), masked, {}, "weight", "batch['mask'].sum()"),
        "a sum": (lambda b: tf.reduce_sum((b @ kernel) ** 2), X, {}, "sum_loss", 'weight="sum"'),
        "a sum and decay": (
            lambda b: tf.reduce_sum((b @ kernel) ** 2) + tf.reduce_sum(kernel**2),
            X,
            {},
            "regulariser",
            "None",
        ),
        "contrastive": (contrastive(kernel), X, {}, "coupled_rows", "row"),
        "centred": (
            lambda b: squares(b - tf.reduce_mean(b, 0), kernel),
            X,
            {},
            "coupled_rows",
            "row",
        ),
        "counted in bfloat16": (
            of_mask(kernel),
            masked,
            {"weight": lambda b: tf.cast(tf.reduce_sum(b["mask"]) + 300, tf.bfloat16) - 300},
            "low_precision",
            "float32",
        ),
        "logarithm": (
            lambda b: tf.reduce_mean(tf.math.log(b @ kernel)),
            X,
            {},
            "non_finite",
            "first",
        ),
        "NaN": (lambda b: squares(b, kernel), poisoned, {}, "non_finite", "Clean"),
    }


@pytest.mark.parametrize(
    "name",
    tiered(
        wrong(None),
        [
            "mask by rows",
            "a sum",
            "a sum and decay",
            "contrastive",
            "counted in bfloat16",
            "logarithm",
        ],
        "further losses of the same kinds",
    ),
)
def test_the_cause_is_named(name, kernel):
    loss_fn, batch, options, kind, text = wrong(kernel)[name]
    found = vb.certify(loss_fn, batch, [kernel], microbatch_size=4, **options)
    assert not found.exact
    assert [finding.kind for finding in found.findings] == [kind], found
    (finding,) = found.findings
    assert text in finding.why + finding.fix
    where = {"low_precision": "bfloat16", "NaN": "batch, row 3"}
    assert where.get(name, where.get(kind, "test_certify.py:")) in finding.where


@pytest.mark.parametrize(
    "name", [n for n, c in wrong(None).items() if c[3] in ("coupled_rows", "non_finite")]
)
def test_the_cause_is_the_same_from_sketches(name, kernel, monkeypatch):
    loss_fn, batch, *_ = wrong(kernel)[name]
    due = vb.certify(loss_fn, batch, [kernel], microbatch_size=4).findings
    monkeypatch.setattr("virtualbatch.certify.activations._KEPT_BYTES", 0)
    assert vb.certify(loss_fn, batch, [kernel], microbatch_size=4).findings == due


def test_batch_norm_is_named_with_its_layer():
    loss_fn, model = network(keras.layers.Dense(8), keras.layers.BatchNormalization())
    before = [v.numpy() for v in model.variables]
    found = vb.certify(loss_fn, (X, Y), model.trainable_variables, microbatch_size=8)
    assert [finding.kind for finding in found.findings] == ["batchnorm"]
    assert "batch_normalization" in found.findings[0].where
    assert all(np.array_equal(a, v.numpy()) for a, v in zip(before, model.variables, strict=True))


def test_state_is_named_and_put_back(kernel):
    count = tf.Variable(1.0, trainable=False)

    def loss_fn(batch):
        count.assign_add(1.0)
        return squares(batch, kernel) * count

    found = vb.certify(loss_fn, X, [kernel], microbatch_size=4)
    assert [finding.kind for finding in found.findings] == ["stateful"]
    assert count.numpy() == 1.0
    assert not tf.config.functions_run_eagerly()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_switches_of_the_process_are_as_they_were(before, fails, kernel):
    seen = []

    def loss_fn(batch):
        if tf.executing_eagerly():
            seen.append(tf.config.functions_run_eagerly())
            if fails:
                raise KeyError("theirs")
        return squares(batch, kernel)

    tf.config.run_functions_eagerly(before)
    try:
        with pytest.raises(KeyError) if fails else nullcontext():
            vb.certify(loss_fn, X, [kernel], microbatch_size=4)
        assert tf.config.functions_run_eagerly() == before
    finally:
        tf.config.run_functions_eagerly(False)
    assert set(seen) == {True}
    assert not context.context().op_callbacks


def test_a_variable_without_gradient_is_named(kernel):
    unused = tf.Variable(1.0, name="unused")
    found = vb.certify(lambda b: squares(b, kernel), X, [kernel, unused], microbatch_size=4)
    assert found.exact
    assert [(f.kind, f.where) for f in found.findings] == [("no_gradient", "unused:0")]


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (6, 6), (6, 9)])
def test_nothing_to_compare_is_refused(rows, size, kernel):
    with pytest.raises(ValueError, match=f"Got {rows} rows in one"):
        vb.certify(lambda b: squares(b, kernel), X[:rows], [kernel], microbatch_size=size)


def test_graphs_and_windows_are_refused(kernel):
    def run(batch):
        return vb.certify(lambda b: squares(b, kernel), batch, [kernel], microbatch_size=4)

    with pytest.raises(ValueError, match=r"inside tf\.function"):
        tf.function(run, autograph=False)(X)
    window = vb.Window([X[:4], X[4:]])
    with pytest.raises(ValueError, match="Got a Window"):
        vb.certify(lambda b: squares(b, kernel), window, [kernel])
