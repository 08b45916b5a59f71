"""The user's function, called with a micro-batch, checked and differentiated."""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from virtualbatch.jax._arrays import of_arrays
from virtualbatch.jax._flax import (
    check_differentiated,
    explanation,
    framework_errors,
    refuse_scaled_gradients,
)
from virtualbatch.jax._keys import folded
from virtualbatch.window.shares import accumulator_dtype
from virtualbatch.window.terms import check_same_terms, check_total, loss_and_aux, loss_terms

# Types that a compiled program can return, besides its own arrays.
_NUMBERS = np.ndarray | np.generic | int | float | complex
_OBJECTS = np.dtype(object)


class Call(NamedTuple):
    """A call of the function that `value_and_grad` returned.

    Fields:
        fun: the user's function.
        args: positional arguments, the batch among them.
        kwargs: keyword arguments.
        batch_argnum: position of the batch.
        key_argnum: position of the argument with PRNG keys, or None.
        has_aux: whether fun returns (loss, aux).
        weighted: the names of the terms that have weights; None if all terms weigh by rows.
        differentiate: (function, has_aux=True) -> function that returns ((value, aux), gradients).
        aux_merge: how leaves of aux are merged, as the user gave it; None to derive it.
    """

    fun: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    batch_argnum: int
    key_argnum: int | None
    has_aux: bool
    weighted: Mapping[Any, Any] | None
    differentiate: Callable[..., Any]
    aux_merge: Any

    def arguments(self, microbatch: Any, index: Any = None) -> tuple[Any, ...]:
        """The positional arguments of one micro-batch. Without an index, keys are not folded."""
        args = list(self.args)
        args[self.batch_argnum] = microbatch
        if self.key_argnum is not None and index is not None:
            args[self.key_argnum] = folded(args[self.key_argnum], index)
        return tuple(args)

    def terms(self, args: Sequence[Any]) -> tuple[dict[Any, Any], Any]:
        """Terms of the loss and aux for some positional arguments."""
        result = self.fun(*args, **self.kwargs)
        refuse_scaled_gradients(result)
        loss, aux = loss_and_aux(result, self.has_aux)
        if self.has_aux:
            check_aux(aux)
        found = loss_terms(loss)
        check_names(found)
        if self.weighted is None:
            check_total(found)
        else:
            check_same_terms(found, self.weighted)
        for term in found.values():
            if not jnp.issubdtype(term.dtype, jnp.floating):
                raise TypeError(
                    "A loss must have a floating dtype. "
                    f"Got {term.dtype}. Cast what it is computed from to a float."
                )
        return found, aux

    def traced_once(self) -> "Call":
        """The same call with a function that JAX traces only once per shape.

        Several terms are differentiated one after another, each through the same forward pass.
        XLA sees that the passes are the same, and computes one.
        """
        return self._replace(fun=of_arrays(self.fun, jax.jit))

    def gradients(
        self, args: Sequence[Any], names: Sequence[Any] | None, factors: Mapping[Any, Any] = {}
    ) -> tuple[dict[Any, Any], Any, Any]:
        """Differentiates a sum of terms.

        Args:
            args: positional arguments of one micro-batch.
            names: the terms of the sum; None for all terms.
            factors: factors of terms in the sum. A term without one has the factor 1.

        Returns:
            (terms, aux, gradients): the values of all terms, the aux, and the gradient of the sum
            in the structure and dtype that `differentiate` gives.
        """

        def objective(*args: Any, **kwargs: Any) -> Any:
            terms, aux = self._replace(kwargs=kwargs).terms(args)
            parts = [
                terms[name] * factors[name] if name in factors else terms[name]
                for name in (terms if names is None else names)
            ]
            return reduce(jnp.add, parts), (terms, aux)

        try:
            result = self.differentiate(objective, has_aux=True)(*args, **self.kwargs)
        except framework_errors() as error:
            if "is not a valid JAX type" in str(error):
                _refuse_other_leaves(args, error)
            explained = explanation(error)
            if explained is None:
                raise
            raise explained from error
        check_differentiated(result)
        (_, (terms, aux)), gradients = result
        return terms, aux, gradients


def _refuse_other_leaves(args: Any, error: Exception) -> None:
    """Names the leaf that is no array and no number. JAX only says that there is one.

    Args:
        args: the arguments of the differentiated function.
        error: the error that JAX raised, which becomes the cause of the new one.

    Raises:
        TypeError: there is such a leaf.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(args):
        if not (hasattr(leaf, "dtype") or isinstance(leaf, _NUMBERS)):
            raise TypeError(
                "Arguments must hold arrays and numbers only. "
                f"Got a {type(leaf).__name__} at args{jax.tree_util.keystr(path)}. "
                "Close over it instead."
            ) from error


def check_aux(aux: Any) -> None:
    """Refuses leaves of aux that a compiled program cannot return. Checks only inside a trace.

    Raises:
        TypeError: there is such a leaf.
    """
    others = [
        x
        for x in jax.tree.leaves(aux)
        if not isinstance(x, jax.Array | _NUMBERS) or getattr(x, "dtype", None) is _OBJECTS
    ]
    # Outside a trace, aux may hold objects of any type that are kept as they are.
    if others and isinstance(jnp.zeros(()), jax.core.Tracer):
        raise TypeError(
            "aux must be made of arrays and numbers, which a compiled program can return. "
            f"Got a leaf of type {type(others[0]).__name__}. Return it from a function of its own."
        )


def check_names(terms: Mapping[Any, Any]) -> None:
    """Refuses names of terms that JAX cannot keep in a dict.

    Raises:
        TypeError: the names cannot be sorted.
    """
    try:
        sorted(terms)
    except TypeError as error:
        raise TypeError(
            f"Names of terms must be sortable, as in every dict of JAX. Got {[*terms]}. Return a "
            "dict whose names are all text."
        ) from error


def wide_dtype(x: Any, named: Any = None) -> Any:
    """The dtype in which an array is summed: promote(its dtype, float32), or the named dtype."""
    return jnp.dtype(named or accumulator_dtype(str(jnp.result_type(x))))
