"""Certifying a Keras model: how each backend runs one update eagerly."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from virtualbatch.certify import Certificate
from virtualbatch.diagnosis import certified
from virtualbatch.keras._subject import Backend, KerasSubject
from virtualbatch.split import array_leaves, common_rows, even_cut, rows_per_microbatch


def certificate(
    model: keras.Model, batch: Any, microbatch_size: int | None, accumulation_steps: int | None
) -> Certificate:
    """The certificate of a model; see `virtualbatch.keras.certify`.

    Args:
        model: a model that is built and compiled.
        batch: (x, y, sample_weight) of arrays.
        microbatch_size: checked rows of one micro-batch, or None.
        accumulation_steps: checked micro-batches per window, or None.
    """
    batch = keras.tree.map_structure(
        lambda leaf: None if leaf is None else np.asarray(keras.ops.convert_to_numpy(leaf)), batch
    )
    rows = common_rows(array_leaves(batch))
    if rows is None:
        raise ValueError("internal: arrays have no number of rows.")
    cut = even_cut(rows, rows_per_microbatch(rows, microbatch_size, accumulation_steps))
    if len(cut) < 2:
        raise ValueError(
            "certify needs a batch that is cut into two micro-batches or more. "
            f"Got {rows} rows in one. Pass more rows, or a smaller microbatch_size."
        )
    pieces = [np.arange(start, stop) for start, stop in cut]
    match keras.backend.backend():
        case "tensorflow":
            import tensorflow as tf

            eagerly = tf.config.functions_run_eagerly()
            tf.config.run_functions_eagerly(True)
            try:
                return certified(KerasSubject(model, batch, pieces, _on_tensorflow()))
            finally:
                tf.config.run_functions_eagerly(eagerly)
        case "torch":
            gradients = [(v.value, v.value.grad) for v in model.trainable_variables]
            try:
                return certified(KerasSubject(model, batch, pieces, _on_torch()))
            finally:
                for parameter, gradient in gradients:
                    parameter.grad = gradient
        case _:
            return certified(KerasSubject(model, batch, pieces, _on_jax()))


def _on_tensorflow() -> Backend:
    import tensorflow as tf

    from virtualbatch.keras._tensorflow import TensorFlowStep

    return Backend(
        update=lambda step, model, batch: step(batch),
        accumulating=lambda model, size: TensorFlowStep(model, size, None),
        apply="apply_gradients",
        gradients=lambda pairs: [
            gradient if gradient is None else tf.convert_to_tensor(gradient)
            for gradient, _ in pairs
        ],
        applied=lambda pairs: None,
        array=tf.convert_to_tensor,
    )


def _on_torch() -> Backend:
    from virtualbatch.keras._torch import TorchStep

    return Backend(
        update=lambda step, model, batch: step(batch),
        accumulating=lambda model, size: TorchStep(model, size, None),
        apply="apply",
        gradients=lambda gradients, variables: list(gradients),
        applied=lambda gradients, variables: None,
        array=keras.ops.convert_to_tensor,
    )


def _on_jax() -> Backend:
    from virtualbatch.keras._jax import JaxStep

    return Backend(
        update=_update_on_jax,
        accumulating=lambda model, size: JaxStep(model, size, None),
        apply="stateless_apply",
        gradients=lambda optimizer, gradients, variables: list(gradients),
        applied=lambda optimizer, gradients, variables: (variables, optimizer),
        array=keras.ops.convert_to_tensor,
    )


def _update_on_jax(step: Any, model: keras.Model, batch: Any) -> Mapping[str, Any]:
    """One update as a function of the model's values, which are then put into it."""
    variables: Sequence[Sequence[Any]] = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    logs, state = step(tuple([v.value for v in group] for group in variables), batch)
    for group, values in zip(variables, state, strict=True):
        for variable, value in zip(group, values, strict=True):
            variable.assign(value)
    found: Mapping[str, Any] = logs
    return found
