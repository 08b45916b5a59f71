"""Keras on JAX: a `train_step` that runs one batch as a window.

Keras compiles it whole, as it does its own: the batch is checked and cut while it is traced, and
the window is one scan in the program.
"""

from collections.abc import Callable
from typing import Any

import jax
import keras

from virtualbatch.jax._batch import cut_batch
from virtualbatch.keras._jax_window import State, WindowRun
from virtualbatch.keras._train_step import TrainStep
from virtualbatch.split import array_leaves, common_rows, rows_per_microbatch, sizes_disagree


class JaxStep(TrainStep):
    """The `train_step` of a model that accumulates on JAX."""

    def __init__(
        self, model: keras.Model, microbatch_size: int | None, accumulation_steps: int | None
    ):
        super().__init__(model, microbatch_size, accumulation_steps)
        if keras.config.is_nnx_enabled():
            raise NotImplementedError(
                "accumulate works on Keras' own variables. Got Keras with its NNX mode enabled. "
                "Unset KERAS_NNX_ENABLED."
            )
        self._seen_whole = False

    def __call__(self, state: Any, data: Any) -> tuple[dict[str, Any], Any]:
        """Trains on one batch, as Keras' `train_step` does."""
        model = self._model
        batch = self._unpacked(data)
        rows = common_rows(array_leaves(batch))
        if rows is None:
            raise ValueError("internal: a batch of JAX has no number of rows.")
        size = self._size(rows)
        compiled = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((state, data)))
        cut = cut_batch(batch, size, None, compiled=compiled)
        if cut.count == 1:
            return type(model).train_step(model, state, data)
        run = WindowRun(model, cut, State(*state))
        logs, after = run.train(compiled)
        self._say(run.losses_of_one_number)
        return logs, tuple(after)

    def _size(self, rows: int) -> int:
        """Rows of one micro-batch, for a batch of so many.

        Raises:
            ValueError: two sizes disagree. The last batch of an epoch may be short; a batch that
                comes before any whole one is not the last.
        """
        size, steps = self._microbatch_size, self._accumulation_steps
        if size is None or steps is None:
            return rows_per_microbatch(rows, size, steps)
        count = -(-rows // size)
        if count > steps or (count < steps and not self._seen_whole):
            raise ValueError(sizes_disagree(rows, size, steps))
        self._seen_whole = self._seen_whole or count == steps
        return size


def make_train_function(model: keras.Model) -> Callable[..., Any]:
    """Keras' own `make_train_function`, whose function loses nothing when a batch is refused.

    `fit` takes the values out of the model's variables while it trains, and after an error in the
    first batch would not put them back.
    """

    def make(force: bool = False) -> None:
        if model.train_function is not None and not force:
            return
        type(model).make_train_function(model, force=force)
        run = model.train_function

        def train_function(state: Any, iterator: Any) -> Any:
            try:
                return run(state, iterator)
            except BaseException:
                _put_back(model, State(*state))
                raise

        model.train_function = train_function

    return make


def _put_back(model: keras.Model, state: State) -> None:
    pairs = [
        *zip(model.trainable_variables, state.trainable, strict=True),
        *zip(model.non_trainable_variables, state.non_trainable, strict=True),
        *zip(model.optimizer.variables, state.optimizer, strict=True),
        *zip(model.metrics_variables, state.metrics, strict=True),
    ]
    # A program that ran has taken its inputs.
    if not any(value.is_deleted() for _, value in pairs):
        for variable, value in pairs:
            variable.assign(value)
        # What `fit` assigns once more when it ends.
        model._jax_state = {
            "trainable_variables": state.trainable,
            "non_trainable_variables": state.non_trainable,
            "optimizer_variables": state.optimizer,
            "metrics_variables": state.metrics,
        }
