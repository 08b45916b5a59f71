"""A loop over micro-batches with a backward pass of our own, for convolutions on CPU.

The backward loop that JAX derives cannot be rewritten, and convolutions in it run on a kernel that
takes fifteen times as long. Here both loops are ours, so both go through `with_fast_convolutions`.
Only reverse mode works.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from virtualbatch.jax._convolution import with_fast_convolutions
from virtualbatch.jax._merge import merged, nothing
from virtualbatch.window.aux import SUM


def looped(program: ClosedJaxpr, count: int, arrays: Sequence[Any]) -> list[Any]:
    """Outputs of equal micro-batches.

    Args:
        program: (number of the micro-batch, *arrays) -> its outputs.
        count: the number of micro-batches.
        arrays: the arrays that every micro-batch is given.

    Returns:
        The outputs, of shape (micro-batches, ...).
    """
    # A NumPy array: a JAX array would belong to a trace that ends before the backward pass.
    numbers = np.arange(count, dtype=np.int32)
    consts = len(program.consts)

    def outputs(given: Sequence[Any], k: Any) -> list[Any]:
        found: list[Any] = jaxpr_as_fun(program.replace(consts=[*given[:consts]]))(
            k, *given[consts:]
        )
        return found

    @jax.custom_vjp
    def loop(given: list[Any]) -> list[Any]:
        return _scanned(outputs, given, numbers)

    def forward(given: list[Any]) -> tuple[list[Any], Any]:
        values = [x.value for x in given]
        # The structure, with its Nones, keeps which of them are differentiated.
        differentiated = [x.value if x.perturbed else None for x in given]
        others = [None if x.perturbed else x.value for x in given]
        return loop(values), (differentiated, others)

    def backward(kept: Any, cotangents: list[Any]) -> tuple[list[Any]]:
        differentiated, others = kept
        used = [k for k, x in enumerate(cotangents) if not isinstance(x, SymbolicZero)]

        def gradients(differentiated: list[Any], piece: tuple[Any, list[Any]]) -> Any:
            k, cotangents = piece

            def chosen(differentiated: list[Any]) -> list[Any]:
                both = zip(differentiated, others, strict=True)
                found = outputs([y if x is None else x for x, y in both], k)
                return [found[index] for index in used]

            return jax.vjp(chosen, differentiated)[1](cotangents)[0]

        pieces = numbers, [cotangents[k] for k in used]
        return (_summed(gradients, differentiated, pieces),)

    loop.defvjp(forward, backward, symbolic_zeros=True)
    return loop([*program.consts, *arrays])


def _scanned(fn: Any, given: Any, pieces: Any) -> Any:
    """The results of fn(given, piece) for all pieces, stacked."""
    fast = _fast(fn, given, pieces)
    return lax.scan(lambda _, piece: (None, fast(given, piece)), None, pieces)[1]


def _summed(fn: Any, given: Any, pieces: Any) -> Any:
    """The sum of fn(given, piece) over all pieces."""
    fast = _fast(fn, given, pieces)
    types, structure = jax.tree.flatten(jax.eval_shape(fast, given, _first(pieces)))
    ways = [SUM] * len(types)

    def add(total: list[Any], piece: Any) -> tuple[list[Any], None]:
        return merged(ways, total, jax.tree.leaves(fast(given, piece))), None

    total = lax.scan(add, nothing(ways, types), pieces)[0]
    return jax.tree.unflatten(structure, total)


def _fast(fn: Any, given: Any, pieces: Any) -> Any:
    """fn(given, piece), traced, with its convolutions rewritten."""
    program, shape = jax.make_jaxpr(fn, return_shape=True)(given, _first(pieces))
    run, structure = jaxpr_as_fun(with_fast_convolutions(program)), jax.tree.structure(shape)
    return lambda *args: jax.tree.unflatten(structure, run(*jax.tree.leaves(args)))


def _first(pieces: Any) -> Any:
    """The types of one piece."""
    return jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], pieces))
