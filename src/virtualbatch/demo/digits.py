"""The child process of the demo: trains once on real digits and reports in JSON lines.

`python -m virtualbatch.demo.digits --mode whole ...` prints `{"event": "ready"}`, an
`{"event": "epoch", "epoch": n}` after each epoch, and at last `{"event": "result", ...}`.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import keras
import numpy as np
from sklearn.datasets import load_digits

from virtualbatch.demo.peak_memory import PeakMemory
from virtualbatch.demo.result import MODES, RunResult, Settings

TEST_ROWS = 360
# An 8x8 image is enlarged to 32x32, so that activations take more memory than the weights.
ENLARGEMENT = 4
LEARNING_RATE = 2e-3
# The warm-up only makes the framework start its threads and kernels.
WARM_UP_ROWS = 2


class Digits:
    """The 1,797 images of scikit-learn, enlarged, in a fixed random order.

    Attributes:
        x_train, x_test: float32 images in [0, 1], shape (rows, 32, 32, 1).
        y_train, y_test: digits 0 to 9, shape (rows,).
    """

    def __init__(self) -> None:
        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        pixel = np.ones((1, ENLARGEMENT, ENLARGEMENT))
        images = np.kron(digits.images[order] / 16.0, pixel).astype("float32")[..., None]
        labels = digits.target[order]
        self.x_test, self.x_train = images[:TEST_ROWS], images[TEST_ROWS:]
        self.y_test, self.y_train = labels[:TEST_ROWS], labels[TEST_ROWS:]


class Losses(keras.callbacks.Callback):
    """Keeps the loss and the time of each update.

    Keras shows the mean over the epoch so far. The loss of a batch follows from how the batch
    changes that mean.

    Args:
        rows: the rows of an epoch.
        batch_size: the rows of a batch. The last batch of an epoch may have fewer.

    Attributes:
        losses: the mean loss of each batch.
        seconds: the seconds since training began, at the end of each update.
    """

    def __init__(self, rows: int, batch_size: int) -> None:
        super().__init__()
        self._rows, self._batch_size = rows, batch_size
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def on_train_begin(self, logs=None) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()

    def on_epoch_begin(self, epoch, logs=None) -> None:
        """Starts a new mean, as Keras does for each epoch."""
        self._seen, self._total = 0, 0.0

    def on_train_batch_end(self, batch, logs=None) -> None:
        """Keeps the loss and the time of this batch."""
        seen = min(self._seen + self._batch_size, self._rows)
        total = float(logs["loss"]) * seen
        self.losses.append((total - self._total) / (seen - self._seen))
        self.seconds.append(time.perf_counter() - self._start)
        self._seen, self._total = seen, total


def build_model(seed: int) -> keras.Model:
    """A small CNN, compiled. Equal seeds give equal weights.

    The model is smooth on purpose. With ReLU and maximum pooling, gradients jump where two numbers
    tie, and enlarged images make ties. Another order of summation changes the last bit, which
    decides a tie, and Adam makes an update of full size from it. With ReLU and maximum pooling, run
    (c) ended 1e-3 from run (b) after 30 updates in float32, and 3e-15 in float64. With this model
    it was 4e-7 in float32.
    """
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8 * ENLARGEMENT, 8 * ENLARGEMENT, 1)),
            layers.Conv2D(16, 3, padding="same", activation="silu"),
            layers.Conv2D(16, 3, padding="same", activation="silu"),
            layers.AveragePooling2D(2),
            layers.Conv2D(32, 3, padding="same", activation="silu"),
            layers.AveragePooling2D(2),
            layers.Flatten(),
            layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(
        optimizer=keras.optimizers.Adam(LEARNING_RATE),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        # Without a compiler all runs use the same kernels, and only training takes memory.
        jit_compile=False,
    )
    return model


def train(mode: str, settings: Settings) -> tuple[RunResult, list[np.ndarray]]:
    """Trains once.

    Args:
        mode: one of `virtualbatch.demo.result.MODES`.
        settings: the settings that all runs share.

    Returns:
        The figures, and the trained weights in the order of `model.get_weights()`.
    """
    digits = Digits()
    warm_up = build_model(settings.seed)
    warm_up.fit(digits.x_train[:WARM_UP_ROWS], digits.y_train[:WARM_UP_ROWS], verbose=0)
    del warm_up

    model = build_model(settings.seed)
    initial = model.get_weights()
    batch_size = settings.microbatch_size if mode == "small" else settings.batch_size
    if mode == "accumulated":
        import virtualbatch.keras as vb

        vb.accumulate(model, microbatch_size=settings.microbatch_size)
    tell("ready")

    # Every run has the same order of rows, whatever random numbers were drawn before.
    keras.utils.set_random_seed(settings.seed)
    losses = Losses(len(digits.x_train), batch_size)
    peak = PeakMemory()
    start = time.perf_counter()
    model.fit(
        digits.x_train,
        digits.y_train,
        batch_size=batch_size,
        epochs=settings.epochs,
        verbose=0,
        callbacks=[
            losses,
            keras.callbacks.LambdaCallback(
                on_epoch_end=lambda epoch, logs: tell("epoch", epoch=epoch + 1)
            ),
        ],
    )
    fit_seconds = time.perf_counter() - start
    peak_memory_bytes = peak.stop()

    weights = model.get_weights()
    train_loss, _ = model.evaluate(digits.x_train, digits.y_train, verbose=0)
    _, test_accuracy = model.evaluate(digits.x_test, digits.y_test, verbose=0)
    result = RunResult(
        mode=mode,
        updates=int(model.optimizer.iterations),
        train_loss=train_loss,
        test_accuracy=test_accuracy,
        fit_seconds=fit_seconds,
        peak_memory_bytes=peak_memory_bytes,
        framework_memory_bytes=peak.baseline_bytes,
        peak_memory_method=peak.method,
        farthest_weight=max(
            float(np.abs(after - before).max())
            for before, after in zip(initial, weights, strict=True)
        ),
        losses=losses.losses,
        seconds=losses.seconds,
    )
    return result, weights


def tell(event: str, **content: Any) -> None:
    """Prints one line for the parent."""
    print(json.dumps({"event": event} | content), flush=True)


def main() -> None:
    """Reads the settings from the command line, trains, and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--weights", type=Path, required=True, help="file for the weights (npz)")
    for field in ("epochs", "batch_size", "microbatch_size", "seed"):
        parser.add_argument("--" + field.replace("_", "-"), type=int, required=True)
    options = parser.parse_args()
    settings = Settings(
        epochs=options.epochs,
        batch_size=options.batch_size,
        microbatch_size=options.microbatch_size,
        seed=options.seed,
    )
    result, weights = train(options.mode, settings)
    np.savez(options.weights, *weights)
    tell("result", **asdict(result))


if __name__ == "__main__":
    main()
