"""One window of a call: one program inside a trace, one micro-batch after another outside."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from virtualbatch.jax._arguments import refuse_uncut_rows
from virtualbatch.jax._batch import cut_batch
from virtualbatch.jax._compiled import run_compiled
from virtualbatch.jax._eager import run_eager
from virtualbatch.jax._objective import Call
from virtualbatch.jax._replicas import varying
from virtualbatch.jax._segment import Cut
from virtualbatch.jax._weights import traced_shares, window_shares
from virtualbatch.window.shares import Shares, check_counted
from virtualbatch.window.terms import GivenWeight


class Program(NamedTuple):
    """The options of `value_and_grad`, except the sizes.

    Fields:
        fun: the user's function, with one argument for the batch.
        argnums: the positions of the differentiated arguments.
        has_aux: whether fun returns (loss, aux).
        batch_argnum: position of the batch.
        weight: micro-batch -> weight, "sum", or None.
        accumulator_dtype: the dtype of the sums; None for promote(parameter dtype, float32).
        key_argnum: position of the argument with PRNG keys, or None.
        axis_name: mesh axes over which the batch is spread, or None.
        grad_fn: what differentiates in place of `jax.value_and_grad`, or None.
        stats: whether the statistics of the window are returned too.
        aux_merge: how leaves of aux are merged, as the user gave it; None to derive it.
    """

    fun: Callable[..., Any]
    argnums: int | Sequence[int]
    has_aux: bool
    batch_argnum: int
    weight: GivenWeight
    accumulator_dtype: Any
    key_argnum: int | None
    axis_name: Any
    grad_fn: Callable[..., Any] | None
    stats: bool = False
    aux_merge: Any = None

    def refuse_uncut_rows(self, args: Sequence[Any], kwargs: Mapping[str, Any], rows: int) -> None:
        """Calls `refuse_uncut_rows` with the positions of this program."""
        cut = [*positions(self.argnums), self.batch_argnum, *positions(self.key_argnum)]
        refuse_uncut_rows(args, kwargs, cut, rows)

    def call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], weighted: Mapping[Any, Any] | None
    ) -> Call:
        """The user's function with the arguments of one call.

        Args:
            args: positional arguments, the batch among them.
            kwargs: keyword arguments.
            weighted: the names of the terms that have weights; None if all terms weigh by rows.
        """
        plain = self.grad_fn is not None and self.argnums == 0
        options = {} if plain else {"argnums": self.argnums}
        return Call(
            self.fun,
            args,
            kwargs,
            self.batch_argnum,
            self.key_argnum,
            self.has_aux,
            weighted,
            partial(self.grad_fn or jax.value_and_grad, **options),
            self.aux_merge,
        )

    def run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        cut: Cut,
        traced: bool,
        shares: Shares | None = None,
        losses: list[dict[Any, Any]] | None = None,
    ) -> Any:
        """Runs a window. If memory runs out, the window is not tried again.

        Args:
            args: positional arguments, the batch among them.
            kwargs: keyword arguments.
            cut: the micro-batches of the window.
            traced: whether this runs inside a trace.
            shares: the shares of the window, if they are already known.
            losses: receives, outside a trace, for each micro-batch the terms that count, by name.

        Returns:
            (loss or (loss, aux), gradients), and with `stats` the `WindowStats`.
        """
        if traced:
            return self.result(*self.compiled(args, kwargs, cut)[0])
        args = self._of_this_device(args)
        shares = window_shares(cut, self.weight) if shares is None else shares
        if self.stats:
            check_counted(shares)
        call = self.call(args, kwargs, shares.terms)
        found = run_eager(call, cut, shares, self.accumulator_dtype, self.stats, losses)
        return self.result(*found)

    def compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any], cut: Cut) -> tuple[Any, Any]:
        """Runs a window inside a trace.

        Args:
            args: positional arguments, the batch among them.
            kwargs: keyword arguments.
            cut: the micro-batches of the window.

        Returns:
            (results, kinds), as `run_compiled` returns them.
        """
        args = self._of_this_device(args)
        shares = traced_shares(cut, self.weight, self.axis_name)
        if self.stats:
            check_counted(shares)
        call = self.call(args, kwargs, shares.terms)
        return run_compiled(call, cut, shares, self.accumulator_dtype, self.axis_name, self.stats)

    def result(self, loss: Any, aux: Any, gradients: Any, stats: Any) -> Any:
        """The results of a window in the form for the user."""
        found = ((loss, aux) if self.has_aux else loss), gradients
        return (*found, stats) if self.stats else found

    def differentiated(self, args: Sequence[Any]) -> Any:
        """The arguments that are differentiated, in the structure of their gradients."""
        found = tuple(args[k] for k in positions(self.argnums))
        return found if isinstance(self.argnums, Sequence) else found[0]

    def _of_this_device(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        axis_name = self.axis_name
        if axis_name is None:
            return args
        own = positions(self.argnums)
        return tuple(varying(arg, axis_name) if k in own else arg for k, arg in enumerate(args))

    def window(self, size: int) -> Callable[..., Any]:
        """A function that runs a window of one size.

        It raises if memory runs out, because the search for a size must know that.
        """

        def run(*args: Any, **kwargs: Any) -> Any:
            traced = is_traced(args, kwargs)
            cut = cut_batch(args[self.batch_argnum], size, None, compiled=traced)
            return self.run(args, kwargs, cut, traced)

        return run


def positions(given: int | Sequence[int] | None) -> tuple[int, ...]:
    """Positions of arguments, from one, several or None."""
    if given is None:
        return ()
    return tuple(given) if isinstance(given, Sequence) else (given,)


def is_traced(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call with these arguments runs inside a trace."""
    # A loss may close over traced values. Under jit new values are traced too, which shows that.
    leaves = jax.tree.leaves((args, kwargs, jnp.zeros(())))
    return any(isinstance(x, jax.core.Tracer) for x in leaves)


def is_staged() -> bool:
    """Whether computations here become part of a compiled program, as under `jit`."""
    return isinstance(jnp.zeros(()), jax.core.Tracer)
