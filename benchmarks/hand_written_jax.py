"""The `train_step` that one writes on Keras' JAX backend to accumulate gradients by hand.

It follows Keras' guide on custom train steps, with a `lax.scan` over equal micro-batches whose
losses are one plain mean each, so the mean of means is right; it knows nothing of weights, masks,
BatchNorm or a short batch.
"""

from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax import lax


def train_step(self: keras.Model, state: Any, data: Any, microbatch_size: int) -> Any:
    """One update over all rows of `data`, `microbatch_size` of them at a time."""
    trainable, non_trainable, optimizer, metrics = state
    cut = jax.tree.map(lambda x: x.reshape(-1, microbatch_size, *x.shape[1:]), tuple(data))
    steps = len(cut[0])
    differentiate = jax.value_and_grad(self.compute_loss_and_updates, has_aux=True)

    def body(carry: Any, microbatch: Any) -> Any:
        gradients, non_trainable, metrics = carry
        x, y = microbatch
        (_, (loss, y_pred, non_trainable, metrics)), found = differentiate(
            trainable, non_trainable, metrics, x, y, None,
            training=True, optimizer_variables=optimizer,
        )  # fmt: skip
        _, metrics = self._update_metrics_variables(metrics, loss, x, y, y_pred, None)
        return (
            [a + b for a, b in zip(gradients, found, strict=True)],
            non_trainable,
            metrics,
        ), None

    zeros = [jnp.zeros_like(value) for value in trainable]
    (gradients, non_trainable, metrics), _ = lax.scan(body, (zeros, non_trainable, metrics), cut)
    gradients = [gradient / steps for gradient in gradients]
    trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradients, trainable)
    mapping = list(zip(self.metrics_variables, metrics, strict=True))
    with keras.StatelessScope(state_mapping=mapping):
        logs = self.get_metrics_result()
    return logs, (trainable, non_trainable, optimizer, metrics)
