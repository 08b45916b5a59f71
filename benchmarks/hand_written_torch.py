"""The `train_step` that one writes on Keras' PyTorch backend to accumulate gradients by hand.

It follows Keras' guide on custom train steps. Micro-batches are equal and every loss is one plain
mean, so the mean of means is right; it knows nothing of weights, masks, BatchNorm or a short batch.
"""

from typing import Any

import keras
import torch


def train_step(self: keras.Model, data: Any, microbatch_size: int) -> dict[str, Any]:
    """One update over all rows of `data`, `microbatch_size` of them at a time."""
    x, y = data
    self.zero_grad()
    for start in range(0, len(x), microbatch_size):
        rows = slice(start, start + microbatch_size)
        y_pred = self(x[rows], training=True)
        loss = self.compute_loss(y=y[rows], y_pred=y_pred)
        (loss * (microbatch_size / len(x))).backward()
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss.detach())
            else:
                metric.update_state(y[rows], y_pred)
    variables = self.trainable_weights
    with torch.no_grad():
        self.optimizer.apply([variable.value.grad for variable in variables], variables)
    return self.get_metrics_result()
