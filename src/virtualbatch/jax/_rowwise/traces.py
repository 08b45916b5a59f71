"""A function of rows as programs, one for each kind of micro-batch.

Arrays that the function closes over are passed like its arguments. So half-precision arrays among
them are widened in the same way, outside the loop that adds gradients up.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from virtualbatch.jax._arrays import is_array
from virtualbatch.jax._rowwise.entries import RowFunction, as_given, widened


class Traced(NamedTuple):
    """A function of rows for micro-batches of one kind.

    Fields:
        program: (number of the micro-batch, shared arrays, arrays of the micro-batch) -> outputs.
        shared: the wide arrays that every micro-batch is given, first those of the closure.
        run: (number, shared, micro-batch) -> leaves of the outputs.
        outputs: types of the outputs, in their structure.
    """

    program: ClosedJaxpr
    shared: list[Any]
    run: Callable[[Any, Sequence[Any], Any], list[Any]]
    outputs: Any


class Traces:
    """The programs of one call, each traced once.

    Args:
        function: computes the outputs of a micro-batch.
    """

    def __init__(self, function: RowFunction):
        self._function = function
        self._leaves, self._structure = jax.tree.flatten((function.args, function.kwargs))
        self._shared = [widened(leaf) for leaf in self._leaves if is_array(leaf)]
        self._made: dict[Any, tuple[list[Any], Traced]] = {}
        self._of_closure: dict[int, Any] = {}

    def of(self, kind: Any) -> Traced:
        """The program for micro-batches of a kind.

        Args:
            kind: a micro-batch of that kind, with types in place of its arrays.

        Raises:
            ValueError: an output has not one entry per row, or the function changes an argument.
            TypeError: an output is no array.
        """
        leaves, structure = jax.tree.flatten(kind)
        key = (structure, tuple(leaf if is_array(leaf) else id(leaf) for leaf in leaves))
        if key not in self._made:
            # The leaves are kept too, so that no later object gets the id of one of them.
            self._made[key] = leaves, self._traced(leaves, structure)
        return self._made[key][1]

    def _traced(self, leaves: list[Any], structure: Any) -> Traced:
        def entries(index: Any, shared: Sequence[Any], rows: Sequence[Any]) -> Any:
            given = _filled(self._structure, self._leaves, shared)
            return self._function.entries(given, _filled(structure, leaves, rows), index)

        number = jax.ShapeDtypeStruct((), "int32")
        rows = [leaf for leaf in leaves if is_array(leaf)]
        program, outputs = jax.make_jaxpr(entries, return_shape=True)(number, self._shared, rows)
        closure = program.consts

        def run(index: Any, shared: Sequence[Any], microbatch: Any) -> list[Any]:
            given = list(map(as_given, shared, closure))
            rows = [leaf for leaf in jax.tree.leaves(microbatch) if is_array(leaf)]
            found: list[Any] = jaxpr_as_fun(program.replace(consts=given))(
                index, *shared[len(closure) :], *rows
            )
            return found

        # The same array for all programs, so that the gradients of all of them are added up on it.
        wide = [self._of_closure.setdefault(id(x), widened(x)) for x in closure]
        return Traced(program, [*wide, *self._shared], run, outputs)


def _filled(structure: Any, leaves: Sequence[Any], arrays: Sequence[Any]) -> Any:
    given = iter(arrays)
    return jax.tree.unflatten(structure, [next(given) if is_array(x) else x for x in leaves])
