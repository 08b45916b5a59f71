"""Peak memory at a fixed micro-batch size must not grow with the number of micro-batches.

Each case runs in a process of its own: micro-batches of 32 rows, 2 to 64 of them per window, on a
model whose activations are far larger than its weights and inputs. The peak is taken above what
the process held after an update of one row, so that code, kernels and weights are not counted.
"grows" is the largest peak over that of the fewest micro-batches.

Usage: python benchmarks/memory.py [--counts 2 8 64] [--json FILE]
"""

from typing import Any

from command import apart, parser_of, save

from virtualbatch.bench.children import FREED_AT_ONCE, tell

MICROBATCH_SIZE = 32
TARGET = 1.03
WAYS = ("fit", "tf.function", "eager", "whole")
_MIB = 1024**2


def peak_of(way: str, count: int) -> int:
    """Peak bytes of a few updates of `count` micro-batches, measured in this process."""
    import keras
    import numpy as np
    import tensorflow as tf
    from keras import layers

    import virtualbatch.keras as keras_engine
    import virtualbatch.tensorflow as engine
    from virtualbatch.demo.peak_memory import PeakMemory

    # Which operations happen to overlap would move the peak by several activations.
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    keras.utils.set_random_seed(0)
    inputs = layers.Input((8, 8, 1))
    x = layers.UpSampling2D(6)(inputs)
    for _ in range(32):
        x = layers.Dense(16, activation="tanh")(x)
    model = keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer="adam", loss=loss_fn)
    rng = np.random.default_rng(0)
    rows = MICROBATCH_SIZE * count
    images = rng.normal(size=(rows, 8, 8, 1)).astype("float32")
    labels = rng.integers(0, 10, rows)

    def value_and_gradients(batch: Any) -> Any:
        loss, gradients = engine.value_and_gradients(
            lambda part: loss_fn(part[1], model(part[0], training=True)),
            batch,
            model.trainable_variables,
            microbatch_size=MICROBATCH_SIZE,
        )
        model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    compiled = tf.function(value_and_gradients)
    model.optimizer.build(model.trainable_variables)
    if way == "fit":
        keras_engine.accumulate(model, microbatch_size=MICROBATCH_SIZE)

    def update(rows: int) -> None:
        batch = (tf.constant(images[:rows]), tf.constant(labels[:rows]))
        if way == "tf.function":
            compiled(batch)
        elif way == "eager":
            value_and_gradients(batch)
        else:
            model.fit(*batch, batch_size=rows, verbose=0)

    update(1)
    peak = PeakMemory()
    update(rows)
    return peak.stop()


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--counts", nargs="+", type=int, default=[2, 4, 8, 16, 32, 64])
    arguments = parser.parse_args()
    if arguments.one:
        way, count = arguments.one
        tell(peak_of(way, int(count)))
        return
    peaks: dict[str, dict[int, int]] = {}
    print(f"peak MiB, micro-batches of {MICROBATCH_SIZE} rows")
    for way in WAYS:
        # The whole batch is shown for scale; 64 times 32 rows at once would not fit everywhere.
        counts = [n for n in arguments.counts if n <= 4] if way == "whole" else arguments.counts
        peaks[way] = {count: apart(way, str(count), **FREED_AT_ONCE) for count in counts}
        line = "  ".join(f"{count}: {peak / _MIB:.1f}" for count, peak in peaks[way].items())
        grows = max(peaks[way].values()) / peaks[way][min(counts)]
        verdict = "" if way == "whole" else "ok" if grows <= TARGET else "MISSED"
        print(f"{way:12} {line}  grows {grows:.3f} {verdict}", flush=True)
    save(arguments.json, {"peak_bytes": peaks})


if __name__ == "__main__":
    main()
