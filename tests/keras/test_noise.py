"""The callback: its numbers from one micro-batch at a time, and what it leaves as it was."""

import csv

import keras
import numpy as np
import pytest
from keras import layers
from tests.keras.backends import BACKEND, available, modes
from tests.keras.packing import IDS, LABELS, PACKED, tagger
from tests.keras.problems import compiled
from tests.oracle import assert_close, tolerance

import virtualbatch.keras as vb
from virtualbatch.window.cut import even_cut

ROWS, FEATURES, WORDS = 10, 4, 7
_random = np.random.default_rng(3)
X = _random.normal(size=(ROWS, FEATURES))
Y = _random.normal(size=(ROWS, 2))
WORD_IDS = _random.integers(0, WORDS, (ROWS, 3))
WEIGHTS = _random.random(ROWS) + 0.5


class Seen(vb.NoiseScale):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__(decay=1.0)
        self.stats = []

    def update(self, stats):
        self.stats.append([float(number) for number in stats])
        super().update(stats)


def dense():
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            layers.Dense(3, activation="tanh", kernel_initializer=drawn(0)),
            layers.Dense(2, kernel_initializer=drawn(1)),
        ]
    )


def embedding():
    """Its gradients are sparse on TensorFlow, with rows that come more than once."""
    return keras.Sequential(
        [
            keras.Input((3,), dtype="int32"),
            layers.Embedding(WORDS, 5, embeddings_initializer=drawn(0)),
            layers.GlobalAveragePooling1D(),
            layers.Dense(2, kernel_initializer=drawn(1)),
        ]
    )


def drawn(seed):
    """An initializer that draws the same numbers whatever the backend and the dtype."""
    return lambda shape, dtype: keras.ops.convert_to_tensor(
        np.random.default_rng(seed).normal(size=shape) / 2, dtype
    )


def cut(rows, size, eagerly):
    if eagerly:
        return even_cut(rows, size)
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def gradient(model, x, y, weight=None):
    """The gradient of a batch, by an update of plain Keras."""
    model.compile("sgd", "mse", run_eagerly=True)
    model.optimizer.learning_rate = 1.0
    before = [np.array(w) for w in model.get_weights()]
    model.train_on_batch(x, y, weight)
    after = model.get_weights()
    model.set_weights(before)
    return np.concatenate([(a - b).ravel() for a, b in zip(before, after, strict=True)])


def expected(make, x, y, size, weight=None, run_eagerly=BACKEND == "torch", **mode):
    """rows, micro-batches, sum of s_i |g_i|^2 and |g|^2, the gradients by plain Keras."""
    model = make()
    pieces = cut(len(x), size, run_eagerly)
    each = [
        gradient(model, x[a:b], y[a:b], None if weight is None else weight[a:b]) for a, b in pieces
    ]
    shares = [(b - a) / len(x) for a, b in pieces]
    whole = sum(share * one for share, one in zip(shares, each, strict=True))
    mean_square = sum(share * one @ one for share, one in zip(shares, each, strict=True))
    return [len(x), len(pieces), mean_square, whole @ whole]


def fitted(make, x, y, size, *, epochs=1, sample_weight=None, callbacks=(), **options):
    model = make()
    model.compile(**{"optimizer": "sgd", "loss": "mse"} | options)
    vb.accumulate(model, microbatch_size=size)
    seen = Seen()
    history = model.fit(
        x,
        y,
        sample_weight=sample_weight,
        batch_size=ROWS,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[seen, *callbacks],
    )
    return seen, history.history, model


@pytest.mark.parametrize("mode", modes(), ids=str)
@pytest.mark.parametrize(
    "size",
    [4, *(pytest.param(n, marks=pytest.mark.thorough("another size")) for n in (5, 1))],
)
def test_numbers_are_those_of_each_micro_batch(mode, size):
    seen, *_ = fitted(dense, X, Y, size, **mode)
    assert_close(seen.stats, [expected(dense, X, Y, size, **mode)])


