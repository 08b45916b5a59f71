"""Ways to differentiate the weighted terms of one micro-batch, each into `.grad`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from virtualbatch.torch._stats import GradientNorms

# (terms, factors): adds the gradient of their weighted sum to every `.grad`.
Differentiate = Callable[[Sequence[torch.Tensor], Sequence[float]], None]


def from_factors(terms: Sequence[torch.Tensor], factors: Sequence[float]) -> None:
    """Starts a backward pass from the factors."""
    # As start values, the factors cost no extra multiplication. Each start is a new tensor: if a
    # term is a view of a parameter, the start becomes its `.grad`, which is added to in place.
    starts = [torch.full_like(term, factor) for term, factor in zip(terms, factors, strict=True)]
    torch.autograd.backward(terms, starts)


def through(
    backward_fn: Callable[[torch.Tensor], Any], norms: GradientNorms | None
) -> Differentiate:
    """Gives the weighted loss to the user's own backward pass.

    Args:
        backward_fn: scalar loss -> None.
        norms: receives the gradient that the pass starts from; None if no norms are needed.

    Raises:
        ValueError: when it is called: `backward_fn` ran no backward pass.
    """

    def differentiate(terms: Sequence[torch.Tensor], factors: Sequence[float]) -> None:
        first, *others = (
            # A window of one micro-batch is the ordinary computation, to the bit.
            term if factor == 1.0 else term * factor
            for term, factor in zip(terms, factors, strict=True)
        )
        loss = sum(others, first)
        if norms is not None:
            norms.hear_scale(loss)
        heard: list[torch.Tensor] = []
        loss.register_hook(heard.append)
        backward_fn(loss)
        if not heard:
            raise ValueError(
                "backward_fn must compute the gradients of the loss that it is given. Got "
                f"{backward_fn!r}, which ran no backward pass. Call backward() in it, such as "
                "lambda loss: scaler.scale(loss).backward()."
            )

    return differentiate


def outside_autocast(differentiate: Differentiate, device: str) -> Differentiate:
    """Differentiates outside autocast.

    Backward operations use the dtypes of their forward pass, so autocast must not choose again.
    """

    def outside(terms: Sequence[torch.Tensor], factors: Sequence[float]) -> None:
        with torch.autocast(device, enabled=False):
            differentiate(terms, factors)

    return outside
