"""The floor of `fit` on PyTorch: a loop in Python."""

from collections.abc import Callable
from typing import Any

import keras
import torch
from keras import tree


def in_a_loop(model: keras.Model, size: int) -> Callable[[Any], dict[str, Any]]:
    """A `train_step` in which PyTorch itself adds to `.grad`."""

    def train_step(data: Any) -> dict[str, Any]:
        tracker, *metrics = model.metrics
        variables = model.trainable_variables
        model.zero_grad()
        losses = []
        for leaves in zip(*(leaf.split(size) for leaf in tree.flatten(data)), strict=True):
            x, y = tree.pack_sequence_as(data, leaves)
            y_pred = model(x, training=True)
            loss = model.compute_loss(x, y, y_pred)
            loss.backward()
            for metric in metrics:
                metric.update_state(y, y_pred)
            losses.append(loss.detach())
        with torch.no_grad():
            model.optimizer.apply([variable.value.grad for variable in variables], variables)
        tracker.update_state(torch.stack(losses).mean())
        return model.get_metrics_result()

    return train_step


FLOORS = {"forward, backward, one update": (in_a_loop, False)}
