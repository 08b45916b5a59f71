"""The JAX engine: the gradient of a whole batch, computed a micro-batch at a time.

A batch becomes segments of micro-batches, their weights become shares, one scan sums each
micro-batch's share of the gradient, and the sums come back as `jax.value_and_grad` gives them.
"""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import jax

from virtualbatch.certify.certificate import Certificate
from virtualbatch.jax._arguments import BatchArguments
from virtualbatch.jax._batch import cut_batch, cut_smaller
from virtualbatch.jax._certify.certificate import certificate, check_cut
from virtualbatch.jax._certify.first_window import prove_first_window
from virtualbatch.jax._certify.loop import certify_loop
from virtualbatch.jax._certify.spread_window import prove_spread_window
from virtualbatch.jax._checks import (
    check_accumulator_dtype,
    check_arguments,
    check_dtypes,
    check_options,
    check_values,
    check_words,
)
from virtualbatch.jax._mesh import axes_to_enter
from virtualbatch.jax._plan.automatic import Sizes
from virtualbatch.jax._plan.memory import ERRORS, largest_arrays, left_bytes
from virtualbatch.jax._plan.plan import planned
from virtualbatch.jax._remembered import remembered
from virtualbatch.jax._rows import rows_of
from virtualbatch.jax._rowwise.certificate import certify_rows
from virtualbatch.jax._rowwise.rowwise import RowwiseFunction, rowwise
from virtualbatch.jax._segment import Cut
from virtualbatch.jax._spread import Spread
from virtualbatch.jax._unnamed_axis import tell_once
from virtualbatch.jax._weights import window_shares
from virtualbatch.jax._window import Program, is_traced, positions
from virtualbatch.plan.auto import Auto, CurrentSize, check_cut_or_auto, is_automatic
from virtualbatch.plan.plan import Plan
from virtualbatch.plan.retry import Memory, run_as_it_is, run_until_it_fits
from virtualbatch.window.fingerprint import fingerprint
from virtualbatch.window.not_finite import rows_in_order
from virtualbatch.window.options import check_flags
from virtualbatch.window.stream import windows
from virtualbatch.window.terms import GivenWeight
from virtualbatch.window.window import Window, refuse_sorted_rows

__all__ = ["Window", "certify", "certify_loop", "plan", "rowwise", "value_and_grad", "windows"]


def __dir__() -> list[str]:
    """What is public: completion shows no other names."""
    return __all__


# So that a Window goes through jit, vmap and tree maps as its micro-batches.
jax.tree_util.register_pytree_node(
    Window,
    lambda window: (tuple(window), window.sorted_rows),
    lambda sorted_rows, microbatches: Window(microbatches, sorted_rows=sorted_rows),
)


