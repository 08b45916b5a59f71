"""The ways in which a user runs the engine, and the uncut batch that it must equal."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from tests.tiers import tiered

# Eager; a graph that knows the rows; one that learns them at run time; XLA.
MODES = ["eager", "static", "dynamic", "jit"]
# A graph that knows its rows is a simpler one than a graph that does not.
QUICK = ["eager", "dynamic"]
TIERED = tiered(MODES, QUICK, "a further way to run it; XLA takes seconds for a program")
WITHOUT_XLA = tiered(MODES[:3], QUICK, "a graph that knows its rows is a simpler one")


def compiled(mode: str, function: Callable[[Any], Any], batch: Any) -> Callable[[Any], Any]:
    """A function of one batch, as the mode runs it."""
    if mode == "eager":
        return function
    if mode == "static":
        return tf.function(function)
    if mode == "dynamic":
        return tf.function(function, input_signature=[open_rows(batch)])
    if mode == "jit":
        return tf.function(function, jit_compile=True)
    raise ValueError(f"mode {mode}")


def open_rows(batch: Any) -> Any:
    """Specs of a batch that leave its rows open."""

    def spec(leaf: Any) -> Any:
        found = tf.type_spec_from_value(leaf)
        shape = [None, *found.shape[1:]]
        if isinstance(found, tf.RaggedTensorSpec):
            return tf.RaggedTensorSpec(shape, found.dtype, found.ragged_rank)
        return tf.TensorSpec(shape, found.dtype)

    return tf.nest.map_structure(spec, batch)


def uncut(loss_fn: Callable[[Any], Any], batch: Any, variables: Any) -> tuple[Any, list[Any]]:
    """Loss and gradients of the whole batch, as NumPy arrays; a dict of terms is summed."""
    with tf.GradientTape() as tape:
        loss = loss_fn(batch)
        loss = tf.add_n(list(loss.values())) if isinstance(loss, dict) else loss
    return loss.numpy(), arrays(tape.gradient(loss, variables))


def arrays(gradients: Any) -> list[Any]:
    """Gradients as a flat list of dense NumPy arrays and Nones."""
    return [
        None if leaf is None else np.asarray(tf.convert_to_tensor(leaf))
        for leaf in tf.nest.flatten(gradients)
    ]
