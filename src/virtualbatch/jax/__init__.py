"""The JAX engine: the gradient of a whole batch, computed a micro-batch at a time.

A batch becomes segments of micro-batches, their weights become shares, one scan sums each
micro-batch's share of the gradient, and the sums come back as `jax.value_and_grad` gives them.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import jax
from jax.typing import DTypeLike

from virtualbatch.certify.certificate import Certificate
from virtualbatch.jax._arguments import BatchArguments, GivenWeight
from virtualbatch.jax._certify.certificate import certificate, check_cut
from virtualbatch.jax._certify.loop import certify_loop
from virtualbatch.jax._checks import (
    check_accumulator_dtype,
    check_arguments,
    check_dtypes,
    check_options,
    check_values,
    check_words,
)
from virtualbatch.jax._plan.plan import planned
from virtualbatch.jax._rows import rows_of
from virtualbatch.jax._rowwise.certificate import certify_rows
from virtualbatch.jax._rowwise.rowwise import RowwiseFunction, rowwise
from virtualbatch.jax._value_and_grad import value_and_grad
from virtualbatch.jax._window import Program
from virtualbatch.plan.auto import check_cut_or_auto
from virtualbatch.plan.plan import Plan
from virtualbatch.window.options import check_flags
from virtualbatch.window.stream import windows
from virtualbatch.window.terms import Loss
from virtualbatch.window.window import Window

__all__ = ["Window", "certify", "certify_loop", "plan", "rowwise", "value_and_grad", "windows"]


def __dir__() -> list[str]:
    """What is public: completion shows no other names."""
    return __all__


# With this, jit, vmap and tree maps see a Window as the pytree of its micro-batches.
jax.tree_util.register_pytree_node(
    Window,
    lambda window: (tuple(window), window.sorted_rows),
    lambda sorted_rows, microbatches: Window(microbatches, sorted_rows=sorted_rows),
)


def plan(
    fun: Callable[..., Loss | tuple[Loss, Any]],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    batch_argnum: int | Sequence[int] = 1,
    weight: GivenWeight = None,
    accumulator_dtype: DTypeLike | None = None,
    key_argnum: int | None = None,
    grad_fn: Callable[..., Any] | None = None,
    aux_merge: Any = None,
    memory_limit: int | str | None = None,
) -> Callable[..., Plan]:
    """Finds the micro-batch size that fits in memory and is fast, before you train.

    XLA reports the memory of a compiled program without running it. That memory grows linearly
    with the micro-batch size, so about three compilations predict every size. Then a few sizes are
    timed, a whole batch each, for at most ten seconds. The smallest size within 2 % of the fastest
    is chosen.

    Args:
        fun: a function of positional arguments that returns its mean loss, as for
            `value_and_grad`.
        argnums: the positions of the arguments to differentiate. The batch is not one of them.
        has_aux: whether fun returns `(loss, aux)`.
        batch_argnum: the position of the batch, or all positions where several arguments hold
            rows. A `Window` is refused.
        weight: what the mean of a micro-batch was divided by: None for its rows, `"sum"` for a
            loss that is a sum, or a function of a micro-batch. See `value_and_grad`.
        accumulator_dtype: the floating dtype of the sum of gradients. None means float32 or wider.
        key_argnum: the position of an argument that holds PRNG keys and nothing else.
        grad_fn: what differentiates instead of `jax.value_and_grad`, such as
            `equinox.filter_value_and_grad`.
        aux_merge: how arrays of aux are merged. See `value_and_grad`.
        memory_limit: the bytes that the arguments, gradients and temporaries of a window may take
            together. Optimizer state is not counted, so leave room for it. Pass a number of bytes,
            a text such as `"2GiB"`, or a share such as `"80%"` of what is free. None means all
            that the device, or the container of this process, has free beside the arguments.

    Returns:
        A function with the arguments of fun that returns a `Plan`. Its arguments are arrays, or
        `jax.ShapeDtypeStruct` values if there is no data yet. Then no size is timed.

    Raises:
        ValueError: not even one row fits, the limit does not parse, or the batch is a `Window`.
        ValueError: an argument is wrong as in `value_and_grad`.
        TypeError: an argument has the wrong type.

    Example:
        >>> import jax.numpy as jnp
        >>> loss = lambda params, batch: jnp.mean((batch @ params) ** 2)
        >>> batch = jax.ShapeDtypeStruct((512, 64), "float32")
        >>> found = plan(loss, memory_limit="200KiB")(jnp.ones((64, 128)), batch)
        >>> found.microbatch_size * found.accumulation_steps >= 512
        True
    """
    check_options(
        {"fun": fun, "weight": weight, "grad_fn": grad_fn},
        {"argnums": argnums, "batch_argnum": batch_argnum, "key_argnum": key_argnum},
        "auto",
        None,
    )
    check_flags(has_aux=has_aux)
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
    fun: Callable[..., Loss | tuple[Loss, Any]] | RowwiseFunction[Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    batch_argnum: int | Sequence[int] = 1,
    microbatch_size: int | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    accumulator_dtype: DTypeLike | None = None,
    key_argnum: int | None = None,
    grad_fn: Callable[..., Any] | None = None,
) -> Callable[..., Certificate]:
    """Proves that accumulation gives the gradient of the whole batch, or names what breaks it.

    The batch runs uncut and in micro-batches, with the same random bits for the same rows, and the
    two gradients are compared. So the batch must fit in memory uncut. The function runs equation
    by equation and is not compiled.

    Both runs are in float64: floating arguments are widened for the call, with x64 enabled. Where
    the function does not run in float64, both runs are in its own dtypes. The notes of the
    certificate name the dtype. The tolerance follows from that dtype and the number of rows. Do
    not expect that tolerance of float32 training: an uncut float32 run differs from a float64 run
    by more than that, before anything is accumulated.

    Args:
        fun: a function of positional arguments that returns its mean loss, as for
            `value_and_grad`; or a function that `rowwise` returned. Then a random sum of
            its outputs is the loss, `"outputs"` among the parameters stands for their values,
            and you pass at most a size.
        argnums: the positions of the arguments to differentiate. The batch is not one of them.
        has_aux: whether fun returns `(loss, aux)`.
        batch_argnum: the position of the batch, or all positions where several arguments hold
            rows. A `Window` is refused.
        microbatch_size: the rows of one forward and backward.
        accumulation_steps: the micro-batches per window, instead of a size.
        weight: what the mean of a micro-batch was divided by: None for its rows, `"sum"` for a
            loss that is a sum, or a function of a micro-batch. See `value_and_grad`.
        accumulator_dtype: the floating dtype of the sum of gradients. None means float32 or wider.
        key_argnum: the position of an argument that holds PRNG keys and nothing else. Here keys
            are not folded, because each row keeps its random numbers.
        grad_fn: what differentiates instead of `jax.value_and_grad`, such as
            `equinox.filter_value_and_grad`.

    Returns:
        A function with the arguments of fun that returns a `Certificate`, with the error of each
        parameter and named findings.

    Raises:
        ValueError: there is only one row or one micro-batch, random numbers are drawn in a loop,
            or an argument is wrong as in `value_and_grad`.
        TypeError: an argument has the wrong type, or fun reads values of its arguments.

    Example:
        >>> import jax.numpy as jnp
        >>> loss = lambda params, batch: jnp.sum((batch @ params) ** 2)
        >>> found = certify(loss, microbatch_size=2)(jnp.ones(2), jnp.ones((6, 2)))
        >>> found.exact, found.findings[0].kind
        (False, 'sum_loss')
    """
    options = {"fun": fun, "weight": weight, "grad_fn": grad_fn}
    named = {"argnums": argnums, "batch_argnum": batch_argnum, "key_argnum": key_argnum}
    check_options(options, named, microbatch_size, accumulation_steps)
    check_flags(has_aux=has_aux)
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
