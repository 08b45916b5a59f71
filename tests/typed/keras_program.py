"""A Keras program whose author runs a type checker, and mistakes that the checker refuses.

Keras has no types of its own, so mypy sees neither models nor what `accumulate` returns.
"""

from typing import Literal, assert_type

import keras
import numpy as np

import virtualbatch as vb
import virtualbatch.keras as vbkeras


def main() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(24, 3)).astype("float32")
    y = x[:, :1]
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(optimizer="sgd", loss="mse")

    sizes: list[int | Literal["auto"] | vb.Auto] = [4, "auto", vb.Auto(memory_limit="1GiB")]
    for size in sizes:
        assert_type(vbkeras.accumulate(model, microbatch_size=size), keras.Sequential)
        noise = vbkeras.NoiseScaleCallback(decay=0.9)
        # Pyright takes Keras' default, "auto", for the type.
        model.fit(x, y, batch_size=12, verbose=0, callbacks=[noise])  # pyright: ignore[reportArgumentType]
    assert_type(vbkeras.NoiseScale().windows, int)

    found = vbkeras.plan(model, (x, y), memory_limit="1GiB")
    assert_type(found, vb.Plan)
    certificate = vbkeras.certify(model, (x, y), microbatch_size=4)
    assert_type(certificate, vb.Certificate)
    certificate.raise_if_inexact()
    assert_type(vbkeras.restore(model), keras.Sequential)


def mistakes(model: keras.Model, x: np.ndarray, y: np.ndarray) -> None:
    vbkeras.accumulate(model, microbatch_size="auot")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    vbkeras.accumulate(model, mircobatch_size=4)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    vbkeras.accumulate(model, 4)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    vbkeras.accumulate(model, accumulation_steps="4")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    vbkeras.accumulate(model, microbatch_size=4, gather="all")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    vbkeras.accumulate(model, microbatch_tokens=64, lengths=[3, 4])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    vbkeras.certify(model, (x, y), microbatch_size="auto")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    vbkeras.plan(model, (x, y), memory_limit=0.8)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    vbkeras.NoiseScaleCallback(decay="slow")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
