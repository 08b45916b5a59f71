"""`value_and_grad`: cuts a batch, and runs its window inside a trace, over a mesh, or eagerly."""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, Literal, TypedDict, Unpack, overload

import jax
from jax.typing import DTypeLike

from virtualbatch.jax._arguments import BatchArguments, GivenWeight
from virtualbatch.jax._batch import cut_batch, cut_smaller
from virtualbatch.jax._certify.spread_window import prove_spread_window
from virtualbatch.jax._checks import (
    check_accumulator_dtype,
    check_arguments,
    check_options,
    check_values,
    check_words,
)
from virtualbatch.jax._eager_window import EagerWindow
from virtualbatch.jax._mesh import axes_to_enter
from virtualbatch.jax._plan.automatic import Sizes
from virtualbatch.jax._plan.memory import ERRORS, largest_arrays, left_bytes
from virtualbatch.jax._rows import rows_of
from virtualbatch.jax._spread import Spread
from virtualbatch.jax._unnamed_axis import tell_once
from virtualbatch.jax._window import Program, is_traced, positions
from virtualbatch.noise.estimate import WindowStats
from virtualbatch.plan.auto import Auto, CurrentSize, check_cut_or_auto, is_automatic
from virtualbatch.plan.retry import Memory, run_as_it_is, run_until_it_fits
from virtualbatch.window.fingerprint import fingerprint
from virtualbatch.window.options import check_flags
from virtualbatch.window.terms import Loss
from virtualbatch.window.window import refuse_sorted_rows


class _Options(TypedDict, total=False):
    """The arguments of `value_and_grad` that do not change the form of its result."""

    batch_argnum: int | Sequence[int]
    microbatch_size: int | Literal["auto"] | Auto | None
    accumulation_steps: int | None
    weight: GivenWeight
    accumulator_dtype: DTypeLike | None
    key_argnum: int | None
    axis_name: Any
    grad_fn: Callable[..., Any] | None
    aux_merge: Any
    check: bool


