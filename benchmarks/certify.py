"""How long a check of ten million parameters takes, and what it says.

Three dense layers of 2,048 units on 64 rows in micro-batches of 16, once as a mean and once as a
sum, which is wrong and has to be explained. Each engine in a process of its own.

Usage: python benchmarks/certify.py [--engines torch jax tensorflow keras] [--json FILE]
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from command import apart, parser_of, save

from virtualbatch.bench.children import tell

ENGINES = ["torch", "jax", "tensorflow", "keras"]
FEATURES, UNITS, ROWS, MICROBATCH_SIZE = 1024, 2048, 64, 16
X = np.random.default_rng(0).normal(size=(ROWS, FEATURES)).astype("float32")
SIZES = [(FEATURES, UNITS), (UNITS, UNITS), (UNITS, UNITS)]


def weights() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=size).astype("float32") / size[0] ** 0.5 for size in SIZES]


def on_torch() -> Callable[[str], Any]:
    import torch

    import virtualbatch.torch as vb

    layers = [torch.nn.Linear(*size) for size in SIZES]
    module = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])

    def certified(reduce: str) -> Any:
        return vb.certify(
            lambda x: getattr(module(x) ** 2, reduce)(),
            torch.as_tensor(X),
            module=module,
            microbatch_size=MICROBATCH_SIZE,
        )

    return certified


def on_jax() -> Callable[[str], Any]:
    import jax

    import virtualbatch.jax as vb

    def outputs(params: Any, x: Any) -> Any:
        for kernel in params[:-1]:
            x = jax.nn.relu(x @ kernel)
        return x @ params[-1]

    def certified(reduce: str) -> Any:
        def loss(params: Any, x: Any) -> Any:
            return getattr(outputs(params, x) ** 2, reduce)()

        return vb.certify(loss, microbatch_size=MICROBATCH_SIZE)(weights(), X)

    return certified


def on_tensorflow() -> Callable[[str], Any]:
    import tensorflow as tf

    import virtualbatch.tensorflow as vb

    kernels = [tf.Variable(kernel) for kernel in weights()]

    def certified(reduce: str) -> Any:
        def loss(x: Any) -> Any:
            for kernel in kernels[:-1]:
                x = tf.nn.relu(x @ kernel)
            return getattr(tf, f"reduce_{reduce}")((x @ kernels[-1]) ** 2)

        return vb.certify(loss, X, kernels, microbatch_size=MICROBATCH_SIZE)

    return certified


def on_keras() -> Callable[[str], Any]:
    import keras

    import virtualbatch.keras as vb

    model = keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Dense(UNITS, activation="relu"),
            keras.layers.Dense(UNITS, activation="relu"),
            keras.layers.Dense(UNITS),
        ]
    )

    def certified(reduce: str) -> Any:
        model.compile("sgd", lambda y, found: getattr(keras.ops, reduce)((found - y) ** 2))
        batch = X, np.zeros((ROWS, UNITS), "float32")
        return vb.certify(model, batch, microbatch_size=MICROBATCH_SIZE)

    return certified


def measured(engine: str) -> dict[str, Any]:
    certified = globals()[f"on_{engine}"]()
    result = {}
    for reduce in ("mean", "sum"):
        start = time.perf_counter()
        found = certified(reduce)
        kinds = [finding.kind for finding in found.findings]
        result[reduce] = {
            "exact": found.exact,
            "findings": kinds,
            "seconds": time.perf_counter() - start,
        }
    return result


def main() -> None:
    arguments = parser_of(__doc__, engines=ENGINES).parse_args()
    if arguments.one:
        tell(measured(*arguments.one))
        return
    count = sum(a * b for a, b in SIZES)
    print(f"{count:,} parameters, {ROWS} rows in micro-batches of {MICROBATCH_SIZE}")
    results = {}
    for engine in arguments.engines:
        results[engine] = apart(engine)
        for reduce, found in results[engine].items():
            verdict = "exact" if found["exact"] else ", ".join(found["findings"])
            print(f"{engine:12}{reduce:6}{verdict:12}{found['seconds']:6.1f} s")
    save(arguments.json, results)


if __name__ == "__main__":
    main()
