"""A TensorFlow program whose author runs a type checker, and mistakes that the checker refuses.

TensorFlow has no types of its own. Pyright brings some, so it alone sees tensors as tensors.
"""

from typing import Any, Literal, assert_type

import tensorflow as tf

import virtualbatch as vb
import virtualbatch.tensorflow as vbtf

Batch = dict[str, tf.Tensor]


def main() -> None:
    weights = tf.Variable(tf.ones([4, 1]))
    batch: Batch = {"x": tf.ones([12, 4]), "mask": tf.ones([12])}

    def loss_fn(batch: Batch) -> tf.Tensor:
        rows = tf.reduce_sum(tf.square(tf.matmul(batch["x"], weights)), axis=1)
        return tf.reduce_sum(rows * batch["mask"]) / tf.reduce_sum(batch["mask"])

    def loss_and_aux(batch: Batch) -> tuple[tf.Tensor, Batch]:
        return loss_fn(batch), {"x": batch["x"]}

    def tokens(microbatch: Batch) -> tf.Tensor:
        return tf.reduce_sum(microbatch["mask"])

    weight: vb.WeightFn = tokens
    sizes: list[int | Literal["auto"] | vb.Auto] = [4, "auto", vb.Auto(memory_limit="1GiB")]
    for size in sizes:
        loss, gradients = vbtf.value_and_gradients(
            loss_fn, batch, [weights], microbatch_size=size, weight=weight
        )
        assert_type(loss, tf.Tensor)
        weights.assign_sub(0.1 * gradients[0])

    assert_type(
        vbtf.value_and_gradients(
            loss_and_aux, batch, [weights], microbatch_size=4, weight=tokens, has_aux=True
        ),
        tuple[tuple[tf.Tensor, Any], Any],
    )
    assert_type(
        vbtf.value_and_gradients(
            loss_fn, batch, [weights], microbatch_size=4, weight=tokens, stats=True
        ),
        tuple[tf.Tensor, Any, vb.WindowStats],
    )
    (_, aux), _, stats = vbtf.value_and_gradients(
        loss_and_aux,
        batch,
        [weights],
        microbatch_size=4,
        weight=tokens,
        has_aux=True,
        stats=True,
    )
    assert_type(aux, Any)
    assert_type(stats, vb.WindowStats)

    def encoded(batch: Batch) -> tf.Tensor:
        return tf.tanh(tf.matmul(batch["x"], weights))

    encode = vbtf.rowwise(encoded, microbatch_size=4)
    assert_type(encode(batch), tf.Tensor)

    for window in vbtf.windows([batch] * 6, accumulation_steps=3):
        assert_type(window, vb.Window)
        vbtf.value_and_gradients(loss_fn, window, [weights], weight=tokens)

    found = vbtf.plan(loss_fn, batch, [weights], weight=tokens, memory_limit="1GiB")
    assert_type(found, vb.Plan)
    certificate = vbtf.certify(loss_fn, batch, [weights], microbatch_size=4, weight=tokens)
    assert_type(certificate, vb.Certificate)
    certificate.raise_if_inexact()


def mistakes(batch: Batch, weights: tf.Variable) -> None:
    def loss_fn(batch: Batch) -> tf.Tensor:
        return tf.reduce_mean(batch["x"])

    def loss_and_aux(batch: Batch) -> tuple[tf.Tensor, Batch]:
        return loss_fn(batch), batch

    vbtf.value_and_gradients(loss_fn, batch, [weights], microbatch_size="auot")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    vbtf.value_and_gradients(loss_fn, batch, [weights], mircobatch_size=2)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    vbtf.value_and_gradients(loss_fn, batch, microbatch_size=2)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    vbtf.value_and_gradients(loss_fn, batch, [weights], microbatch_size=2, weight="mean")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    vbtf.value_and_gradients(loss_and_aux, batch, [weights], microbatch_size=2)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    vbtf.value_and_gradients(lambda batch: 1.0, batch, [weights], microbatch_size=2)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    vbtf.value_and_gradients(loss_fn, batch, [weights], microbatch_size=2, stats="all")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    vbtf.rowwise(loss_fn, microbatch_size="big")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    vbtf.certify(loss_fn, batch, [weights], microbatch_size="auto")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    vbtf.plan(loss_fn, batch, [weights], memory_limit=0.8)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
