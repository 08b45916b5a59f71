"""The autograd node behind outputs: when the gradients of outputs arrive, it runs the second pass.

Every trained tensor is an input of this one node. So all that follows (adding to `.grad`, hooks,
reductions over ranks) happens once, with the gradients of the whole batch.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from virtualbatch.torch._rowwise.inputs import Inputs
from virtualbatch.torch._rowwise.outputs import Outputs
from virtualbatch.torch._rowwise.second_pass import SecondPass
from virtualbatch.torch._undo import all_or_nothing


def behind(outputs: Outputs, inputs: Inputs, second: SecondPass) -> Sequence[torch.Tensor | None]:
    """The leaves of outputs. The leaves that have a gradient get the node behind them.

    Args:
        outputs: the outputs of all rows.
        inputs: the inputs of the call.
        second: the second pass.
    """
    found: Sequence[torch.Tensor | None] = _Rowwise.apply(
        outputs.leaves, outputs.takes, second, inputs.tensors(), *inputs.trained()
    )
    return found


class _Rowwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        leaves: Sequence[torch.Tensor | None],
        takes: Sequence[bool],
        second: SecondPass,
        tensors: Sequence[torch.Tensor],
        *trained: torch.Tensor,
    ) -> tuple[torch.Tensor | None, ...]:
        ctx.second = second
        ctx.set_materialize_grads(False)
        pairs = zip(leaves, takes, strict=True)
        ctx.mark_non_differentiable(*(x for x, taken in pairs if x is not None and not taken))
        # Saved, so that PyTorch refuses tensors that were changed since, and a second backward
        # pass after the first one has freed them.
        ctx.save_for_backward(*(x for x in (*trained, *tensors) if not x.is_inference()))
        return tuple(leaves)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors
        # The access checks the tensors. Hooks that offload saved tensors have made copies here.
        del saved
        with torch.no_grad():
            found = all_or_nothing(partial(ctx.second.gradients, gradients))
        if torch.is_grad_enabled():
            found = _differentiated_once(found)
        return (None, None, None, None, *found)


def _differentiated_once(found: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
    """Gradients that refuse to be differentiated again."""
    tensors = [x.detach().requires_grad_() for x in found if x is not None]
    marked = iter(_Once.apply(*tensors) if tensors else ())
    return [None if x is None else next(marked) for x in found]


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x.view_as(x) for x in gradients)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> None:
        raise RuntimeError(
            "A rowwise result is differentiated once. Got a second derivative. "
            "Compute it uncut, or use virtualbatch.jax."
        )
