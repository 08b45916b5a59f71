"""`value_and_gradients`: cuts a batch, and runs its window in a graph, or eagerly until it fits."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, TypedDict, Unpack, overload

import tensorflow as tf

from virtualbatch.noise.estimate import WindowStats
from virtualbatch.plan.auto import Auto, CurrentSize, is_automatic
from virtualbatch.plan.retry import Memory, run_as_it_is, run_until_it_fits
from virtualbatch.tensorflow._batch import segments, smaller_segments
from virtualbatch.tensorflow._certify.first_window import prove_first_window
from virtualbatch.tensorflow._checks import check_call
from virtualbatch.tensorflow._plan.memory import ERRORS, largest_variables, left_bytes
from virtualbatch.tensorflow._plan.program import planned_size
from virtualbatch.tensorflow._remembered import remembered
from virtualbatch.tensorflow._replicas import (
    refuse_eager_replicas,
    refuse_planning_replicas,
    refuse_replicas_out_of_step,
    refuse_values_of_replicas,
    replicas,
)
from virtualbatch.tensorflow._segment import Segment
from virtualbatch.tensorflow._weights import window_shares
from virtualbatch.tensorflow._window import Program
from virtualbatch.window.not_finite import rows_in_order
from virtualbatch.window.options import check_flags
from virtualbatch.window.terms import AuxLossFn, GivenWeight, LossFn
from virtualbatch.window.window import refuse_sorted_rows


class _Options(TypedDict, total=False):
    """The arguments of `value_and_gradients` that do not change the form of its result."""

    microbatch_size: int | Literal["auto"] | Auto | None
    accumulation_steps: int | None
    weight: GivenWeight
    check: bool


@overload
def value_and_gradients(
    loss_fn: LossFn,
    batch: Any,
    variables: Any,
    *,
    has_aux: Literal[False] = False,
    stats: Literal[False] = False,
    **options: Unpack[_Options],
) -> tuple[tf.Tensor, Any]: ...
@overload
def value_and_gradients(
    loss_fn: AuxLossFn,
    batch: Any,
    variables: Any,
    *,
    has_aux: Literal[True],
    stats: Literal[False] = False,
    **options: Unpack[_Options],
) -> tuple[tuple[tf.Tensor, Any], Any]: ...
@overload
def value_and_gradients(
    loss_fn: LossFn,
    batch: Any,
    variables: Any,
    *,
    has_aux: Literal[False] = False,
    stats: Literal[True],
    **options: Unpack[_Options],
) -> tuple[tf.Tensor, Any, WindowStats]: ...
@overload
def value_and_gradients(
    loss_fn: AuxLossFn,
    batch: Any,
    variables: Any,
    *,
    has_aux: Literal[True],
    stats: Literal[True],
    **options: Unpack[_Options],
) -> tuple[tuple[tf.Tensor, Any], Any, WindowStats]: ...
@overload
def value_and_gradients(
    loss_fn: LossFn,
    batch: Any,
    variables: Any,
    *,
    has_aux: Literal[False] = False,
    stats: bool,
    **options: Unpack[_Options],
) -> Any: ...
@overload
def value_and_gradients(
    loss_fn: AuxLossFn,
    batch: Any,
    variables: Any,
    *,
    has_aux: Literal[True],
    stats: bool,
    **options: Unpack[_Options],
) -> Any: ...
def value_and_gradients(
    loss_fn: LossFn | AuxLossFn,
    batch: Any,
    variables: Any,
    *,
    microbatch_size: int | Literal["auto"] | Auto | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    has_aux: bool = False,
    stats: bool = False,
    check: bool = True,
) -> Any:
    """The loss of a whole batch and its gradients, with the memory of a micro-batch.

    It works eagerly and inside `tf.function`. In a graph the micro-batches are one loop, and the
    loss is traced once per micro-batch shape. If memory runs out eagerly, the window runs again
    with smaller micro-batches.

    Inside `strategy.run`, the batch is the rows of one replica. A replica may have any number of
    rows, also none. The gradients are the part of this replica, and `optimizer.apply_gradients`
    adds the parts up, as it does with the gradients of a tape. The loss, aux and stats are those of
    all rows, the same on all replicas, except that tensors of aux with one entry per row hold the
    rows of the replica. Call `strategy.run` in one `tf.function`, and this function directly in it
    and not in an inner one.

    Args:
        loss_fn: a function of a batch. It returns a scalar mean, or a dict from names of terms to
            scalar means whose sum is the loss. With `has_aux=True` it returns `(loss, aux)`.
        batch: the whole batch: a nested structure of tensors whose first axis is the rows. Or a
            `Window`, which is already cut.
        variables: the variables to differentiate with respect to, in any nested structure.
        microbatch_size: the rows of one forward and backward on one device. `"auto"` or an `Auto`
            plans the size at the first batch, on one device only; in a graph that is while the
            call is traced.
        accumulation_steps: the micro-batches per window, instead of a size:
            `microbatch_size = ceil(rows / accumulation_steps)`.
        weight: what the mean of a micro-batch was divided by. None means its rows. `"sum"` means
            that the loss is a sum. Otherwise a function of a micro-batch that returns a number
            `>= 0`. For a loss of several terms it returns a dict with the same names, with None
            for a term that does not depend on the rows and `"sum"` for a term that is a sum.
        has_aux: whether `loss_fn` returns `(loss, aux)`. Tensors of aux with one entry per row
            come back concatenated in the order of the rows. Other floating tensors are averaged by
            rows. Integers are summed, in at least 32 bits.
        stats: whether to return the `WindowStats` too, from which `virtualbatch.NoiseScale`
            estimates the noise of the gradients. With several replicas they cost one more
            reduction of the gradients.
        check: whether the first window of a loss is checked eagerly: a few of its rows run in
            parts and together, and both gradients must agree. This calls `loss_fn` about ten times
            more, once. In a graph nothing is checked, so run `certify` once.

    Returns:
        `(loss, gradients)`, or `((loss, aux), gradients)` with `has_aux=True`. With `stats=True`
        the stats are the last item. The gradients have the structure of the variables, and are
        what `tape.gradient` gives: None where the loss does not depend on a variable, and
        `tf.IndexedSlices` for embeddings.

    Raises:
        ValueError: there are no variables.
        ValueError: a size is not a positive integer, or two sizes disagree.
        ValueError: tensors have different numbers of rows, or the batch has none.
        ValueError: a weight is negative or not finite, or its terms are not those of the loss.
        ValueError: the loss is not a scalar.
        ValueError: the first rows show that the gradients of micro-batches do not add up.
        ValueError: with several replicas: the call is eager, a size is to be planned, or the
            strategy does not train the replicas in step.
        TypeError: the loss is not a floating tensor, or an argument has the wrong type.
        tf.errors.InvalidArgumentError: rows or sizes are wrong in a graph whose shapes are known
            only when it runs.

    Source:
        The law in docs/how_it_works/law.md.

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
    check_flags(has_aux=has_aux, stats=stats, check=check)
    check_call(loss_fn, batch, variables, microbatch_size, accumulation_steps, weight)
    refuse_values_of_replicas(batch, variables)
    refuse_sorted_rows(batch, stats)
    refuse_replicas_out_of_step()
    refuse_eager_replicas()
    program = Program(loss_fn, variables, weight, has_aux, stats).converted()
    return _in_micro_batches(program, batch, microbatch_size, accumulation_steps, check)


