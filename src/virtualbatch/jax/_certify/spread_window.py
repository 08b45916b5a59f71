"""The check of a loss whose rows are spread over a mesh, made as on one device."""

from typing import Any

from virtualbatch.jax._certify.first_window import cannot_try, prove_first_window
from virtualbatch.jax._spread import Spread
from virtualbatch.jax._weights import window_shares

# The reason for arrays that are spread over processes.
OF_OTHERS = "other processes hold a part of its arguments"


def prove_spread_window(
    spread: Spread,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    weight_takes: str,
    *,
    check: bool = True,
    is_rowwise: bool = False,
) -> None:
    """Checks the weights of a window outside a trace, and tries the law on some of its rows.

    Args:
        spread: the window.
        args: positional arguments, the batch among them.
        kwargs: keyword arguments.
        weight_takes: as in `prove_first_window`.
        check: whether the law is tried.
        is_rowwise: as in `prove_first_window`.

    Raises:
        ValueError: a weight is negative or not finite, or micro-batches do not add up.
    """
    program = spread.program._replace(axis_name=None)
    if not check and not callable(program.weight):
        return
    found = spread.as_one_device(args)
    if found is None:
        cannot_try(program, OF_OTHERS)
        return
    given, cut = found
    shares = window_shares(cut, program.weight)
    if check:
        prove_first_window(program, given, kwargs, cut, shares, weight_takes, is_rowwise)
