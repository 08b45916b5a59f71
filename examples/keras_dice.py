"""A loss that is one number of the whole batch: Dice, on images of blobs, with Keras.

Dice is a ratio of sums over all pixels of a batch, so the mean over micro-batches is another loss.
`accumulate` gathers the predictions of all rows, so that one line keeps the loss of the batch.
"""

import logging
import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np

import virtualbatch.keras as vb

SIZE, IMAGES, BATCH, MICROBATCH = 16, 64, 32, 8
logging.basicConfig(format="%(message)s")


def blobs() -> tuple[np.ndarray, np.ndarray]:
    """Noisy images, each with a disc somewhere, and where the disc is."""
    random = np.random.default_rng(0)
    row, column = np.mgrid[:SIZE, :SIZE]
    centre = random.uniform(4, SIZE - 4, (IMAGES, 2, 1, 1))
    radius = random.uniform(1, 4, (IMAGES, 1, 1))
    inside = np.hypot(row - centre[:, 0], column - centre[:, 1]) < radius
    masks = inside[..., None].astype("float32")
    return masks + random.normal(0, 0.3, masks.shape).astype("float32"), masks


def segmenter() -> keras.Model:
    """Images -> for each pixel whether it is of the disc."""
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Conv2D(8, 3, padding="same", activation="relu"),
        keras.layers.Conv2D(1, 3, padding="same", activation="sigmoid"),
    ]
    model = keras.Sequential([keras.Input((SIZE, SIZE, 1)), *layers])
    model.compile(keras.optimizers.Adam(1e-2), keras.losses.Dice(), jit_compile=False)
    return model


def trained(**sizes: object) -> list[np.ndarray]:
    """Weights after two epochs; with sizes, on the memory of micro-batches."""
    model = segmenter()
    if sizes:
        vb.accumulate(model, **sizes)
    images, masks = blobs()
    model.fit(images, masks, batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
    return [np.asarray(keras.ops.convert_to_numpy(weight)) for weight in model.weights]


uncut = trained()
for name, sizes in {"gathered": {}, "a mean of micro-batches": {"gather": False}}.items():
    found = trained(microbatch_size=MICROBATCH, **sizes)
    off = max(np.abs(a - b).max() for a, b in zip(found, uncut, strict=True))
    print(f"{name}: weights are off by {off:.0e} after {2 * IMAGES // BATCH} updates")