@tf.autograph.experimental.do_not_convert
def _in_micro_batches(
    program: Program,
    batch: Any,
    microbatch_size: Any,
    accumulation_steps: int | None,
    check: bool,
) -> Any:
    """Runs a window. Eagerly, it runs again with smaller micro-batches if memory runs out."""
    size: CurrentSize | None = None
    if is_automatic(microbatch_size):
        refuse_planning_replicas()
        size = planned_size(program, batch, microbatch_size)
        microbatch_size = size.rows
    cut = segments(
        batch,
        microbatch_size,
        accumulation_steps,
        weighted=program.weight is not None,
        counted=program.has_aux or program.stats,
        may_be_empty=replicas() > 1,
    )
    if not tf.executing_eagerly():
        return program.run(cut)
    memory = Memory(ERRORS, left_bytes)
    known = remembered(program.variables)

    def run(cut: Sequence[Segment]) -> Any:
        shares = window_shares(cut, program.weight)
        if check:
            prove_first_window(program, batch, cut, shares)
        losses: list[dict[Any, Any]] = []
        result = program.run(cut, shares, losses)
        loss = result[0][0] if program.has_aux else result[0]
        if known.losses.listens(float(loss)):
            rows = [segment.rows(0) for segment in cut]
            known.losses.hear(tf.nest.map_structure(float, losses), rows_in_order(batch, rows))
        return result

    if cut[0].rows(0) is None:
        return run_as_it_is(lambda: run(cut), memory)
    asked = microbatch_size or max(segment.rows(0) for segment in cut)
    size = size or known.sizes.asked(asked)
    if size.rows < asked:
        cut = smaller_segments(batch, size.rows)

    result = run_until_it_fits(
        run,
        cut,
        lambda cut: max(segment.rows(0) for segment in cut),
        partial(smaller_segments, batch),
        size,
        memory,
        partial(largest_variables, program.variables),
    )
    size.succeeded()
    return result
