"""The public verb `rowwise`, and the function that it returns."""

from collections.abc import Callable, Sequence
from functools import partial, update_wrapper
from types import MethodType
from typing import Any, Generic, Literal, TypeVar

import jax

from virtualbatch.jax._arguments import BatchArguments
from virtualbatch.jax._batch import cut_batch, cut_smaller
from virtualbatch.jax._certify.first_window import prove_first_window
from virtualbatch.jax._certify.spread_window import prove_spread_window
from virtualbatch.jax._checks import (
    check_arguments,
    check_dtypes,
    check_options,
    check_values,
)
from virtualbatch.jax._float8 import refuse_new_values
from virtualbatch.jax._mesh import (
    Axes,
    axes_to_enter,
    by_microbatch,
    check_rows,
    in_order,
    over_devices,
)
from virtualbatch.jax._plan.automatic import Sizes
from virtualbatch.jax._plan.memory import ERRORS, largest_arrays, left_bytes
from virtualbatch.jax._replicas import varying
from virtualbatch.jax._rows import rows_of
from virtualbatch.jax._rowwise.entries import RowFunction, named
from virtualbatch.jax._rowwise.loop import judge, run_compiled, run_eager
from virtualbatch.jax._rowwise.surrogate import Surrogate
from virtualbatch.jax._rowwise.traces import Traces
from virtualbatch.jax._segment import Cut
from virtualbatch.jax._spread import Spread
from virtualbatch.jax._weights import window_shares
from virtualbatch.jax._window import Program, is_staged, is_traced
from virtualbatch.plan.auto import Auto, CurrentSize, check_cut_or_auto, is_automatic
from virtualbatch.plan.retry import Memory, run_until_it_fits
from virtualbatch.window.entries import check_entries
from virtualbatch.window.fingerprint import fingerprint
from virtualbatch.window.options import check_flags
from virtualbatch.window.window import Window

# What a function returns: arrays with one entry per row, in any pytree.
Outputs = TypeVar("Outputs")


def rowwise(
    fn: Callable[..., Outputs],
    *,
    microbatch_size: int | Literal["auto"] | Auto | None = None,
    accumulation_steps: int | None = None,
    batch_argnum: int | Sequence[int] = 1,
    key_argnum: int | None = None,
    axis_name: Any = None,
    check: bool = True,
) -> "RowwiseFunction[Outputs]":
    """A function like fn, with the memory of a micro-batch, for losses that need all rows at once.

    Wrap the part of the model that treats each row alone, such as the encoder of a contrastive
    loss. The loss stays outside and runs once, on the outputs of all rows, so it and its gradient
    do not change. Values and derivatives are those of fn. A backward pass runs each micro-batch a
    second time, which costs one more forward.

    Under `jit`, or any other trace, the micro-batches are one `lax.scan`, and fn is traced once
    for each of their sizes. If there is only one size, fn is also traced with twice as many rows,
    to tell outputs of rows from other outputs. Outside a trace the micro-batches run one after
    another.

    All modes of differentiation work, also nested: `grad`, `jvp` and `vmap`. There is one
    exception. If fn holds a convolution and runs jitted on a CPU, only reverse mode works (`grad`,
    `vjp`, `vmap`, `grad` of `grad`), because the loop that JAX derives is much slower there.

    Args:
        fn: a function of positional arguments, the batch among them. It returns a pytree of arrays
            of any dtype with one entry per row, or of None. Sum over rows in the loss instead.
        microbatch_size: the rows of one forward and backward. If the batch has no more rows, fn
            runs unchanged. `"auto"` or an `Auto` plans the size at the first call.
        accumulation_steps: the micro-batches per batch, instead of a size:
            `microbatch_size = ceil(rows / accumulation_steps)`.
        batch_argnum: the position of the batch: a pytree of arrays whose first axis is the rows,
            or a `Window`, which is already cut. Where several arguments hold rows, pass all of
            their positions. Each micro-batch gets the other arguments whole, whatever their length.
        key_argnum: the position of an argument that holds PRNG keys and nothing else. Each key is
            folded with the number of the micro-batch. A batch of one micro-batch uses the keys
            unchanged.
        axis_name: the mesh axis, or axes, over which the rows are spread. Then gradients of
            arguments are summed over the devices once, after the loop. Outside `shard_map`, with a
            mesh in use, it is entered as in `value_and_grad`.
        check: whether the first call outside `jit` checks, on a few rows, that fn computes each
            row from that row alone. This calls fn three times more, once. Under `jit` nothing is
            checked, so run `certify` on the returned function once.

    Returns:
        A function with the arguments and the result of fn. Outputs are in the order of the rows.

    Raises:
        ValueError: a size is not a positive integer, or two sizes disagree.
        ValueError: when called: arrays have different numbers of rows, or the batch has none.
        ValueError: when called: an output has not one entry per row, depends on other rows, or
            changes its structure between micro-batches.
        ValueError: when called: the devices of the mesh do not divide the rows.
        TypeError: an output is not an array, or an argument has the wrong type.

    Example:
        >>> import jax.numpy as jnp
        >>> encode = rowwise(lambda params, x: jnp.tanh(x @ params), microbatch_size=2)
        >>> def loss(params, x):
        ...     z = encode(params, x)
        ...     return -jnp.var(z)  # sees all rows
        >>> rows = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> gradient = jax.jit(jax.grad(loss))(jnp.array([0.5, 1.0]), rows)
        >>> print(f"{gradient[0]:.4f} {gradient[1]:.4f}")
        0.1062 -0.0381
    """
    check_flags(check=check)
    check_options(
        {"fn": fn},
        {"batch_argnum": batch_argnum, "key_argnum": key_argnum},
        microbatch_size,
        accumulation_steps,
    )
    return RowwiseFunction(
        fn, microbatch_size, accumulation_steps, batch_argnum, key_argnum, axis_name, check
    )


