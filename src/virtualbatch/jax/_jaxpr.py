"""A user's function, evaluated equation by equation.

That shows every value with the line that computed it, and lets random bits be those of the rows: a
run on some rows of a batch draws what the whole batch drew for them.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from virtualbatch.certify.activations import Activation

# Programs within a program that are looked into. Derivative rules of others must stay.
_CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"}
# What has a derivative rule of its own is looked into where nothing is differentiated.
_RULES = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
_DRAWS = {"random_bits", "rng_bit_generator", "threefry2x32"}
_OURS = (str(Path(jax.__file__).parent), str(Path(__file__).parent.parent))


class Traced(NamedTuple):
    """A function of arrays as equations.

    Fields:
        program: a `ClosedJaxpr`.
        structure: of what the function returned.
    """

    program: Any
    structure: Any


def traced(fun: Callable[..., Any], arrays: Sequence[Any]) -> Traced:
    """The equations of a function.

    Args:
        fun: list of arrays -> pytree.
        arrays: its argument, arrays or their shapes.
    """
    program, shape = jax.make_jaxpr(fun, return_shape=True)(list(arrays))
    return Traced(program, jax.tree.structure(shape))


def drawn_shapes(program: Any) -> list[tuple[int, ...]]:
    """Shapes of all random bits, in order.

    Raises:
        ValueError: a loop or a branch draws, where rows cannot be told.
    """
    found: list[tuple[int, ...]] = []
    for equation in program.jaxpr.eqns:
        if equation.primitive.name == "random_bits":
            found.append(tuple(equation.outvars[0].aval.shape))
        elif equation.primitive.name in _CALLS:
            found += drawn_shapes(_closed(equation))
        elif _draws_within(equation):
            raise ValueError(
                "certify keeps random numbers by row, which it cannot do inside a loop or a "
                f"branch. Got random numbers drawn in {equation.primitive.name} at "
                f"{_line(equation) or 'an unknown line'}. Turn dropout off for the comparison."
            )
    return found


def floating_dtypes(program: Any) -> set[Any]:
    """The floating dtypes of all values of a program, those of programs within it too."""
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
    activations: list[Activation] | None = None,
) -> Any:
    """Runs the equations.

    Args:
        found: the function.
        arrays: its argument.
        draw: random bits as they would be -> those to take instead; None to take them.
        activations: where all floating values are put, or None.

    Returns:
        What the function returns.
    """
    program = found.program
    outputs = _run(program.jaxpr, program.consts, arrays, draw, activations, "")
    return jax.tree.unflatten(found.structure, outputs)


def _run(
    jaxpr: Any,
    consts: Sequence[Any],
    arguments: Sequence[Any],
    draw: Callable[[Any], Any] | None,
    activations: list[Activation] | None,
    place: str,
) -> list[Any]:
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    for equation in jaxpr.eqns:
        given = [read(atom) for atom in equation.invars]
        name = equation.primitive.name
        where = _line(equation) or place
        if name in _CALLS or (name in _RULES and activations is not None):
            inner = _closed(equation)
            outputs = _run(inner.jaxpr, inner.consts, given, draw, activations, where)
        else:
            outputs = _single(jaxpr, equation, given)
            if name == "random_bits" and draw is not None:
                outputs = [draw(outputs[0])]
            if activations is not None:
                activations += _floating(equation, outputs, where)
        kept = zip(equation.outvars, outputs, strict=True)
        values.update(
            (variable, x) for variable, x in kept if not isinstance(variable, jex.DropVar)
        )
    return [read(atom) for atom in jaxpr.outvars]


def _single(jaxpr: Any, equation: Any, given: Sequence[Any]) -> list[Any]:
    """Runs one equation, as a program of its own: how a primitive is bound differs by version."""
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


def _floating(equation: Any, outputs: Sequence[Any], where: str) -> list[Activation]:
    layer = str(equation.source_info.name_stack)
    norm = "BatchNorm" if "BatchNorm" in layer or "BatchNorm" in where else layer
    place = f"{layer}, {where}" if layer else where or "fun"
    return [
        Activation(place, norm, np.asarray(output, np.float64))
        for output in outputs
        if hasattr(output, "dtype") and jnp.issubdtype(output.dtype, jnp.floating)
    ]


def _line(equation: Any) -> str:
    """The user's line of an equation, or that of a library they use; empty if none is known."""
    traceback = equation.source_info.traceback
    frames = [
        frame
        for frame in (traceback.frames if traceback is not None else [])
        if not frame.file_name.startswith(_OURS) and not frame.file_name.startswith("<")
    ]
    if not frames:
        return ""
    inner, *outer = frames
    text = f"{Path(inner.file_name).name}:{inner.line_num}"
    if "site-packages" in inner.file_name:
        # A library's own line says little without the one that called it.
        owner = inner.function_name.split(".")[0]
        user = next((f for f in outer if "site-packages" not in f.file_name), None)
        text = f"{owner} ({text})"
        return f"{text}, {Path(user.file_name).name}:{user.line_num}" if user else text
    return text


def _closed(equation: Any) -> Any:
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