def value_and_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    batch_argnum: int | Sequence[int] = 1,
    microbatch_size: int | str | Auto | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    accumulator_dtype: Any = None,
    key_argnum: int | None = None,
    axis_name: Any = None,
    grad_fn: Callable[..., Any] | None = None,
    aux_merge: Any = None,
    stats: bool = False,
    check: bool = True,
) -> Callable[..., Any]:
    """`jax.value_and_grad` of a whole batch, on the memory of a micro-batch.

    The function that it returns is pure. Under `jit`, and under any other trace, a window is one
    `lax.scan`, and fun is traced once per micro-batch shape. Outside a trace the micro-batches run
    one after another, as un-jitted JAX runs anything, and weights are checked.

    Args:
        fun: function of positional arguments, the batch among them, that returns a scalar mean,
            or a dict of term names to scalar means whose sum is the loss. With `has_aux=True` it
            returns (loss, aux).
        argnums: which arguments to differentiate with respect to; not the batch.
        has_aux: whether fun returns something beside the loss. Leaves of aux with one entry per
            row come back concatenated in row order, other floating leaves averaged by rows,
            integers summed, in at least 32 bits; integers, booleans and keys that no row changes
            come back as they are.
        batch_argnum: position of the batch: a pytree whose arrays share their leading axis, the
            rows; or a `Window`, and then no size is given. Where several arguments hold rows, all
            of their positions; all are Windows or none, and weight takes as many arguments.
        microbatch_size: rows of one forward and backward on one device; or "auto" or an `Auto`,
            which plan it at the first call, under `jit` while it is traced, and remember it for
            this function, also where fun is made anew at each update.
        accumulation_steps: micro-batches per window: `microbatch_size = ceil(rows / steps)`.
        weight: micro-batch -> what its mean was divided by, a scalar >= 0 (rows when None); for
            a dict of terms a dict with the same keys, None marking a term that does not depend
            on the rows and "sum" one that is a sum; or "sum" for a loss that is a sum.
        accumulator_dtype: dtype of the buffer; None for promote(parameter dtype, float32).
        key_argnum: position of an argument that holds PRNG keys, each of which is folded with the
            number of the micro-batch, so that random numbers differ between micro-batches. A
            window of one micro-batch uses the keys as they are.
        axis_name: mesh axis, or axes, over which the rows are spread. With a mesh in use
            (`jax.set_mesh`) `shard_map` is entered over it: each device accumulates its own rows,
            and all are reduced once per window; keys differ by device, and other axes of the mesh
            stay as they are. Inside a `shard_map` (or a `vmap` or `pmap` of that name) leaves of
            aux with one entry per row are those of the device's own rows, all else is that of the
            rows of all devices.
        grad_fn: what differentiates instead of `jax.value_and_grad`, such as
            `equinox.filter_value_and_grad`. It is called as `grad_fn(function, has_aux=True)`,
            with `argnums=` too unless that is 0.
        aux_merge: how leaves of aux are put together where that is not what has_aux says: "keep",
            "sum", "mean", "max" or "rows" for all of aux, or a prefix of it with one of these or
            None in each place.
        stats: whether the `WindowStats` of the window are returned too, from which
            `virtualbatch.NoiseScale` estimates the noise of its gradients.
        check: whether un-jitted the first window proves itself: a few rows of it run in parts and
            together, which calls fun three times more, once. Under `jit` run `certify` once.

    Returns:
        A function with fun's arguments that returns (value, gradients), or
        ((value, aux), gradients), in the structure and dtypes that `jax.value_and_grad` gives,
        and the stats last.

    Raises:
        ValueError: sizes are not positive integers or disagree (at once); rows differ or are
            missing, another argument holds rows too, a weight is negative or not finite, the loss
            is not a scalar, names of terms differ, or no mesh in use has the axis, or its devices
            do not divide the rows (when called).
        TypeError: the loss is not a floating array, or an argument is of the wrong kind.

    Source:
        The law in docs/how_it_works/law.md.

    Example:
        >>> import jax.numpy as jnp
        >>> rows = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> loss = lambda params, batch: jnp.mean(batch @ params)
        >>> value, gradient = value_and_grad(loss, microbatch_size=2)(jnp.ones(2), rows)
        >>> print(f"{value:.3f} {gradient[0]:.3f} {gradient[1]:.3f}")
        1.333 0.667 0.667
    """
    check_flags(has_aux=has_aux, stats=stats, check=check)
    check_options(
        {"fun": fun, "weight": weight, "grad_fn": grad_fn},
        {"argnums": argnums, "batch_argnum": batch_argnum, "key_argnum": key_argnum},
        microbatch_size,
        accumulation_steps,
    )
    check_words(aux_merge, has_aux)
    check_accumulator_dtype(accumulator_dtype)
    rows = BatchArguments(batch_argnum)
    program = Program(
        rows.function(fun),
        argnums,
        has_aux,
        rows.position,
        rows.weight(weight),
        accumulator_dtype,
        key_argnum,
        axis_name,
        grad_fn,
        stats,
        aux_merge,
    )
    computed = fingerprint(fun, weight, grad_fn, repr((argnums, batch_argnum, has_aux, key_argnum)))

    sizes = Sizes(fun, computed, rows.position, microbatch_size, axis_name, program.window)

    @wraps(fun)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        check_arguments(args, batch_argnum, key_argnum, argnums)
        args = rows.gathered(args)
        batch = args[rows.position]
        check_cut_or_auto(batch, microbatch_size, accumulation_steps)
        refuse_sorted_rows(batch, stats)
        traced = is_traced(args, kwargs)
        if not traced:
            check_values(args)
        given: Any = microbatch_size
        size: CurrentSize | None = None
        if is_automatic(given):
            program.refuse_uncut_rows(args, kwargs, rows_of(batch, "batch"))
            size = sizes.planned(args, kwargs)
            given = size.rows
        cut_own = partial(
            cut_batch,
            microbatch_size=given,
            accumulation_steps=accumulation_steps,
            weighted=weight is not None,
        )
        axes = axes_to_enter(axis_name)
        if axes is not None:
            spread = Spread(program, axes, partial(cut_own, compiled=True))
            spread.check(args, kwargs)
            if not traced:
                prove_spread_window(spread, args, kwargs, rows.weight_takes, check=check)
            return spread.run(args, kwargs)
        cut = cut_own(batch, compiled=traced)
        has_rows = None not in cut.rows
        if cut.count > 1 and has_rows:
            program.refuse_uncut_rows(args, kwargs, sum(cut.rows))
        if traced:
            if cut.count > 1 and axis_name is None:
                tell_once(fun, batch)
            return program.run(args, kwargs, cut, traced)
        memory = Memory(ERRORS, left_bytes)

        def run(cut: Cut) -> Any:
            shares = window_shares(cut, program.weight)
            if check:
                prove_first_window(program, args, kwargs, cut, shares, rows.weight_takes)
            losses: list[dict[Any, Any]] = []
            # Errors arrive late in JAX; waiting once per window costs what its caller waits.
            result = jax.block_until_ready(program.run(args, kwargs, cut, traced, shares, losses))
            known = remembered(program.fun).losses
            loss = result[0][0] if has_aux else result[0]
            # Where somebody differentiates this call, no host can read it.
            if not isinstance(loss, jax.core.Tracer) and known.listens(float(loss)):
                known.hear(jax.tree.map(float, losses), rows_in_order(batch, cut.rows_in_order))
            return result

        if not has_rows:
            return run_as_it_is(lambda: run(cut), memory)
        asked = given or max(cut.rows)
        size = size or sizes.of(args, kwargs).asked(asked)
        if size.rows < asked:
            cut = cut_smaller(batch, size.rows)
        differentiated = [args[k] for k in positions(argnums)]
        result = run_until_it_fits(
            run,
            cut,
            lambda cut: max(cut.rows),
            partial(cut_smaller, batch),
            size,
            memory,
            partial(largest_arrays, differentiated),
        )
        size.succeeded()
        return result

    return wrapper


