"""A window outside a trace. The first one is checked on a few rows, and losses are watched."""

from typing import Any, NamedTuple

import jax

from virtualbatch.jax._certify.first_window import prove_first_window
from virtualbatch.jax._remembered import remembered
from virtualbatch.jax._segment import Cut
from virtualbatch.jax._weights import window_shares
from virtualbatch.jax._window import Program
from virtualbatch.window.not_finite import rows_in_order


class EagerWindow(NamedTuple):
    """The window of one call, in micro-batches of any size.

    Fields:
        program: the loss and its options.
        args: positional arguments, with one batch among them.
        kwargs: keyword arguments.
        batch: the batch or Window.
        weight_takes: the arguments of the user's weight function, as code.
        check: whether the first window of the function is checked.
    """

    program: Program
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: Any
    weight_takes: str
    check: bool

    def run(self, cut: Cut) -> Any:
        """The result of the window.

        Raises:
            ValueError: the first rows show that the gradients of micro-batches do not add up.
        """
        program, args, kwargs = self.program, self.args, self.kwargs
        shares = window_shares(cut, program.weight)
        if self.check:
            prove_first_window(program, args, kwargs, cut, shares, self.weight_takes)
        losses: list[dict[Any, Any]] = []
        # JAX raises errors late, so this waits for the result. The caller would wait anyway.
        result = jax.block_until_ready(program.run(args, kwargs, cut, False, shares, losses))
        known = remembered(program.fun).losses
        loss = result[0][0] if program.has_aux else result[0]
        # If the caller differentiates this call, the loss is a tracer and has no value.
        if not isinstance(loss, jax.core.Tracer) and known.listens(float(loss)):
            known.hear(jax.tree.map(float, losses), rows_in_order(self.batch, cut.rows_in_order))
        return result
