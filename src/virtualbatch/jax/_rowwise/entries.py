"""The user's function of rows, called with one micro-batch, with its outputs checked.

Half-precision arguments come in as float32 and are cast back for the function. So the backward pass
of the loop adds their gradients up in float32.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_flatten_with_path

from virtualbatch.jax._arrays import is_array
from virtualbatch.jax._flax import explanation, framework_errors
from virtualbatch.jax._keys import folded
from virtualbatch.jax._objective import wide_dtype
from virtualbatch.jax._rows import rows_of
from virtualbatch.window.entries import check_entries, check_same_structure


class RowFunction(NamedTuple):
    """The function given to `rowwise`, and the arguments of one call except the batch.

    Fields:
        fn: the user's function, with one argument for the batch.
        batch_argnum: position of the batch.
        key_argnum: position of the argument with PRNG keys, or None.
        args: positional arguments, with None in the place of the batch.
        kwargs: keyword arguments.
    """

    fn: Callable[..., Any]
    batch_argnum: int
    key_argnum: int | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def entries(self, shared: Any, microbatch: Any, index: Any) -> Any:
        """What the function returns for one micro-batch.

        Args:
            shared: (args, kwargs), with float32 arrays in place of half-precision arrays.
            microbatch: the rows.
            index: the number of the micro-batch in the window.

        Raises:
            ValueError: an output has not one entry per row, or the function changes an argument.
            TypeError: an output is no array.
        """
        args, kwargs = jax.tree.map(as_given, shared, (self.args, self.kwargs))
        args = list(args)
        args[self.batch_argnum] = microbatch
        if self.key_argnum is not None:
            args[self.key_argnum] = folded(args[self.key_argnum], index)
        before = tree_flatten_with_path((args, kwargs))[0]
        try:
            found = self.fn(*args, **kwargs)
        except framework_errors() as error:
            explained = explanation(error)
            if explained is None:
                raise
            raise explained from error
        _check_unchanged(before, jax.tree.leaves((args, kwargs)))
        check_entries(named(found), rows_of(microbatch, "batch"))
        return found


def named(outputs: Any) -> list[tuple[str, Any]]:
    """The leaves of outputs, including None, each with the expression that reaches it."""
    leaves, _ = tree_flatten_with_path(outputs, is_leaf=lambda leaf: leaf is None)
    return [(f"output{keystr(path)}", leaf) for path, leaf in leaves]


def check_alike(outputs: Sequence[Any]) -> None:
    """Refuses outputs of micro-batches that cannot be joined.

    Raises:
        ValueError: their structures differ.
    """
    for later in outputs[1:]:
        if jax.tree.structure(later) != jax.tree.structure(outputs[0]):
            check_same_structure(_places(outputs[0]), _places(later))


def _places(outputs: Any) -> list[str]:
    return [f"{path} is None" if leaf is None else path for path, leaf in named(outputs)]


def _check_unchanged(before: Sequence[tuple[Any, Any]], after: Sequence[Any]) -> None:
    """Refuses a function that changes a module among its arguments: it only gets a copy.

    Raises:
        ValueError: an array was replaced.
    """
    changed = [keystr(path) for (path, x), y in zip(before, after, strict=False) if x is not y]
    if changed or len(before) != len(after):
        raise ValueError(
            "fn must not change its arguments, because it runs twice, on copies of them. Got a "
            f"change of arguments{(changed or [''])[0]}. Return new state beside the outputs, "
            "with one entry per row, and seed modules with a key that key_argnum names. See "
            "docs/guides/state.md."
        )


def widened(x: Any) -> Any:
    """The array, cast to float32 if it is in half precision."""
    is_narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype != wide_dtype(x)
    return x.astype(wide_dtype(x)) if is_narrow else x


def as_given(x: Any, given: Any) -> Any:
    """A widened array, cast back to the dtype in which it was given."""
    return x.astype(given.dtype) if is_array(given) and x.dtype != given.dtype else x
