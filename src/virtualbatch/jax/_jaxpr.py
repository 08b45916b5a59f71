"""A user's function, evaluated equation by equation.

This gives every value with the line that computed it. It also lets each row keep its random bits: a
run on some rows of a batch takes the bits that the whole batch drew for these rows.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import jaxlib
import numpy as np

from virtualbatch.certify.activations import Recording
from virtualbatch.certify.users_line import OURS, Line, folder, users_line

# Operations whose inner program is run equation by equation. Custom derivative rules must be kept.
CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"}
# Operations with a custom derivative rule. Their inner program is run so only if nothing is
# differentiated.
RULES = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
_DRAWS = {"random_bits", "rng_bit_generator", "threefry2x32"}
_LIBRARIES = (folder(jax.__file__), folder(jaxlib.__file__), OURS)

# (program, equation in it, values of its inputs) -> values of its outputs.
Equation = Callable[[Any, Any, Sequence[Any]], list[Any]]


class Traced(NamedTuple):
    """A function of arrays as equations.

    Fields:
        program: a `ClosedJaxpr`.
        structure: the structure of the function's result.
    """

    program: Any
    structure: Any


def traced(fun: Callable[..., Any], arrays: Sequence[Any]) -> Traced:
    """The equations of a function.

    Args:
        fun: list of arrays -> pytree.
        arrays: the function's argument, as arrays or their shapes.
    """
    program, shape = jax.make_jaxpr(fun, return_shape=True)(list(arrays))
    return Traced(program, jax.tree.structure(shape))


def drawn_shapes(program: Any) -> list[tuple[int, ...]]:
    """Shapes of all random bits, in order.

    Raises:
        ValueError: random bits are drawn in a loop or branch, where they cannot be kept by row.
    """
    found: list[tuple[int, ...]] = []
    for equation in program.jaxpr.eqns:
        if equation.primitive.name == "random_bits":
            found.append(tuple(equation.outvars[0].aval.shape))
        elif equation.primitive.name in CALLS:
            found += drawn_shapes(closed(equation))
        elif _draws_within(equation):
            raise ValueError(
                "certify keeps random numbers by row, which it cannot do inside a loop or a "
                f"branch. Got random numbers drawn in {equation.primitive.name} at "
                f"{_line(equation) or 'an unknown line'}. Turn dropout off for the comparison."
            )
    return found


def floating_dtypes(program: Any) -> set[Any]:
    """The floating dtypes of all values of a program and of the programs inside it."""
    found: set[Any] = set()
    for equation in program.jaxpr.eqns:
        dtypes = {getattr(variable.aval, "dtype", None) for variable in equation.outvars}
        found |= {x for x in dtypes if x is not None and jnp.issubdtype(x, jnp.floating)}
        for inner in jex.jaxprs_in_params(equation.params):
            found |= floating_dtypes(jex.ClosedJaxpr(inner, ()))
    return found


def evaluate(
    found: Traced,
    arrays: Sequence[Any],
    draw: Callable[[Any], Any] | None = None,
    recording: Recording | None = None,
) -> Any:
    """Runs the equations.

    Args:
        found: the function.
        arrays: the function's argument.
        draw: random bits -> the bits to use instead; None to use the drawn ones.
        recording: receives all floating values; or None.

    Returns:
        What the function returns.
    """

    def outputs_of(place: str, jaxpr: Any, equation: Any, given: Sequence[Any]) -> list[Any]:
        name = equation.primitive.name
        where = _line(equation) or place
        if name in CALLS or (name in RULES and recording is not None):
            return run(closed(equation), given, partial(outputs_of, where))
        outputs = run_equation(jaxpr, equation, given)
        if name == "random_bits" and draw is not None:
            outputs = [draw(outputs[0])]
        if recording is not None:
            _record(equation, outputs, where, recording)
        return outputs

    return jax.tree.unflatten(found.structure, run(found.program, arrays, partial(outputs_of, "")))


def run(program: Any, arguments: Sequence[Any], outputs_of: Equation) -> list[Any]:
    """Runs a program equation by equation.

    Args:
        program: a `ClosedJaxpr`.
        arguments: its arguments.
        outputs_of: runs one equation, such as `run_equation`.

    Returns:
        What the program returns.
    """
    jaxpr = program.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, program.consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    for equation in jaxpr.eqns:
        outputs = outputs_of(jaxpr, equation, [read(atom) for atom in equation.invars])
        kept = zip(equation.outvars, outputs, strict=True)
        values.update(
            (variable, x) for variable, x in kept if not isinstance(variable, jex.DropVar)
        )
    return [read(atom) for atom in jaxpr.outvars]


def run_equation(jaxpr: Any, equation: Any, given: Sequence[Any]) -> list[Any]:
    """Runs one equation as a program of its own, because JAX versions bind primitives differently.

    Args:
        jaxpr: the program that holds it.
        equation: the equation.
        given: values of its inputs.

    Returns:
        Values of its outputs; None for outputs that nothing reads.
    """
    read = {
        atom: x
        for atom, x in zip(equation.invars, given, strict=True)
        if not isinstance(atom, jex.Literal)
    }
    written = [atom for atom in equation.outvars if not isinstance(atom, jex.DropVar)]
    program = jaxpr.replace(
        constvars=[], invars=list(read), outvars=written, eqns=[equation], effects=equation.effects
    )
    outputs = iter(jex.jaxpr_as_fun(jex.ClosedJaxpr(program, ()))(*read.values()))
    return [None if isinstance(atom, jex.DropVar) else next(outputs) for atom in equation.outvars]


def _record(equation: Any, outputs: Sequence[Any], where: str, recording: Recording) -> None:
    layer = str(equation.source_info.name_stack)
    norm = "BatchNorm" if "BatchNorm" in layer or "BatchNorm" in where else layer
    place = f"{layer}, {where}" if layer else where or "fun"
    for output in outputs:
        if hasattr(output, "dtype") and jnp.issubdtype(output.dtype, jnp.floating):
            recording.add(place, norm, np.asarray(output, np.float64))


def _line(equation: Any) -> str:
    """The line of the user's code that an equation comes from; empty if it is not known."""
    traceback = equation.source_info.traceback
    frames = traceback.frames if traceback is not None else []
    lines = (Line(frame.file_name, frame.line_num, frame.function_name) for frame in frames)
    return users_line(lines, _LIBRARIES)


def closed(equation: Any) -> Any:
    """The program inside an equation of `CALLS` or `RULES`."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = equation.params.get(name)
        if inner is not None:
            return inner if hasattr(inner, "consts") else jex.ClosedJaxpr(inner, ())
    raise ValueError(f"internal: {equation.primitive.name} holds no program.")


def _draws_within(equation: Any) -> bool:
    return any(
        inner.primitive.name in _DRAWS or _draws_within(inner)
        for jaxpr in jex.jaxprs_in_params(equation.params)
        for inner in jaxpr.eqns
    )
