"""Certifying a training loop of one's own in PyTorch: its state is whatever has a state_dict."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from virtualbatch.certify import loop as loops
from virtualbatch.certify.certificate import Certificate
from virtualbatch.window.tree import mapped


def certify_loop(
    loop: Callable[[list[Any], int], Any],
    batches: Sequence[Any],
    *,
    microbatch_size: int,
    **state: Any,
) -> Certificate:
    """Proves that a loop of your own makes the updates of the whole batch, or names its mistake.

    See `virtualbatch.certify_loop`. Set seeds inside the loop if it draws random numbers.

    Args:
        loop: (list of micro-batches, accumulation_steps) -> anything. It trains in place.
        batches: two whole batches or more.
        microbatch_size: rows of one micro-batch; fewer than a batch has.
        **state: what the loop trains, by names of your own: modules, optimizers, schedulers,
            averages of weights, anything with `state_dict` and `load_state_dict`.

    Returns:
        The certificate. All of the state is as before, and `.grad`s of modules are None.

    Raises:
        ValueError: see `virtualbatch.certify_loop`.
        TypeError: a part of the state has no `state_dict`.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), 0.1)
        >>> def loop(microbatches, accumulation_steps):
        ...     for i, x in enumerate(microbatches):
        ...         (model(x).square().mean() / accumulation_steps).backward()
        ...         if (i + 1) % accumulation_steps == 0:
        ...             sgd.step()
        ...             sgd.zero_grad()
        >>> batches = list(torch.randn(2, 12, 4))
        >>> found = certify_loop(loop, batches, microbatch_size=4, model=model, sgd=sgd)
        >>> found.findings[0].kind
        'last_window'
    """
    for name, part in state.items():
        if not (hasattr(part, "state_dict") and hasattr(part, "load_state_dict")):
            raise TypeError(
                "The state of a loop must have state_dict and load_state_dict. "
                f"Got {name}={type(part).__name__}. Pass the module, the optimizer, the scheduler."
            )

    def save() -> Any:
        return {name: mapped(_on_host, part.state_dict()) for name, part in state.items()}

    def load(saved: Any) -> None:
        for name, part in state.items():
            part.load_state_dict(copy.deepcopy(saved[name]))
            if isinstance(part, torch.nn.Module):
                part.zero_grad(set_to_none=True)

    return loops.certify_loop(loop, batches, microbatch_size=microbatch_size, save=save, load=load)


def _on_host(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    found = leaf.detach().cpu()
    # NumPy does not know bfloat16.
    return found.float() if found.dtype == torch.bfloat16 else found.clone()
