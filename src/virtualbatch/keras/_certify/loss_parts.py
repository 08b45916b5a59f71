"""The parts whose sum is a model's loss, and how to train on one part alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras

from virtualbatch.keras._certify.activations import compiled_losses, place_of


class LossParts:
    """The parts of a loss: compiled losses and losses that layers added.

    Regularisers of weights are left out.

    Args:
        model: a model that has just run forward, so that the losses of its layers exist.

    Attributes:
        places: part -> where it comes from, in words.
    """

    def __init__(self, model: keras.Model):
        self._model = model
        self.places: dict[Any, str] = {}
        if type(model).compute_loss is not keras.Model.compute_loss:
            self.places["all"] = f"compute_loss of {type(model).__name__}"
            return
        entries = compiled_losses(model)
        for k, entry in enumerate(entries):
            output = f" of the output {entry.name}" if len(entries) > 1 else ""
            self.places["loss", k] = f"the loss {entry.loss.name}{output}"
        # In the order of `model.losses`.
        layers = [model, *model._flatten_layers(include_self=False)]
        added = [place_of(layer) for layer in layers for _ in layer._losses]
        self.places |= {("added", k): f"add_loss of {place}" for k, place in enumerate(added)}

    @contextmanager
    def only(self, part: Any) -> Iterator[None]:
        """Makes the model train on one part inside the context; on all parts if it is None."""
        if part is None or part == "all":
            yield
            return
        kind, number = part
        model, compiled = self._model, self._model._compile_loss
        entries = compiled_losses(model)
        seen = 0

        def aggregated(loss: Any) -> Any:
            nonlocal seen
            here = seen % max(1, len(model.losses))
            seen += 1
            value = type(model)._aggregate_additional_loss(model, loss)
            return value if (kind, number) == ("added", here) else value * 0

        vars(model)["_aggregate_additional_loss"] = aggregated
        if entries:
            vars(compiled)["_flat_losses"] = [
                entry if (kind, number) == ("loss", k) else entry._replace(loss_weights=0.0)
                for k, entry in enumerate(entries)
            ]
        try:
            yield
        finally:
            del vars(model)["_aggregate_additional_loss"]
            if entries:
                vars(compiled)["_flat_losses"] = entries