@pytest.mark.parametrize("mode", modes(), ids=str)
def test_rows_of_an_embedding_that_come_twice(mode):
    seen, *_ = fitted(embedding, WORD_IDS, Y, 4, **mode)
    assert_close(seen.stats, [expected(embedding, WORD_IDS, Y, 4, **mode)])


def test_sample_weights():
    seen, *_ = fitted(dense, X, Y, 4, sample_weight=WEIGHTS)
    assert_close(seen.stats, [expected(dense, X, Y, 4, WEIGHTS)])


def test_the_scale_of_a_loss_is_taken_out():
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(), initial_scale=64)
    seen, *_ = fitted(dense, X, Y, 4, optimizer=optimizer)
    assert_close(seen.stats, [expected(dense, X, Y, 4)])


def test_half_precision():
    keras.config.set_dtype_policy("bfloat16")
    seen, *_ = fitted(dense, X, Y, 5)
    keras.config.set_dtype_policy("float64")
    due = expected(dense, X, Y, 5)
    # Twice that of a gradient of five rows, since it is squared.
    assert_close(seen.stats, [due], 2 * tolerance("bfloat16", 5))


def test_history_and_later_callbacks_have_it(tmp_path):
    log = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    seen, history, _ = fitted(dense, X, Y, 5, epochs=3, callbacks=[log])
    assert history["noise_scale"][-1] == seen.estimate().scale
    assert len(history["noise_scale"]) == 3
    with open(tmp_path / "log.csv") as file:
        logged = [float(row["noise_scale"]) for row in csv.DictReader(file)]
    assert_close(logged, history["noise_scale"])


def test_one_micro_batch_shows_nothing():
    seen, history, _ = fitted(dense, X, Y, ROWS)
    assert "noise_scale" not in history
    assert seen.windows == 0


@pytest.mark.parametrize("mode", modes(), ids=str)
def test_training_is_the_same(mode):
    _, history, model = fitted(dense, X, Y, 4, epochs=2, metrics=["mae"], **mode)
    plain = dense()
    plain.compile("sgd", "mse", metrics=["mae"], **mode)
    vb.accumulate(plain, microbatch_size=4)
    due = plain.fit(X, Y, batch_size=ROWS, epochs=2, shuffle=False, verbose=0).history
    assert {name: history[name] for name in due} == due
    assert set(history) == {*due, "noise_scale"}
    for a, b in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_it_watches_while_it_is_given_to_fit():
    seen, _, model = fitted(dense, X, Y, 5)
    logs = model.fit(X, Y, batch_size=ROWS, verbose=0).history
    assert set(logs) == {"loss"}
    assert set(model.train_on_batch(X, Y, return_dict=True)) == {"loss"}
    assert seen.windows == 1
    model.fit(X, Y, batch_size=ROWS, verbose=0, callbacks=[seen])
    assert seen.windows == 2


@pytest.mark.parametrize("steps", [1, 2] if available("steps_per_execution") else [1])
def test_steps_per_execution_counts_the_last_of_them(steps):
    model = dense()
    model.compile("sgd", "mse", steps_per_execution=steps)
    vb.accumulate(model, microbatch_size=2)
    seen = Seen()
    x, y = np.concatenate([X, X]), np.concatenate([Y, Y])
    model.fit(x, y, batch_size=5, shuffle=False, verbose=0, callbacks=[seen])
    assert seen.windows == 4 // steps


def test_a_model_that_does_not_accumulate():
    model = dense()
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"micro-batches of a batch\. Got .* Call accumulate"):
        model.fit(X, Y, verbose=0, callbacks=[vb.NoiseScale()])
    for a, b in zip(model.get_weights(), dense().get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_packed_rows():
    model = tagger()
    model.compile(**compiled()())
    vb.accumulate(model, **PACKED)
    with pytest.raises(ValueError, match="sorted by length"):
        model.fit(IDS, LABELS, verbose=0, callbacks=[vb.NoiseScale()])


def test_it_shows_what_it_was_made_with():
    assert repr(vb.NoiseScaleCallback(decay=0.9)) == "NoiseScaleCallback(decay=0.9)"
