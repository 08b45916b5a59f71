"""A loss that represents a function of rows, so that the engine can treat it like any loss.

The loss is the sum of all outputs, where each entry is multiplied by its own number. So it is a sum
over rows exactly if each row is computed from that row alone. The engine's checks, certificates and
plans work on it without changes.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from virtualbatch.jax._arrays import is_array
from virtualbatch.jax._objective import wide_dtype
from virtualbatch.jax._rows import rows_of
from virtualbatch.jax._rowwise.entries import named
from virtualbatch.jax._window import Program
from virtualbatch.window.entries import check_entries
from virtualbatch.window.window import Window

# No name that an argument can have.
_OUTPUTS = "the outputs"


class Surrogate:
    """The loss, and the arguments that it takes.

    The loss is called as loss(parameters, batch, keys, **kwargs). Parameters are all arguments that
    are neither rows nor keys, by their names in fn's signature. One more parameter is a factor of
    all outputs, and its gradient is the sum itself. The batch is a pair of rows and their numbers.

    Args:
        fn: the user's function.
        function: the same function, with one argument for the batch.
        batch_argnum: position of the batch.
        key_argnum: position of the argument with PRNG keys, or None.
    """

    batch_argnum = 1

    def __init__(
        self,
        fn: Callable[..., Any],
        function: Callable[..., Any],
        batch_argnum: int,
        key_argnum: int | None,
    ):
        self._apart = (batch_argnum, key_argnum)
        self._names = _names(fn)

        # Wrapped, so that facts about fn and about the loss are remembered together.
        @wraps(fn)
        def loss(parameters: Any, batch: Any, keys: Any, **kwargs: Any) -> Any:
            rows, numbers = batch
            given = [
                rows if k == batch_argnum else keys if k == key_argnum else parameters[name]
                for k, name in enumerate(self._of(len(parameters) + (key_argnum is not None)))
            ]
            found = function(*given, **kwargs)
            check_entries(named(found), numbers.shape[0])
            sums = [_summed(x, numbers, k) for k, x in enumerate(jax.tree.leaves(found))]
            return parameters[_OUTPUTS] * sum(sums, jnp.zeros(()))

        keys = None if key_argnum is None else 2
        self.program = Program(
            loss, 0, False, self.batch_argnum, "sum", None, keys, None, _of_floating
        )

    def arguments(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments of the loss.

        Args:
            args: the positional arguments of a call of the function.
        """
        batch_argnum, key_argnum = self._apart
        parameters = {
            name: args[k] for k, name in enumerate(self._of(len(args))) if k not in self._apart
        }
        parameters[_OUTPUTS] = jnp.ones(())
        keys = None if key_argnum is None else args[key_argnum]
        return parameters, _numbered(args[batch_argnum]), keys

    def _of(self, count: int) -> list[str]:
        """The names of the first positional arguments."""
        return [*self._names[:count], *(f"argument {k}" for k in range(len(self._names), count))]


def _names(fn: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(fn).parameters.values()
    except ValueError:  # built in
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter.name for parameter in parameters if parameter.kind in kinds]


def _numbered(batch: Any) -> Any:
    """The batch, or each micro-batch of a Window, in a pair with the numbers of its rows."""
    if not isinstance(batch, Window):
        return batch, np.arange(rows_of(batch, "batch"))
    pairs, start = [], 0
    for index, microbatch in enumerate(batch):
        stop = start + rows_of(microbatch, f"window[{index}]")
        pairs.append((microbatch, np.arange(start, stop)))
        start = stop
    return Window(pairs, sorted_rows=batch.sorted_rows)


def _summed(x: Any, numbers: Any, leaf: int) -> Any:
    """The sum of an output, where each entry is multiplied by a different number."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.real(x) + 2 * jnp.imag(x)
    is_floating = jnp.issubdtype(x.dtype, jnp.floating)
    wide = x.astype(wide_dtype(x) if is_floating else jnp.result_type(float))
    within = jnp.arange(x[0].size, dtype=wide.dtype).reshape(x.shape[1:])
    rows = numbers.astype(wide.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return jnp.sum(wide * jnp.cos(1 + leaf + 3 * rows + 5 * within))


def _of_floating(function: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """Differentiates with respect to the floating arrays of the first argument.

    The gradients have None in all other places.
    """

    def run(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten(parameters)
        floating = [leaf if _is_floating(leaf) else None for leaf in leaves]

        def of_floating(floating: list[Any]) -> Any:
            both = [x if y is None else y for x, y in zip(leaves, floating, strict=True)]
            return function(jax.tree.unflatten(structure, both), *args, **kwargs)

        value, gradients = jax.value_and_grad(of_floating, has_aux=has_aux)(floating)
        return value, jax.tree.unflatten(structure, gradients)

    return run


def _is_floating(leaf: Any) -> bool:
    return is_array(leaf) and bool(jnp.issubdtype(leaf.dtype, jnp.inexact))