def plan(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    batch_argnum: int | Sequence[int] = 1,
    weight: GivenWeight = None,
    accumulator_dtype: Any = None,
    key_argnum: int | None = None,
    grad_fn: Callable[..., Any] | None = None,
    aux_merge: Any = None,
    memory_limit: int | str | None = None,
) -> Callable[..., Plan]:
    """Finds the micro-batch that fits and is fast, before anything is trained.

    XLA tells a program's memory without running it, and that memory is affine in the rows of a
    micro-batch, so about three compilations predict every size. Then a few sizes are timed, the
    whole batch each, for ten seconds at the most; the smallest within 2 % of the fastest is
    chosen.

    Args:
        fun: as in `value_and_grad`, like all arguments that are not explained here.
        argnums: as in `value_and_grad`.
        has_aux: as in `value_and_grad`.
        batch_argnum: as in `value_and_grad`.
        weight: as in `value_and_grad`.
        accumulator_dtype: as in `value_and_grad`.
        key_argnum: as in `value_and_grad`.
        grad_fn: as in `value_and_grad`.
        aux_merge: as in `value_and_grad`.
        memory_limit: what arguments, gradients and temporaries of a window may take together, such
            as the 2 * 2**30 or "2GiB" that a budget leaves beside optimizer state, or "80%" of
            what is left; None for what the device, or the container that this process is in, has
            left besides the arguments.

    Returns:
        A function with fun's arguments that returns a `Plan`. Arguments may be arrays or, where
        there is no data yet and nothing is to be timed, `jax.ShapeDtypeStruct`s.

    Raises:
        ValueError: not even one row fits, a limit does not parse, or the batch is already cut.

    Example:
        >>> import jax.numpy as jnp
        >>> loss = lambda params, batch: jnp.mean((batch @ params) ** 2)
        >>> batch = jax.ShapeDtypeStruct((512, 64), "float32")
        >>> found = plan(loss, memory_limit="200KiB")(jnp.ones((64, 128)), batch)
        >>> found.microbatch_size * found.accumulation_steps >= 512
        True
    """
    check_flags(has_aux=has_aux)
    check_options(
        {"fun": fun, "weight": weight, "grad_fn": grad_fn},
        {"argnums": argnums, "batch_argnum": batch_argnum, "key_argnum": key_argnum},
        "auto",
        None,
    )
    check_words(aux_merge, has_aux)
    check_accumulator_dtype(accumulator_dtype)
    rows = BatchArguments(batch_argnum)
    program = Program(
        rows.function(fun),
        argnums,
        has_aux,
        rows.position,
        rows.weight(weight),
        accumulator_dtype,
        key_argnum,
        None,
        grad_fn,
        aux_merge=aux_merge,
    )

    @wraps(fun)
    def wrapper(*args: Any, **kwargs: Any) -> Plan:
        check_arguments(args, batch_argnum, key_argnum, argnums)
        args = rows.gathered(args)
        batch = args[rows.position]
        check_cut_or_auto(batch, "auto", None)
        check_dtypes(args)
        program.refuse_uncut_rows(args, kwargs, rows_of(batch, "batch"))
        return planned(program.window, batch, args, kwargs, memory_limit)

    return wrapper


