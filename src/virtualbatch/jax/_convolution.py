"""Convolutions inside a loop, written so that XLA on CPU finds its fast kernel.

XLA's CPU compiler changes a convolution to the axis order of that kernel only outside loops,
because its pass visits only the entry computation. The backward pass of a convolution has another
order. So in a loop it runs on a generic kernel, which takes ten times as long. Here each
convolution of a micro-batch's program gets transposed operands in the order of the fast kernel.
XLA's pass would do the same.

Cause: https://github.com/jax-ml/jax/issues/12868
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr

from virtualbatch.jax._jaxpr import run, run_equation


def with_fast_convolutions(program: ClosedJaxpr) -> ClosedJaxpr:
    """The same program, with its convolutions in the axis order batch, space, channels.

    Args:
        program: a traced function.

    Returns:
        A program with the same inputs and outputs. It is the given program if no convolution has
        another order, or if JAX does not run on a CPU.
    """
    if jax.default_backend() != "cpu" or not any(map(_is_slow, _convolutions(program.jaxpr))):
        return program
    return jax.make_jaxpr(partial(_evaluated, program))(*program.in_avals)


def is_slow_backwards(program: ClosedJaxpr) -> bool:
    """Whether the backward pass of a program is slow in a loop, if it is not rewritten.

    Args:
        program: a traced function.
    """
    return jax.default_backend() == "cpu" and any(_convolutions(program.jaxpr))


def _convolutions(program: Jaxpr) -> Iterator[Any]:
    for equation in program.eqns:
        if equation.primitive.name == "conv_general_dilated":
            yield equation
        for inner in _programs(equation.params):
            yield from _convolutions(inner)


def _programs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _is_slow(equation: Any) -> bool:
    is_convolution = equation.primitive.name == "conv_general_dilated"
    return is_convolution and not _is_canonical(equation.params["dimension_numbers"])


def _is_canonical(numbers: Any) -> bool:
    axes = len(numbers.lhs_spec)
    last = (0, axes - 1, *range(1, axes - 1))
    kernel = (axes - 1, axes - 2, *range(axes - 2))
    return numbers.lhs_spec == last and numbers.out_spec == last and numbers.rhs_spec == kernel


def _evaluated(program: ClosedJaxpr, *args: Any) -> list[Any]:
    return run(program, args, _fast)


def _fast(jaxpr: Jaxpr, equation: Any, given: Sequence[Any]) -> list[Any]:
    if _is_slow(equation):
        return [_convolved(given[0], given[1], equation.params)]
    params = {name: _rewritten(value) for name, value in equation.params.items()}
    return run_equation(jaxpr, equation.replace(params=params), given)


def _rewritten(value: Any) -> Any:
    """A parameter of an operation, with the programs inside it rewritten too."""
    if isinstance(value, tuple | list) and any(isinstance(x, ClosedJaxpr) for x in value):
        return type(value)(_rewritten(item) for item in value)
    if isinstance(value, ClosedJaxpr):
        return with_fast_convolutions(value)
    if isinstance(value, Jaxpr):
        found = with_fast_convolutions(ClosedJaxpr(value, ()))
        return value if found.consts else found.jaxpr
    return value


def _convolved(lhs: Any, rhs: Any, params: dict[str, Any]) -> Any:
    numbers = params["dimension_numbers"]
    axes = lhs.ndim
    space = range(2, axes)
    # A spec lists the axis of the batch (or outputs), of the channels (or inputs), then of space.
    lhs = lax.transpose(lhs, [numbers.lhs_spec[k] for k in (0, *space, 1)])
    rhs = lax.transpose(rhs, [numbers.rhs_spec[k] for k in (*space, 1, 0)])
    last = (0, axes - 1, *range(1, axes - 1))
    kernel = (axes - 1, axes - 2, *range(axes - 2))
    canonical = lax.ConvDimensionNumbers(last, kernel, last)
    found = lax.conv_general_dilated_p.bind(lhs, rhs, **params | {"dimension_numbers": canonical})
    order = [0] * axes
    for position, k in enumerate((0, *space, 1)):
        order[numbers.out_spec[k]] = position
    return lax.transpose(found, order)
