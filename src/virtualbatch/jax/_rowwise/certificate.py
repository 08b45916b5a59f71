"""Certifying a `rowwise` function: the certificate of its surrogate loss."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from virtualbatch.certify.certificate import Certificate
from virtualbatch.certify.row_by_row import of_rows
from virtualbatch.jax._certify.certificate import certificate, check_cut
from virtualbatch.jax._rowwise.rowwise import RowwiseFunction
from virtualbatch.plan.auto import check_cut_or_auto, is_automatic

# The defaults of the other options of `certify`: argnums, has_aux, batch_argnum, weight,
# accumulator_dtype, key_argnum, grad_fn.
_LEFT_OUT = (0, False, 1, None, None, None, None)


def certify_rows(
    function: RowwiseFunction,
    microbatch_size: int | None,
    accumulation_steps: int | None,
    options: tuple[Any, ...],
) -> Callable[..., Certificate]:
    """The result of `certify` for a `rowwise` function.

    Args:
        function: a function that `rowwise` returned.
        microbatch_size: as given to `certify`; None for the function's own size.
        accumulation_steps: as given to `certify`; None for the function's own number.
        options: the other options of `certify`.

    Raises:
        ValueError: an option other than a size is given, or no size is given and the function's
            own size is `"auto"`.
    """
    if options != _LEFT_OUT:
        raise ValueError(
            "A rowwise function keeps the options that it was made with. Got others in certify. "
            "Leave out all but microbatch_size and accumulation_steps."
        )
    size: Any = microbatch_size
    steps = accumulation_steps
    if size is None and steps is None:
        size, steps = function.microbatch_size, function.accumulation_steps
    if is_automatic(size):
        raise ValueError(
            "certify needs a size. "
            f"Got a function with microbatch_size={size!r}. Pass microbatch_size to certify."
        )

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Certificate:
        program, given = function.as_loss(args)
        check_cut_or_auto(given[1], size, steps)
        check_cut(given[1], size, steps)
        return of_rows(certificate(program, given, kwargs, size, steps, "batch"))

    return wrapper