@overload
def value_and_grad(
    fun: Callable[..., Loss],
    argnums: int | Sequence[int] = 0,
    has_aux: Literal[False] = False,
    *,
    stats: Literal[False] = False,
    **options: Unpack[_Options],
) -> Callable[..., tuple[jax.Array, Any]]: ...
@overload
def value_and_grad(
    fun: Callable[..., tuple[Loss, Any]],
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: Literal[True],
    stats: Literal[False] = False,
    **options: Unpack[_Options],
) -> Callable[..., tuple[tuple[jax.Array, Any], Any]]: ...
@overload
def value_and_grad(
    fun: Callable[..., Loss],
    argnums: int | Sequence[int] = 0,
    has_aux: Literal[False] = False,
    *,
    stats: Literal[True],
    **options: Unpack[_Options],
) -> Callable[..., tuple[jax.Array, Any, WindowStats]]: ...
@overload
def value_and_grad(
    fun: Callable[..., tuple[Loss, Any]],
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: Literal[True],
    stats: Literal[True],
    **options: Unpack[_Options],
) -> Callable[..., tuple[tuple[jax.Array, Any], Any, WindowStats]]: ...
@overload
def value_and_grad(
    fun: Callable[..., Loss],
    argnums: int | Sequence[int] = 0,
    has_aux: Literal[False] = False,
    *,
    stats: bool,
    **options: Unpack[_Options],
) -> Callable[..., Any]: ...
@overload
def value_and_grad(
    fun: Callable[..., tuple[Loss, Any]],
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: Literal[True],
    stats: bool,
    **options: Unpack[_Options],
) -> Callable[..., Any]: ...
@overload
def value_and_grad(
    fun: Callable[..., Loss | tuple[Loss, Any]],
    argnums: int | Sequence[int],
    has_aux: bool,
    *,
    stats: bool = False,
    **options: Unpack[_Options],
) -> Callable[..., Any]: ...
def value_and_grad(
    fun: Callable[..., Loss | tuple[Loss, Any]],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    batch_argnum: int | Sequence[int] = 1,
    microbatch_size: int | Literal["auto"] | Auto | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    accumulator_dtype: DTypeLike | None = None,
    key_argnum: int | None = None,
    axis_name: Any = None,
    grad_fn: Callable[..., Any] | None = None,
    aux_merge: Any = None,
    stats: bool = False,
    check: bool = True,
) -> Callable[..., Any]:
    """`jax.value_and_grad` of a whole batch, with the memory of a micro-batch.

    The function that it returns is pure. Under `jit`, or any other trace, a window is one
    `lax.scan`, and fun is traced once per micro-batch shape. Outside a trace the micro-batches run
    one after another, and values of weights are checked. If memory runs out outside a trace, the
    window runs again with smaller micro-batches; not with `axis_name` and a mesh in use.

    As in `jax.value_and_grad`, `argnums` says which arguments to differentiate. `batch_argnum` and
    `key_argnum` say what the other arguments are: the batch, and the keys of random numbers.

    Args:
        fun: a function of positional arguments, the batch among them. It returns a scalar mean, or
            a dict from names of terms to scalar means whose sum is the loss. With `has_aux=True`
            it returns `(loss, aux)`.
        argnums: the positions of the arguments to differentiate. The batch is not one of them.
        has_aux: whether fun returns `(loss, aux)`. Arrays of aux with one entry per row come back
            concatenated in the order of the rows. Other floating arrays are averaged by rows.
            Integers are summed, in at least 32 bits. Integers, booleans and keys that no row
            changes come back as they are.
        batch_argnum: the position of the batch: a pytree of arrays whose first axis is the rows,
            or a `Window`, which is already cut. Where several arguments hold rows, pass all of
            their positions. Then all or none are a `Window`, and `weight` takes as many arguments.
        microbatch_size: the rows of one forward and backward on one device. `"auto"` or an `Auto`
            plans the size at the first call; under `jit` that is while the call is traced. The
            plan is kept for this function, also if you make fun anew for each update.
        accumulation_steps: the micro-batches per window, instead of a size:
            `microbatch_size = ceil(rows / accumulation_steps)`.
        weight: what the mean of a micro-batch was divided by. None means its rows. `"sum"` means
            that the loss is a sum. Otherwise a function of a micro-batch that returns a number
            `>= 0`. For a loss of several terms it returns a dict with the same names, with None
            for a term that does not depend on the rows and `"sum"` for a term that is a sum.
        accumulator_dtype: the floating dtype of the sum of gradients. None means float32, or the
            dtype of the parameter where that is wider.
        key_argnum: the position of an argument that holds PRNG keys and nothing else. Each key is
            folded with the number of the micro-batch, so random numbers differ between
            micro-batches. A window of one micro-batch uses the keys unchanged.
        axis_name: the mesh axis, or axes, over which the rows are spread. With a mesh in use
            (`jax.set_mesh`), `shard_map` is entered over it: each device accumulates its own rows,
            and the gradients are reduced once per window. Keys differ by device. Other axes of the
            mesh are left alone. Inside a `shard_map`, a `vmap` or a `pmap` of that name, arrays of
            aux with one entry per row are those of the rows of the device, and everything else is
            that of the rows of all devices.
        grad_fn: what differentiates instead of `jax.value_and_grad`, such as
            `equinox.filter_value_and_grad`. It is called as `grad_fn(function, has_aux=True)`, and
            with `argnums=` if that is not 0.
        aux_merge: how arrays of aux are merged where `has_aux` describes something else: `"keep"`,
            `"sum"`, `"mean"`, `"max"` or `"rows"`, for all of aux. Or a prefix of the structure of
            aux with one of these words, or None, in each place.
        stats: whether to return the `WindowStats` too, from which `virtualbatch.NoiseScale`
            estimates the noise of the gradients.
        check: whether the first window is checked outside `jit`: a few of its rows run in parts
            and together, and both gradients must agree. This calls fun three times more, once.
            Under `jit` nothing is checked, so run `certify` once.

    Returns:
        A function with the arguments of fun. It returns `(value, gradients)`, or
        `((value, aux), gradients)` with `has_aux=True`. The gradients have the structure and the
        dtypes that `jax.value_and_grad` gives. With `stats=True` the stats are the last item.

    Raises:
        ValueError: a size is not a positive integer, or two sizes disagree.
        ValueError: when called: arrays have different numbers of rows, the batch has none, or
            another argument holds rows too.
        ValueError: when called: a weight is negative or not finite, or its terms are not those of
            the loss.
        ValueError: when called: the loss is not a scalar.
        ValueError: when called: no mesh in use has the axis, or its devices do not divide the
            rows.
        ValueError: when called: the first rows show that the gradients of micro-batches do not add
            up.
        TypeError: the loss is not a floating array, or an argument has the wrong type.

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
    check_options(
        {"fun": fun, "weight": weight, "grad_fn": grad_fn},
        {"argnums": argnums, "batch_argnum": batch_argnum, "key_argnum": key_argnum},
        microbatch_size,
        accumulation_steps,
    )
    check_flags(has_aux=has_aux, stats=stats, check=check)
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
        window = EagerWindow(program, args, kwargs, batch, rows.weight_takes, check)
        memory = Memory(ERRORS, left_bytes)
        if not has_rows:
            return run_as_it_is(partial(window.run, cut), memory)
        asked = given or max(cut.rows)
        size = size or sizes.of(args, kwargs).asked(asked)
        if size.rows < asked:
            cut = cut_smaller(batch, size.rows)
        differentiated = [args[k] for k in positions(argnums)]
        result = run_until_it_fits(
            window.run,
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
