"""The noise scale of a model that is trained by `fit`, as a callback."""

from typing import Any

import keras

from virtualbatch.keras._train_step import TrainStep
from virtualbatch.noise import estimate as noise


class NoiseScaleCallback(keras.callbacks.Callback, noise.NoiseScale):
    """A callback that estimates the gradient noise scale while `fit` trains.

    It adds `noise_scale`, in rows, to the logs of each epoch. So `History` has it, and so do
    callbacks that come later in the list, such as `CSVLogger` and `TensorBoard`. `estimate` and
    `advice` are those of `virtualbatch.NoiseScale`, which is the class for loops of your own and
    is no callback. With `steps_per_execution=n` every n-th update is counted.

    `virtualbatch.keras.NoiseScale` is the same class under its older name. Use
    `NoiseScaleCallback` in new code.

    Args:
        decay: how much weight the averages keep with each window. 0.99 looks back about 100
            windows, and 1.0 counts all windows alike.

    Raises:
        ValueError: `decay` is not above 0 and at most 1.

    Example:
        >>> import virtualbatch.keras
        >>> model = keras.Sequential([keras.layers.Dense(1)])
        >>> model.compile(optimizer="sgd", loss="mse")
        >>> model = virtualbatch.keras.accumulate(model, microbatch_size=8)
        >>> x = keras.random.normal((64, 3), seed=1)
        >>> found = NoiseScaleCallback()
        >>> logs = model.fit(x, x[:, :1], batch_size=32, epochs=2, verbose=0, callbacks=[found])
        >>> len(logs.history["noise_scale"]), found.windows
        (2, 4)
    """

    def __init__(self, decay: float = 0.99):
        keras.callbacks.Callback.__init__(self)
        noise.NoiseScale.__init__(self, decay)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Starts to watch the windows of the model.

        Raises:
            ValueError: the model does not accumulate, or packs rows by their length.
        """
        step = self.model.train_step
        if not isinstance(step, TrainStep):
            raise ValueError(
                "A noise scale is seen in the micro-batches of a batch. Got the model "
                f"{self.model.name!r}, which does not accumulate. Call accumulate before fit."
            )
        if step.packing is not None:
            raise ValueError(
                "A noise scale needs micro-batches that are random samples. Got rows sorted by "
                "length: microbatch_tokens. Measure it in a fit with microbatch_size."
            )
        self._watch(step, self.update)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds the estimate to the logs, if some batch had two micro-batches."""
        if logs is not None and self.windows:
            logs["noise_scale"] = self.estimate().scale

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Stops watching the windows of the model."""
        self._watch(self.model.train_step, None)

    def _watch(self, step: TrainStep, listener: Any) -> None:
        step.listener = listener
        # A compiled program either computes statistics or does not, so compile it again.
        self.model.make_train_function(force=True)


# The older name, which programs use.
NoiseScale = NoiseScaleCallback