class RowwiseFunction(Generic[Outputs]):
    """The function that `rowwise` returns. It is made with the arguments of `rowwise`."""

    def __init__(
        self,
        fn: Callable[..., Outputs],
        microbatch_size: int | Literal["auto"] | Auto | None,
        accumulation_steps: int | None,
        batch_argnum: int | Sequence[int],
        key_argnum: int | None,
        axis_name: Any,
        check: bool,
    ):
        update_wrapper(self, fn)
        self.microbatch_size = microbatch_size
        self.accumulation_steps = accumulation_steps
        self._batch_argnum = batch_argnum
        self._key_argnum = key_argnum
        self._axis_name = axis_name
        self._check = check
        self._rows = BatchArguments(batch_argnum)
        self._fn = self._rows.function(fn)
        self._loss = Surrogate(fn, self._fn, self._rows.position, key_argnum)
        program = self._loss.program
        self._sizes = Sizes(
            fn,
            fingerprint(fn, "rowwise", repr((batch_argnum, key_argnum))),
            program.batch_argnum,
            microbatch_size,
            axis_name,
            program.window,
        )

    def as_loss(self, args: tuple[Any, ...]) -> tuple[Program, tuple[Any, ...]]:
        """The surrogate loss of this function, and the loss's arguments for a call."""
        check_arguments(args, self._batch_argnum, self._key_argnum)
        return self._loss.program, self._loss.arguments(self._rows.gathered(args))

    def __call__(self, *args: Any, **kwargs: Any) -> Outputs:
        """Calls fn on micro-batches; see `rowwise`."""
        check_arguments(args, self._batch_argnum, self._key_argnum)
        args = self._rows.gathered(args)
        batch = args[self._rows.position]
        check_cut_or_auto(batch, self.microbatch_size, self.accumulation_steps)
        staged = is_staged()
        if not staged:
            check_values(args)
            check_dtypes(args)
        given: Any = self.microbatch_size
        size: CurrentSize | None = None
        if is_automatic(given):
            size = self._sizes.planned(self._loss.arguments(args), kwargs)
            given = size.rows
        axes = axes_to_enter(self._axis_name)
        if axes is not None:
            cut_own = partial(
                cut_batch,
                microbatch_size=given,
                accumulation_steps=self.accumulation_steps,
                compiled=True,
            )
            return self._on_mesh(axes, cut_own, args, kwargs)
        cut = cut_batch(batch, given, self.accumulation_steps, compiled=staged)
        if cut.count == 1:
            return self._fn(*self._with(args, cut.segments[0].get(0)), **kwargs)
        traces = Traces(self._function(args, kwargs))
        if staged:
            judge(traces, cut)
            return run_compiled(traces, cut)
        known = jax.tree.map(_value, (args, kwargs))
        has_values = not is_traced(*known)
        if self._check and has_values:
            self._prove(cut, *known)
        else:
            judge(traces, cut)
        if not has_values:
            return run_eager(traces, cut)

        def run(cut: Cut) -> Any:
            found = run_eager(traces, cut)
            # JAX raises errors late, so this waits for the result. The caller would wait anyway.
            jax.block_until_ready(jax.tree.map(_value, found))
            return found

        asked = given or max(cut.rows)
        size = size or self._sizes.of(self._loss.arguments(known[0]), kwargs).asked(asked)
        if size.rows < asked:
            cut = cut_smaller(batch, size.rows)
        result = run_until_it_fits(
            run,
            cut,
            lambda cut: max(cut.rows),
            partial(cut_smaller, batch),
            size,
            Memory(ERRORS, left_bytes),
            partial(largest_arrays, known),
        )
        size.succeeded()
        return result

    def _on_mesh(
        self,
        axes: Axes,
        cut_own: Callable[[Any], Cut],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The outputs of all rows, where each device has rows of its own."""
        check_rows(args[self._rows.position], axes)
        known = jax.tree.map(_value, (args, kwargs))
        if self._check and not is_traced(*known):
            given = self._loss.arguments(known[0])
            spread = Spread(self._loss.program, axes, cut_own)
            prove_spread_window(spread, given, known[1], "batch", is_rowwise=True)
        structures = []

        def compute(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            batch = args[self._rows.position]
            cut = cut_own(batch)
            if cut.count == 1:
                found = self._fn(*self._with(args, cut.segments[0].get(0)), **kwargs)
                check_entries(named(found), rows_of(batch, "batch"))
            else:
                traces = Traces(self._function(args, kwargs))
                judge(traces, cut)
                found = run_compiled(traces, cut)
            sizes = cut.rows if isinstance(batch, Window) else None
            structures.append(jax.tree.structure(found))
            return [], [by_microbatch(leaf, sizes) for leaf in jax.tree.leaves(found)]

        _, found = over_devices(compute, axes, args, kwargs, self._rows.position, self._key_argnum)
        return jax.tree.unflatten(structures[0], map(in_order, found))

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """Binds the wrapped function to an instance, so that it works as a method."""
        return self if instance is None else MethodType(self, instance)

    def _function(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RowFunction:
        shared = self._with(args, None)
        refuse_new_values((shared, kwargs))
        if self._axis_name is not None:
            shared, kwargs = varying((shared, kwargs), self._axis_name)
        return RowFunction(self._fn, self._rows.position, self._key_argnum, shared, kwargs)

    def _prove(self, cut: Cut, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Checks once, on a few rows, that each output depends on its own row alone."""
        program, given = self._loss.program, self._loss.arguments(args)
        shares = window_shares(cut, program.weight)
        prove_first_window(program, given, kwargs, cut, shares, "batch", is_rowwise=True)

    def _with(self, args: tuple[Any, ...], batch: Any) -> tuple[Any, ...]:
        position = self._rows.position
        return (*args[:position], batch, *args[position + 1 :])


def _value(x: Any) -> Any:
    """The concrete value of a tracer that is only differentiated. Other tracers stay tracers."""
    return jax.lax.stop_gradient(x) if isinstance(x, jax.core.Tracer) else x
