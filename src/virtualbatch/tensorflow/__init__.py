"""The TensorFlow engine: the gradient of a whole batch, computed a micro-batch at a time.

A batch becomes segments of micro-batches, their weights become shares, one loop sums each
micro-batch's share of the gradient, and the sums come back as `tape.gradient` would give them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, overload

import tensorflow as tf

from virtualbatch.certify.certificate import Certificate
from virtualbatch.certify.row_by_row import of_rows
from virtualbatch.certify.step import refuse_window
from virtualbatch.noise.estimate import WindowStats
from virtualbatch.plan.auto import Auto, CurrentSize, is_automatic
from virtualbatch.plan.plan import Plan
from virtualbatch.plan.retry import Memory, run_as_it_is, run_until_it_fits
from virtualbatch.tensorflow._batch import segments, smaller_segments
from virtualbatch.tensorflow._certify.certificate import certificate
from virtualbatch.tensorflow._certify.first_window import prove_first_window
from virtualbatch.tensorflow._certify.loop import certify_loop
from virtualbatch.tensorflow._checks import check_call
from virtualbatch.tensorflow._plan.memory import ERRORS, largest_variables, left_bytes
from virtualbatch.tensorflow._plan.program import plan_of, planned_size
from virtualbatch.tensorflow._remembered import remembered
from virtualbatch.tensorflow._replicas import (
    refuse_eager_replicas,
    refuse_on_replicas,
    refuse_planning_replicas,
    refuse_replicas_out_of_step,
    refuse_values_of_replicas,
    replicas,
)
from virtualbatch.tensorflow._rowwise.function import Rowwise
from virtualbatch.tensorflow._rowwise.rowwise import rowwise
from virtualbatch.tensorflow._segment import Segment
from virtualbatch.tensorflow._weights import window_shares
from virtualbatch.tensorflow._window import Program
from virtualbatch.window.not_finite import rows_in_order
from virtualbatch.window.options import check_flags
from virtualbatch.window.stream import windows
from virtualbatch.window.terms import GivenWeight
from virtualbatch.window.window import Window, refuse_sorted_rows

__all__ = ["Window", "certify", "certify_loop", "plan", "rowwise", "value_and_gradients", "windows"]


def __dir__() -> list[str]:
    """What is public: completion shows no other names."""
    return __all__


@overload
def value_and_gradients(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    variables: Any,
    *,
    microbatch_size: int | str | Auto | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    has_aux: Literal[False] = False,
    stats: Literal[False] = False,
    check: bool = True,
) -> tuple[tf.Tensor, Any]: ...
@overload
def value_and_gradients(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    variables: Any,
    *,
    microbatch_size: int | str | Auto | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    has_aux: Literal[True],
    stats: Literal[False] = False,
    check: bool = True,
) -> tuple[tuple[tf.Tensor, Any], Any]: ...
@overload
def value_and_gradients(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    variables: Any,
    *,
    microbatch_size: int | str | Auto | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    has_aux: Literal[False] = False,
    stats: Literal[True],
    check: bool = True,
) -> tuple[tf.Tensor, Any, WindowStats]: ...
@overload
def value_and_gradients(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    variables: Any,
    *,
    microbatch_size: int | str | Auto | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    has_aux: Literal[True],
    stats: Literal[True],
    check: bool = True,
) -> tuple[tuple[tf.Tensor, Any], Any, WindowStats]: ...
@overload
def value_and_gradients(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    variables: Any,
    *,
    microbatch_size: int | str | Auto | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    has_aux: bool = False,
    stats: bool = False,
    check: bool = True,
) -> Any: ...
def value_and_gradients(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    variables: Any,
    *,
    microbatch_size: int | str | Auto | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    has_aux: bool = False,
    stats: bool = False,
    check: bool = True,
) -> Any:
    """The loss of a whole batch and its gradients, on the memory of a micro-batch.

    Works eagerly and inside `tf.function`; there the micro-batches are one loop in the graph, and
    the loss is traced once per micro-batch shape.

    Inside `strategy.run` the batch is the rows of one replica, any number of them, also none. The
    gradients are this replica's part of those of all rows: `optimizer.apply_gradients` adds the
    parts up, as it does with the gradients of a tape. All else is that of all rows, the same on
    all replicas, but for leaves of aux with one entry per row. `strategy.run` stands in a
    `tf.function`, and this call in no other inside of it.

    Args:
        loss_fn: batch -> scalar mean, or a dict of term names to scalar means whose sum is the
            loss. With `has_aux=True` it returns (loss, aux).
        batch: nested structure whose arrays share their leading axis, the rows; or a `Window`,
            and then no size is given.
        variables: what to differentiate with respect to, in any nested structure.
        microbatch_size: rows of one forward and backward on one device; or "auto" or an `Auto`,
            which plan it at the first batch, in a graph while it is traced, for one device only.
        accumulation_steps: micro-batches per window: `microbatch_size = ceil(rows / steps)`.
        weight: micro-batch -> what its mean was divided by, a scalar >= 0 (rows when None); for
            a dict of terms a dict with the same keys, None marking a term that does not depend
            on the rows and "sum" one that is a sum; or "sum" for a loss that is a sum.
        has_aux: whether `loss_fn` returns something beside the loss. Leaves of aux with one entry
            per row come back concatenated in row order, other floating leaves averaged by rows,
            integers summed, in at least 32 bits.
        stats: whether the `WindowStats` of the window are returned too, from which
            `virtualbatch.NoiseScale` estimates the noise of its gradients.
        check: whether eagerly the first window of a loss proves itself: a few rows of it run in
            parts and together, which calls `loss_fn` some ten times more, once. In a graph run
            `certify` once.

    Returns:
        (loss, gradients), or ((loss, aux), gradients), and the stats last, which need one more
        reduction of the gradients where there are several replicas. The gradients have the
        structure and dtype of the variables as `tape.gradient` gives them: None where the loss
        does not depend on a variable, IndexedSlices for embeddings.

    Raises:
        ValueError: there are no variables, sizes are not positive integers or disagree, rows differ
            or are missing, a weight is negative or not finite, the loss is not a scalar, names of
            terms differ, or the first rows show that gradients of micro-batches do not add up to
            their batch's. Of several replicas: the call is eager, a size is to be planned, or the
            strategy does not train them in step.
        TypeError: the loss is not a floating tensor, or an argument is of the wrong kind.
        tf.errors.InvalidArgumentError: the same faults of rows and sizes, in a graph that learns
            its shapes at run time.

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
    """A window of the size in force; eagerly once more with a smaller one if memory runs out."""
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


