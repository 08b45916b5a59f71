"""Checks that refuse a call before any part of its window is computed."""

from typing import Any

import numpy as np
import tensorflow as tf

from virtualbatch.plan.auto import check_cut_or_auto
from virtualbatch.window.terms import is_sum


def check_call(
    loss_fn: Any,
    batch: Any,
    variables: Any,
    microbatch_size: Any,
    accumulation_steps: Any,
    weight: Any,
) -> None:
    """Refuses wrong arguments of `value_and_gradients`.

    Raises:
        ValueError: there are no variables, or a variable is float8 state, whose gradient is its
            new value.
        ValueError: a size is not a positive integer, or a size comes with a Window.
        TypeError: a function is not callable, or `variables` holds something that is no variable.
    """
    for name, function in (("loss_fn", loss_fn), ("weight", weight)):
        may_be_other = function is None or is_sum(function)
        if not callable(function) and not (name == "weight" and may_be_other):
            raise TypeError(
                f"{name} must be a function of one batch. Got {name}={function!r}. "
                f"Pass {name}=lambda batch: ..."
            )
    flat_leaves("batch", batch)
    flat = flat_leaves("variables", variables)
    if not flat:
        raise ValueError(
            "variables must hold at least one variable. "
            f"Got variables={variables!r}, as trainable_variables are before a model is built. "
            "Call model.build(input_shape), or the model on one batch, and read them then."
        )
    for variable in flat:
        is_array = hasattr(variable, "dtype") and hasattr(variable, "shape")
        if not is_array or isinstance(variable, type | np.ndarray) or variable.dtype == tf.string:
            raise TypeError(
                "variables must be a nested structure of variables. "
                f"Got one of type {type(variable).__name__}. "
                "Pass for example model.trainable_variables."
            )
        if getattr(variable, "overwrite_with_gradient", False):
            raise ValueError(
                f"Gradients must add up over micro-batches. Got {variable.path!r} of a float8 "
                "layer, whose gradient is its new value. Train the model with fit and "
                "virtualbatch.keras.accumulate."
            )
    check_cut_or_auto(batch, microbatch_size, accumulation_steps)


def flat_leaves(name: str, structure: Any) -> list[Any]:
    """The leaves of an argument, as TensorFlow finds them.

    Args:
        name: the name of the argument.
        structure: the value of the argument.

    Raises:
        TypeError: TensorFlow cannot find the leaves.
    """
    try:
        # The structure is also built again here, as it is for each micro-batch.
        return list(tf.nest.flatten(tf.nest.map_structure(lambda leaf: leaf, structure)))
    # TensorFlow sorts keys, calls the user's mappings, and follows nested structures to any depth.
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be a structure whose leaves tf.nest can find. Got {name} of type "
            f"{type(structure).__name__}: {error}. Pass dicts with keys that can be sorted, and "
            "nest them less deeply."
        ) from error
