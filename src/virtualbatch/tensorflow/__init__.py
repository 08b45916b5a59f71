"""The TensorFlow engine: the gradient of a whole batch, computed a micro-batch at a time.

A batch becomes segments of micro-batches, their weights become shares, one loop sums each
micro-batch's share of the gradient, and the sums come back as `tape.gradient` would give them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from virtualbatch.split import Window, check_sizes, windows
from virtualbatch.tensorflow._aux import WindowAux
from virtualbatch.tensorflow._batch import segments
from virtualbatch.tensorflow._gradients import (
    add,
    finished,
    loss_dtype,
    scalar_terms,
    scaled_gradients,
    selected_loss,
    split_sparse,
)
from virtualbatch.tensorflow._loop import Output, fold, trace
from virtualbatch.tensorflow._weights import window_shares
from virtualbatch.terms import loss_and_aux, loss_terms

__all__ = ["Window", "value_and_gradients", "windows"]


class _Micro(NamedTuple):
    """What one micro-batch gives: its share of loss and gradient, and its aux as it is."""

    loss: Any
    dense: list[Any]
    sparse: list[Any]
    aux: Any


def value_and_gradients(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    variables: Any,
    *,
    microbatch_size: int | None = None,
    accumulation_steps: int | None = None,
    weight: Callable[[Any], Any] | None = None,
    has_aux: bool = False,
) -> tuple[Any, Any]:
    """The loss of a whole batch and its gradients, on the memory of a micro-batch.

    Works eagerly and inside `tf.function`; there the micro-batches are one loop in the graph, and
    the loss is traced once per micro-batch shape.

    Args:
        loss_fn: batch -> scalar mean, or a dict of term names to scalar means whose sum is the
            loss. With `has_aux=True` it returns (loss, aux).
        batch: nested structure whose arrays share their leading axis, the rows; or a `Window`,
            and then no size is given.
        variables: what to differentiate with respect to, in any nested structure.
        microbatch_size: rows of one forward and backward.
        accumulation_steps: micro-batches per window: `microbatch_size = ceil(rows / steps)`.
        weight: micro-batch -> what its mean was divided by, a scalar >= 0 (rows when None); for
            a dict of terms a dict with the same keys, None marking a term that does not depend
            on the rows.
        has_aux: whether `loss_fn` returns something beside the loss. Leaves of aux with one entry
            per row come back concatenated in row order, other floating leaves averaged by rows,
            integers summed.

    Returns:
        (loss, gradients), or ((loss, aux), gradients). The gradients have the structure and dtype
        of the variables as `tape.gradient` gives them: None where the loss does not depend on a
        variable, IndexedSlices for embeddings.

    Raises:
        ValueError: sizes are not positive integers or disagree, rows differ or are missing, a
            weight is negative or not finite, the loss is not a scalar, or names of terms differ.
        TypeError: the loss is not a floating tensor, or an argument is of the wrong kind.
        tf.errors.InvalidArgumentError: the same faults of rows and sizes, in a graph that learns
            its shapes at run time.

    Source:
        The law in docs/law.md.

    Example:
        >>> weights = tf.Variable([1.0, 2.0])
        >>> rows = tf.constant([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> loss, gradients = value_and_gradients(
        ...     lambda batch: tf.reduce_mean(tf.linalg.matvec(batch, weights)),
        ...     rows,
        ...     [weights],
        ...     microbatch_size=2,
        ... )
        >>> print(f"{loss:.3f}", gradients[0].numpy().round(3))
        2.000 [0.667 0.667]
    """
    _check_call(loss_fn, batch, variables, microbatch_size, accumulation_steps, weight)
    # AutoGraph does not look into this library, but must go on converting what the user wrote.
    autograph = tf.__internal__.autograph
    status = autograph.control_status_ctx()
    if not tf.executing_eagerly():
        loss_fn = autograph.tf_convert(loss_fn, status)
        weight = weight and autograph.tf_convert(weight, status)
    return _value_and_gradients(
        loss_fn, batch, variables, microbatch_size, accumulation_steps, weight, has_aux
    )


def _check_call(
    loss_fn: Any,
    batch: Any,
    variables: Any,
    microbatch_size: Any,
    accumulation_steps: Any,
    weight: Any,
) -> None:
    for name, function in (("loss_fn", loss_fn), ("weight", weight)):
        if not callable(function) and not (name == "weight" and function is None):
            raise TypeError(
                f"{name} must be a function of one batch. Got {name}={function!r}. "
                f"Pass {name}=lambda batch: ..."
            )
    for variable in tf.nest.flatten(variables):
        if not hasattr(variable, "dtype") or not hasattr(variable, "shape"):
            raise TypeError(
                "variables must be a nested structure of variables. "
                f"Got one of type {type(variable).__name__}. "
                "Pass for example model.trainable_variables."
            )
    if not isinstance(batch, Window):
        check_sizes(microbatch_size, accumulation_steps)
    elif microbatch_size is not None or accumulation_steps is not None:
        raise ValueError(
            "A Window is already cut. "
            f"Got microbatch_size={microbatch_size} and accumulation_steps={accumulation_steps} "
            "with a Window. Leave both out."
        )


@tf.autograph.experimental.do_not_convert
def _value_and_gradients(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    variables: Any,
    microbatch_size: int | None,
    accumulation_steps: int | None,
    weight: Callable[[Any], Any] | None,
    has_aux: bool,
) -> tuple[Any, Any]:
    flat_variables = tf.nest.flatten(variables)
    cut = segments(batch, microbatch_size, accumulation_steps)
    shares = window_shares(cut, weight)
    several = shares.terms is not None and len(shares.terms) > 1
    dtypes: list[tf.DType] = []

    def micro(index: Any, microbatch: Any) -> _Micro:
        with tf.GradientTape(persistent=several) as tape:
            loss, aux = loss_and_aux(loss_fn(microbatch), has_aux)
            named = loss_terms(loss)
            terms = scalar_terms(named.values())
        dtypes.append(loss_dtype(terms))
        parts = shares.of(list(named), index)
        may_be_empty = weight is not None
        gradients = scaled_gradients(tape, terms, parts, flat_variables, may_be_empty)
        return _Micro(selected_loss(terms, parts, may_be_empty), *split_sparse(gradients), aux)

    traced = trace(cut, micro)
    aux = WindowAux(loss_fn, cut, traced, shares.rows) if has_aux else None

    def route(index: Any, found: _Micro) -> Output:
        sums, rows = aux.route(index, found.aux) if aux else ([], [])
        return Output([found.loss, *found.dense, *sums], [*found.sparse, *rows])

    sums, rows = fold(traced, route, add)
    count = len(flat_variables)
    gradients = finished(sums[1 : 1 + count], rows[: 2 * count], flat_variables)
    gradients = tf.nest.pack_sequence_as(variables, gradients)
    loss = tf.cast(sums[0], dtypes[0])
    if aux:
        return (loss, aux.result(sums[1 + count :], rows[2 * count :])), gradients
    return loss, gradients
