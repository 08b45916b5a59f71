"""Measures whether the other setting of `jit_compile` makes updates of a planned size faster.

On one CPU, XLA is faster for transformers and slower for convolutions, so no default is right.
Keras does not keep whether `jit_compile` was "auto" or set by the user, so the plan reports what is
faster, and changes nothing.
"""

from collections.abc import Callable
from dataclasses import replace
from statistics import fmean

import keras
import tensorflow as tf

from virtualbatch.keras._checks import replica_count
from virtualbatch.keras._train_step import compiled
from virtualbatch.plan.plan import NEARLY_AS_FAST, Plan
from virtualbatch.plan.timing import EARLY, Timing


def compared(model: keras.Model, plan: Plan, update: Callable[[], Callable[[], float]]) -> Plan:
    """A plan that also reports whether its size is faster with or without XLA.

    Args:
        model: a compiled model.
        plan: its plan.
        update: makes the update of the planned size, which is traced at its first run. The update
            is a function () -> seconds that it took.

    Returns:
        The plan, with one more sentence if both settings could be timed.
    """
    # If only one size could be timed, updates are slow, and a second program would take too long.
    timed = len([row for row in plan.rows if row.seconds_per_batch is not None]) > 1
    if model.run_eagerly or replica_count(model) > 1 or not timed:
        return plan
    modes = (model.jit_compile, not model.jit_compile)
    timings = {mode: Timing(update()) for mode in modes}
    for mode in modes:
        with compiled(model, mode) as is_possible:
            if not is_possible or not _loads(timings[mode]):
                return plan
    # Time both in turns, so that other load on the machine slows both alike.
    rounds = [{mode: timings[mode].seconds() for mode in modes} for _ in range(EARLY)]
    now, other = (fmean(found[mode] for found in rounds) for mode in modes)
    return replace(plan, reason=f"{plan.reason} {_sentence(model.jit_compile, now / other)}")


def _sentence(is_compiled: bool, gain: float) -> str:
    """The times as a sentence.

    Args:
        is_compiled: whether the model is compiled by XLA.
        gain: how many times as fast the other setting is.
    """
    other = "Without XLA" if is_compiled else "With XLA"
    if gain > NEARLY_AS_FAST:
        fix = f"compile(..., jit_compile={not is_compiled})"
        return f"{other} an update is {gain:.2f} times as fast: {fix}."
    return f"{other} an update takes {1 / gain:.2f} times as long."


def _loads(timing: Timing) -> bool:
    """Traces, compiles and runs an update once; False where XLA cannot compile it."""
    try:
        timing.run()
    except tf.errors.OpError:
        return False
    return True
