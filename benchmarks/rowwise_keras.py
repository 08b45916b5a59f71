"""What a loss that sees all rows costs in Keras: one forward more, against a plain window.

    python benchmarks/rowwise_keras.py --backend torch

Prints CPU seconds of one thread: the median of an epoch, and medians of ratios of runs that follow
each other. The loss is one that needs no gathering, so that all three ways do the same update.
"""

import argparse
import logging
import os
import statistics
import time

ROWS, BATCH, MICRO, ROUNDS = 256, 128, 16, 7


def models():
    import keras
    import numpy as np
    from keras import layers

    random = np.random.default_rng(0)
    images = random.normal(size=(ROWS, 20, 20, 3)).astype("float32")
    vectors = random.normal(size=(ROWS, 256)).astype("float32")

    def cnn():
        return keras.Sequential(
            [
                keras.Input((20, 20, 3)),
                layers.Conv2D(16, 3, activation="relu"),
                layers.Conv2D(32, 3, strides=2, activation="relu"),
                layers.Conv2D(32, 3, activation="relu"),
                layers.GlobalAveragePooling2D(),
                layers.Dense(10),
            ]
        )

    def dense():
        hidden = [layers.Dense(512, activation="relu") for _ in range(4)]
        return keras.Sequential([keras.Input((256,)), *hidden, layers.Dense(10)])

    return {"CNN": (cnn, images), "dense": (dense, vectors)}


def race(name, make, x):
    import keras
    import numpy as np

    import virtualbatch.keras as vb

    y = np.random.default_rng(1).integers(0, 10, ROWS)

    def epoch(gather):
        keras.utils.set_random_seed(0)
        model = make()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss, jit_compile=keras.backend.backend() == "jax")
        if gather is not None:
            vb.accumulate(model, microbatch_size=MICRO, gather=gather, check=False)
        return lambda: model.fit(x, y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0)

    ways = {"uncut": epoch(None), "window": epoch(False), "gathered": epoch(True)}
    seconds = {way: [] for way in ways}
    for run in ways.values():
        run()
    for _ in range(ROUNDS):
        for way, run in ways.items():
            start = time.process_time()
            run()
            seconds[way].append(time.process_time() - start)
    for way, found in seconds.items():
        ratios = [
            statistics.median(a / b for a, b in zip(found, seconds[other], strict=True))
            for other in ("uncut", "window")
        ]
        print(
            f"{keras.backend.backend():10} {name:6} {way:9} {statistics.median(found):6.3f} s"
            f"   / uncut {ratios[0]:.2f}   / window {ratios[1]:.2f}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=["tensorflow", "torch", "jax"], required=True)
    backend = parser.parse_args().backend
    os.environ["KERAS_BACKEND"] = backend
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    logging.disable(logging.WARNING)
    if backend == "torch":
        import torch

        torch.set_num_threads(1)
    if backend == "tensorflow":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    for name, (make, x) in models().items():
        race(name, make, x)


if __name__ == "__main__":
    main()