def plan(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    variables: Any,
    *,
    weight: GivenWeight = None,
    has_aux: bool = False,
    memory_limit: int | str | None = None,
) -> Plan:
    """Finds the micro-batch that fits and is fast, before anything is trained.

    TensorFlow cannot tell a window's memory beforehand, so windows are run in a graph, smallest
    first, and their peak is measured. It grows linearly with the micro-batch size, so two or three
    measurements predict every size. Then a few sizes are timed, the whole batch each, for ten
    seconds at the most; the smallest within 2 % of the fastest is chosen. Variables are as before
    the call.

    Args:
        loss_fn: as in `value_and_gradients`, like all arguments that are not explained here.
        batch: a batch, not a Window.
        variables: as in `value_and_gradients`.
        weight: as in `value_and_gradients`.
        has_aux: as in `value_and_gradients`.
        memory_limit: what variables, the batch, gradients and activations may take together, such
            as the 2 * 2**30 or "2GiB" that a budget leaves beside optimizer state, or "80%" of
            what they may take now; None for all that the device, or the container that this
            process is in, has left besides what is held already.

    Returns:
        The plan. On the host a peak is that of the resident memory, and is off by some MiB.

    Raises:
        ValueError: not even one row fits, a limit does not parse, the batch is already cut, or
            the call is inside a graph.
        TypeError: see `value_and_gradients`.
        NotImplementedError: neither a GPU nor the operating system tells a peak.

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
            "A plan is made outside of graphs, because it runs some. Got a call inside "
            "tf.function. Call it before."
        )

    return plan_of(Program(loss_fn, variables, weight, has_aux, stats=False), batch, memory_limit)


def certify(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    variables: Any,
    *,
    microbatch_size: int | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    has_aux: bool = False,
) -> Certificate:
    """Proves that accumulation gives the gradient of the whole batch, or names what breaks it.

    The batch runs uncut and in micro-batches, with the same random numbers for the same rows; so
    it must fit in memory uncut. It runs eagerly, functions of `tf.function` too. Variables are as
    before the call; TensorFlow's global random generator has gone on.

    Args:
        loss_fn: as in `value_and_gradients`, like all arguments that are not explained here; or
            what `rowwise` returned, of which then every output is compared, by its own size if none
            is given.
        batch: a batch, not a Window.
        variables: as in `value_and_gradients`.
        microbatch_size: rows of one forward and backward.
        accumulation_steps: micro-batches per window.
        weight: as in `value_and_gradients`.
        has_aux: as in `value_and_gradients`.

    Returns:
        The certificate, with the error of each variable and named findings.

    Raises:
        ValueError: there is only one row or one micro-batch, random numbers do not belong to
            rows, or the call is inside a graph; else see `value_and_gradients`.
        TypeError: see `value_and_gradients`.

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
