"""What `accumulate` cannot make exact, said once by name."""

import logging
from typing import Any

import keras

_log = logging.getLogger("virtualbatch")


def say_what_is_not_exact(model: keras.Model) -> None:
    """Warns of layers and losses whose result depends on how the batch is cut.

    Args:
        model: a compiled model.
    """
    layers = list(model._flatten_layers())
    batchnorm = [
        layer
        for layer in layers
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    ]
    merged = [layer.name for layer in batchnorm if not layer.renorm]
    if merged:
        _log.warning(
            "BatchNormalization (%s) normalises each micro-batch by its own statistics, as data "
            "parallelism does; its moving averages are updated once per batch.",
            ", ".join(merged),
        )
    spectral = [x for x in layers if isinstance(x, keras.layers.SpectralNormalization)]
    stepwise = [layer.name for layer in batchnorm if layer.renorm] + [x.name for x in spectral]
    if stepwise:
        _log.warning(
            "BatchNormalization with renorm=True and SpectralNormalization (%s) change with each "
            "forward, so they change with each micro-batch.",
            ", ".join(stepwise),
        )
    if any(_couples_rows(loss) for loss in keras.tree.flatten(model.loss)):
        _log.warning(
            "The Circle loss compares the rows of a batch with each other, so it sees those of a "
            "micro-batch only."
        )
    if type(model).compute_loss is not keras.Model.compute_loss:
        _log.warning(
            "%s overrides compute_loss: its result is taken for one mean over rows.",
            type(model).__name__,
        )


def _couples_rows(loss: Any) -> bool:
    """Whether this is a loss of Keras with one value per row that depends on other rows."""
    return (
        isinstance(loss, keras.losses.Circle)
        or loss is keras.losses.circle
        or (isinstance(loss, str) and loss.lower() == "circle")
    )
