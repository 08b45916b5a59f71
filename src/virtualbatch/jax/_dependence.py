"""What the results of a function are computed from, read from its equations.

If a result does not depend on the batch and has the same formula for any number of rows, the whole
batch would give the same result. Values cannot show this: a count may be equal by chance.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from virtualbatch.jax._jaxpr import CALLS, RULES, closed

BATCH, STATE = "batch", "state"
# Constants of at most so many bytes are compared by value, larger ones by identity.
_SMALL = 2**16


class Source(NamedTuple):
    """What a value is computed from.

    Fields:
        reads: labels of the inputs that the value depends on; inside a loop also positions of
            inputs.
        counts: labels of the inputs that reach the value through integers alone, as in a running
            count.
        formula: a hash that is equal for equal computations on equal inputs.
    """

    reads: frozenset[Hashable]
    counts: frozenset[Hashable]
    formula: int


def given(label: Hashable, number: int, variable: Any) -> Source:
    """The source of an input.

    Args:
        label: the label of the input in `Source`.
        number: a number that no other input has.
        variable: the input as a variable of the program.
    """
    label_of_one = frozenset([label])
    counts = label_of_one if _is_integer(variable.aval) else frozenset[Hashable]()
    return Source(label_of_one, counts, hash(("input", number)))


def sources(program: Any, inputs: Sequence[Source]) -> list[Source]:
    """The sources of a program's results.

    Args:
        program: a `ClosedJaxpr`.
        inputs: the sources of its arguments.
    """
    jaxpr = program.jaxpr
    known = dict(zip(jaxpr.constvars, map(_constant, program.consts), strict=True))
    known.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Source:
        return _constant(atom.val) if isinstance(atom, jex.Literal) else known[atom]

    for equation in jaxpr.eqns:
        outputs = _outputs(equation, [read(atom) for atom in equation.invars])
        known.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _outputs(equation: Any, inputs: Sequence[Source]) -> list[Source]:
    name, params = equation.primitive.name, equation.params
    if name in CALLS or name in RULES:
        return sources(closed(equation), inputs)
    if name == "scan":
        body = _by_position(params["jaxpr"], range(len(inputs)))
        ran = ("scan", params["length"], params["reverse"])
        return _looped(ran, body, inputs, params["num_consts"], params["num_carry"])
    if name == "while":
        first, own = params["cond_nconsts"], params["body_nconsts"]
        carried = range(first + own, len(inputs))
        body = _by_position(params["body_jaxpr"], [*range(first, first + own), *carried])
        (again,) = _by_position(params["cond_jaxpr"], [*range(first), *carried])
        return _looped(("while", again.formula), body, inputs, first + own, len(body), again.reads)
    if name == "cond":
        which, *others = inputs
        branches = [sources(branch, others) for branch in params["branches"]]
        return [
            Source(
                _union([which.reads, *(source.reads for source in choices)]),
                _union(source.counts for source in choices),
                hash(("cond", which.formula, *(source.formula for source in choices))),
            )
            for choices in zip(*branches, strict=True)
        ]
    reads = _union(source.reads for source in inputs)
    counts = _union(source.counts for source in inputs)
    formula = (name, str(params), *(source.formula for source in inputs))
    return [
        Source(reads, counts if _is_integer(variable.aval) else frozenset(), hash((formula, k)))
        for k, variable in enumerate(equation.outvars)
    ]


def _by_position(program: Any, positions: Iterable[int]) -> list[Source]:
    """Sources of a loop's body. Its inputs are labelled by their positions in the loop's inputs."""
    variables = program.jaxpr.invars
    inputs = [given(k, k, variable) for k, variable in zip(positions, variables, strict=True)]
    return sources(program, inputs)


def _looped(
    ran: Hashable,
    body: Sequence[Source],
    inputs: Sequence[Source],
    first: int,
    carried: int,
    again: frozenset[Hashable] = frozenset(),
) -> list[Source]:
    """The sources of a loop's results.

    Args:
        ran: what else the results depend on, such as the number of runs.
        body: the results of one run: first the `carried` values that the next run takes, then
            others.
        inputs: the sources of the loop's inputs.
        first: the position of the first carried value among the inputs.
        carried: the number of carried values.
        again: the inputs that decide whether the loop runs once more.
    """

    def reached(start: Iterable[Hashable], field: str) -> frozenset[Hashable]:
        """Labels and positions that reach a value after any number of runs."""
        found, new = set[Hashable](), set(start)
        while new:
            found |= new
            steps = [k - first for k in new if isinstance(k, int) and 0 <= k - first < carried]
            new = {label for step in steps for label in getattr(body[step], field)} - found
        return frozenset(found)

    def outside(labels: Iterable[Hashable], field: str) -> frozenset[Hashable]:
        return _union(
            getattr(inputs[k], field) if isinstance(k, int) else frozenset([k]) for k in labels
        )

    results = []
    for number, source in enumerate(body):
        own = {first + number} if number < carried else set()
        read = reached(own | source.reads | again, "reads")
        used = sorted(k for k in read if isinstance(k, int))
        bodies = [(k, body[k - first].formula) for k in used if 0 <= k - first < carried]
        formula = (ran, source.formula, *bodies, *((k, inputs[k].formula) for k in used))
        counted = reached(own | source.counts, "counts")
        results.append(Source(outside(read, "reads"), outside(counted, "counts"), hash(formula)))
    return results


def _constant(value: Any) -> Source:
    """The source of a value that is no input."""
    if isinstance(value, jax.Array):
        # Constants that a trace makes are not JAX arrays, so the function closes over this array.
        integer = jnp.issubdtype(value.dtype, jnp.integer)
        counts = frozenset[Hashable]([STATE] if integer else [])
        return Source(frozenset(), counts, hash(("closed over", id(value))))
    found = np.asarray(value)
    content = found.tobytes() if found.nbytes <= _SMALL else id(value)
    return Source(frozenset(), frozenset(), hash((str(found.dtype), found.shape, content)))


def _is_integer(kind: Any) -> bool:
    return hasattr(kind, "dtype") and bool(jnp.issubdtype(kind.dtype, jnp.integer))


def _union(sets: Iterable[frozenset[Hashable]]) -> frozenset[Hashable]:
    return frozenset[Hashable]().union(*sets)
