"""A JAX program whose author runs a type checker, and mistakes that the checker refuses."""

from typing import Any, Literal, assert_type

import jax
import jax.numpy as jnp

import virtualbatch as vb
import virtualbatch.jax as vbjax

Params = dict[str, jax.Array]
Batch = dict[str, jax.Array]


def loss_fn(params: Params, batch: Batch) -> jax.Array:
    rows = jnp.square(batch["x"] @ params["w"])
    return jnp.sum(rows * batch["mask"]) / jnp.sum(batch["mask"])


def loss_and_aux(params: Params, batch: Batch) -> tuple[jax.Array, Batch]:
    return loss_fn(params, batch), {"predictions": batch["x"] @ params["w"]}


def tokens(microbatch: Batch) -> jax.Array:
    return jnp.sum(microbatch["mask"])


def encoded(params: Params, batch: Batch) -> jax.Array:
    return jnp.tanh(batch["x"] @ params["w"])


def main() -> None:
    params = {"w": jnp.arange(4.0)}
    batch = {"x": jnp.ones((12, 4)), "mask": jnp.ones(12)}
    weight: vb.WeightFn = tokens

    sizes: list[int | Literal["auto"] | vb.Auto] = [4, "auto", vb.Auto(memory_limit="1GiB")]
    for size in sizes:
        step = vbjax.value_and_grad(loss_fn, microbatch_size=size, weight=weight)
        value, gradients = step(params, batch)
        assert_type(value, jax.Array)
        params = jax.tree.map(lambda w, g: w - 0.1 * g, params, gradients)

    assert_type(
        vbjax.value_and_grad(loss_fn, microbatch_size=4, weight=tokens)(params, batch),
        tuple[jax.Array, Any],
    )
    jitted = jax.jit(vbjax.value_and_grad(loss_fn, microbatch_size=4, weight=tokens))
    jitted(params, batch)
    with_aux = vbjax.value_and_grad(loss_and_aux, has_aux=True, microbatch_size=4, weight=tokens)
    assert_type(with_aux(params, batch), tuple[tuple[jax.Array, Any], Any])
    with_stats = vbjax.value_and_grad(loss_fn, microbatch_size=4, weight=tokens, stats=True)
    assert_type(with_stats(params, batch), tuple[jax.Array, Any, vb.WindowStats])
    with_both = vbjax.value_and_grad(
        loss_and_aux, has_aux=True, microbatch_size=4, weight=tokens, stats=True
    )
    assert_type(with_both(params, batch), tuple[tuple[jax.Array, Any], Any, vb.WindowStats])
    # As with `jax.value_and_grad`; what a flag by position returns is Any.
    vbjax.value_and_grad(loss_and_aux, 0, True, microbatch_size=4, weight=tokens)(params, batch)
    summed = vbjax.value_and_grad(
        lambda params, x: {"loss": jnp.sum(x @ params["w"])},
        microbatch_size=4,
        weight=lambda x: {"loss": "sum"},
        accumulator_dtype=jnp.float32,
    )
    assert_type(summed(params, batch["x"])[0], jax.Array)

    encode = vbjax.rowwise(encoded, microbatch_size=4)
    assert_type(encode(params, batch), jax.Array)

    noise = vb.NoiseScale()
    for window in vbjax.windows([batch] * 6, accumulation_steps=3):
        assert_type(window, vb.Window)
        several = vbjax.value_and_grad(loss_fn, weight=tokens, stats=True)
        noise.update(several(params, window)[2])
    assert_type(noise.estimate(), vb.NoiseEstimate)

    found = vbjax.plan(loss_fn, weight=tokens, memory_limit="1GiB")(params, batch)
    assert_type(found, vb.Plan)
    certificate = vbjax.certify(loss_fn, microbatch_size=4, weight=tokens)(params, batch)
    assert_type(certificate, vb.Certificate)
    certificate.raise_if_inexact()
    vbjax.certify(encode)(params, batch).raise_if_inexact()


def mistakes(params: Params, batch: Batch) -> None:
    vbjax.value_and_grad(loss_fn, microbatch_size="auot")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    vbjax.value_and_grad(loss_fn, mircobatch_size=2)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    vbjax.value_and_grad(loss_fn, microbatch_size=2, key_argnum="key")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    vbjax.value_and_grad(loss_fn, microbatch_size=2, weight="mean")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    vbjax.value_and_grad(loss_and_aux, microbatch_size=2)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    vbjax.value_and_grad(loss_fn, microbatch_size=2, has_aux=True)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    vbjax.value_and_grad(lambda params, batch: 1.0, microbatch_size=2)  # type: ignore[arg-type, return-value]  # pyright: ignore[reportArgumentType]
    vbjax.value_and_grad(loss_fn, microbatch_size=2, stats="all")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    vbjax.rowwise(encoded, microbatch_size="big")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    vbjax.certify(loss_fn, microbatch_size="auto")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    vbjax.plan(loss_fn, memory_limit=0.8)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
