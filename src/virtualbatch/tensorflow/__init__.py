"""The TensorFlow engine: the gradient of a whole batch, computed a micro-batch at a time.

A batch becomes segments of micro-batches, their weights become shares, one loop sums each
micro-batch's share of the gradient, and the sums come back as `tape.gradient` would give them.
"""

from typing import Any

import tensorflow as tf

from virtualbatch.certify.certificate import Certificate
from virtualbatch.certify.row_by_row import of_rows
from virtualbatch.certify.step import refuse_window
from virtualbatch.plan.plan import Plan
from virtualbatch.tensorflow._certify.certificate import certificate
from virtualbatch.tensorflow._certify.loop import certify_loop
from virtualbatch.tensorflow._checks import check_call
from virtualbatch.tensorflow._plan.program import plan_of
from virtualbatch.tensorflow._replicas import (
    refuse_on_replicas,
    refuse_planning_replicas,
    refuse_values_of_replicas,
)
from virtualbatch.tensorflow._rowwise.function import Rowwise
from virtualbatch.tensorflow._rowwise.rowwise import rowwise
from virtualbatch.tensorflow._value_and_gradients import value_and_gradients
from virtualbatch.tensorflow._window import Program
from virtualbatch.window.options import check_flags
from virtualbatch.window.stream import windows
from virtualbatch.window.terms import AuxLossFn, GivenWeight, LossFn
from virtualbatch.window.window import Window

__all__ = ["Window", "certify", "certify_loop", "plan", "rowwise", "value_and_gradients", "windows"]


def __dir__() -> list[str]:
    """What is public: completion shows no other names."""
    return __all__


def plan(
    loss_fn: LossFn | AuxLossFn,
    batch: Any,
    variables: Any,
    *,
    weight: GivenWeight = None,
    has_aux: bool = False,
    memory_limit: int | str | None = None,
) -> Plan:
    """Finds the micro-batch size that fits in memory and is fast, before you train.

    TensorFlow does not know the memory of a window in advance. So windows run in a graph, the
    smallest first, and their peak memory is measured. It grows linearly with the micro-batch size,
    so two or three measurements predict every size. Then a few sizes are timed, a whole batch
    each, for at most ten seconds. The smallest size within 2 % of the fastest is chosen.

    Variables are as before the call.

    Args:
        loss_fn: a function of a batch that returns its mean loss, as for `value_and_gradients`.
        batch: the whole batch, in the form that you train with. A `Window` is refused.
        variables: the variables to differentiate with respect to, in any nested structure.
        weight: what the mean of a micro-batch was divided by: None for its rows, `"sum"` for a
            loss that is a sum, or a function of a micro-batch. See `value_and_gradients`.
        has_aux: whether `loss_fn` returns `(loss, aux)`.
        memory_limit: the bytes that variables, the batch, gradients and activations may take
            together. Optimizer state is not counted, so leave room for it. Pass a number of bytes,
            a text such as `"2GiB"`, or a share such as `"80%"` of what they may take now. None
            means all that the device, or the container of this process, has free.

    Returns:
        The plan. On the host a peak is that of the resident memory, which is off by some MiB.

    Raises:
        ValueError: not even one row fits, the limit does not parse, the batch is a `Window`, or
            the call is inside a graph.
        ValueError: an argument is wrong as in `value_and_gradients`.
        TypeError: an argument has the wrong type.
        NotImplementedError: neither a GPU nor the operating system reports peak memory.

    Example:
        >>> kernel = tf.Variable(tf.ones([64, 32]))
        >>> found = plan(lambda x: tf.reduce_mean(x @ kernel), tf.ones([128, 64]), [kernel])
        >>> found.microbatch_size <= 128
        True
    """
    check_flags(has_aux=has_aux)
    check_call(loss_fn, batch, variables, "auto", None, weight)
    refuse_planning_replicas()
    refuse_values_of_replicas(batch, variables)
    if not tf.executing_eagerly():
        raise ValueError(
            "plan must be called outside of tf.function, because it runs graphs of its own. "
            "Got a call inside tf.function. Call it before."
        )

    return plan_of(Program(loss_fn, variables, weight, has_aux, stats=False), batch, memory_limit)


def certify(
    loss_fn: LossFn | AuxLossFn | Rowwise[Any],
    batch: Any,
    variables: Any,
    *,
    microbatch_size: int | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    has_aux: bool = False,
) -> Certificate:
    """Proves that accumulation gives the gradient of the whole batch, or names what breaks it.

    The batch runs uncut and in micro-batches, with the same random numbers for the same rows, and
    the two gradients are compared. So the batch must fit in memory uncut. Everything runs eagerly,
    also functions that `tf.function` has compiled.

    Both runs are in the dtypes of the model, because variables of TensorFlow keep their dtype. So
    a float32 model is compared in float32, with the tolerance of float32; the notes of the
    certificate name the dtype. The rounding that the model itself adds is measured, by running the
    uncut batch again with its rows in other orders. For a comparison in float64 build the model
    with float64 variables.

    Variables are as before the call. The global random generator of TensorFlow has advanced.

    Args:
        loss_fn: a function of a batch that returns its mean loss, as for `value_and_gradients`; or
            a function that `rowwise` returned. Then every output is compared.
        batch: the whole batch, with two rows or more. A `Window` is refused.
        variables: the variables to differentiate with respect to, in any nested structure.
        microbatch_size: the rows of one forward and backward. For a `rowwise` function the size
            that it was made with is used if you pass none.
        accumulation_steps: the micro-batches per window, instead of a size.
        weight: what the mean of a micro-batch was divided by: None for its rows, `"sum"` for a
            loss that is a sum, or a function of a micro-batch. See `value_and_gradients`.
        has_aux: whether `loss_fn` returns `(loss, aux)`.

    Returns:
        The certificate, with the error of each variable and named findings.

    Raises:
        ValueError: there is only one row or one micro-batch, random numbers do not belong to rows,
            or the call is inside a graph.
        ValueError: an argument is wrong as in `value_and_gradients`.
        TypeError: an argument has the wrong type.

    Example:
        >>> weights = tf.Variable([1.0, 2.0])
        >>> found = certify(
        ...     lambda batch: tf.reduce_sum(tf.linalg.matvec(batch, weights)),
        ...     tf.ones([6, 2]),
        ...     [weights],
        ...     microbatch_size=2,
        ... )
        >>> found.exact, found.findings[0].kind
        (False, 'sum_loss')
    """
    rowwise_fn = loss_fn if isinstance(loss_fn, Rowwise) else None
    if rowwise_fn and microbatch_size is None and accumulation_steps is None:
        microbatch_size, accumulation_steps = rowwise_fn.sizes
    check_flags(has_aux=has_aux)
    check_call(loss_fn, batch, variables, microbatch_size, accumulation_steps, weight)
    refuse_on_replicas("certify compares on one device.", "Call it outside of strategy.run.")
    refuse_values_of_replicas(batch, variables)
    program = Program(loss_fn, variables, weight, has_aux, stats=False)
    if rowwise_fn:
        refuse_window(batch)
        program, batch = rowwise_fn.certified(batch, variables)
        return of_rows(certificate(program, batch, microbatch_size, accumulation_steps))
    return certificate(program, batch, microbatch_size, accumulation_steps)