def certify(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    batch_argnum: int | Sequence[int] = 1,
    microbatch_size: int | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    accumulator_dtype: Any = None,
    key_argnum: int | None = None,
    grad_fn: Callable[..., Any] | None = None,
) -> Callable[..., Certificate]:
    """Proves that accumulation gives the gradient of the whole batch, or names what breaks it.

    The batch runs uncut and in micro-batches, in float64 where the function can, with the same
    random bits for the same rows; so it must fit in memory uncut. It runs equation by equation, and
    not compiled.

    Args:
        fun: as in `value_and_grad`, like all arguments that are not explained here; or what
            `rowwise` returned, which brings its own: give at most a size. Then a random sum of
            its outputs is the loss, and "outputs" among the parameters stands for their values.
        argnums: as in `value_and_grad`.
        has_aux: as in `value_and_grad`.
        batch_argnum: as in `value_and_grad`.
        microbatch_size: rows of one forward and backward.
        accumulation_steps: micro-batches per window.
        weight: as in `value_and_grad`.
        accumulator_dtype: as in `value_and_grad`.
        key_argnum: as in `value_and_grad`; keys are not folded here, since rows keep their random
            numbers.
        grad_fn: as in `value_and_grad`.

    Returns:
        A function with fun's arguments that returns a `Certificate`, with the error of each
        parameter and named findings.

    Raises:
        ValueError: there is only one row or one micro-batch, or random numbers are drawn in a
            loop; else see `value_and_grad`.
        TypeError: see `value_and_grad`.

    Example:
        >>> import jax.numpy as jnp
        >>> loss = lambda params, batch: jnp.sum((batch @ params) ** 2)
        >>> found = certify(loss, microbatch_size=2)(jnp.ones(2), jnp.ones((6, 2)))
        >>> found.exact, found.findings[0].kind
        (False, 'sum_loss')
    """
    options = {"fun": fun, "weight": weight, "grad_fn": grad_fn}
    named = {"argnums": argnums, "batch_argnum": batch_argnum, "key_argnum": key_argnum}
    check_flags(has_aux=has_aux)
    check_options(options, named, microbatch_size, accumulation_steps)
    check_accumulator_dtype(accumulator_dtype)
    if isinstance(fun, RowwiseFunction):
        rest = (argnums, has_aux, batch_argnum, weight, accumulator_dtype, key_argnum, grad_fn)
        return certify_rows(fun, microbatch_size, accumulation_steps, rest)

    rows = BatchArguments(batch_argnum)
    program = Program(
        rows.function(fun),
        argnums,
        has_aux,
        rows.position,
        rows.weight(weight),
        accumulator_dtype,
        key_argnum,
        None,
        grad_fn,
    )

    @wraps(fun)
    def wrapper(*args: Any, **kwargs: Any) -> Certificate:
        check_arguments(args, batch_argnum, key_argnum, argnums)
        args = rows.gathered(args)
        batch = args[rows.position]
        check_cut_or_auto(batch, microbatch_size, accumulation_steps)
        check_cut(batch, microbatch_size, accumulation_steps)
        check_values(args)
        check_dtypes(args)
        program.refuse_uncut_rows(args, kwargs, rows_of(batch, "batch"))
        return certificate(
            program, args, kwargs, microbatch_size, accumulation_steps, rows.weight_takes
        )

    return wrapper
