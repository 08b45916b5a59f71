"""Certifying a hand-written PyTorch training loop, whose state is whatever has a state_dict."""

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch

from virtualbatch.certify import loop as loops
from virtualbatch.certify.certificate import Certificate
from virtualbatch.certify.users_line import OURS, folder, frames, line_of, users_line
from virtualbatch.window.tree import mapped


def certify_loop(
    loop: Callable[[list[Any], int], Any],
    batches: Iterable[Any],
    *,
    microbatch_size: int,
    **state: Any,
) -> Certificate:
    """Proves that your training loop makes the updates of the whole batch, or names its mistake.

    The loop runs on micro-batches and, with `accumulation_steps=1`, on the same rows as whole
    batches. Both runs must leave the same state. See `virtualbatch.certify_loop`. Set seeds inside
    the loop if it draws random numbers.

    Args:
        loop: a function of a list of micro-batches and `accumulation_steps`. It trains in place,
            and its result is ignored.
        batches: two whole batches or more, in a list, a loader or another iterable. The first two
            are used.
        microbatch_size: the rows of one micro-batch: fewer than a batch has.
        **state: what the loop trains, under names of your choice: modules, optimizers, schedulers,
            averages of weights. Each needs `state_dict` and `load_state_dict`.

    Returns:
        The certificate. All of the state is as before the call, and the `.grad` values of modules
        are None.

    Raises:
        ValueError: there is nothing to compare, the loop is not deterministic, or the state is not
            finite.
        TypeError: a part of the state has no `state_dict` and `load_state_dict`.

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

    updates = _Updates(loop)
    optimizers = [part for part in state.values() if isinstance(part, torch.optim.Optimizer)]
    handles = [optimizer.register_step_post_hook(updates.see) for optimizer in optimizers]
    try:
        found = loops.certify_loop(
            updates.run, batches, microbatch_size=microbatch_size, save=save, load=load
        )
    finally:
        for handle in handles:
            handle.remove()
    return updates.told(found) if optimizers else found


class _Updates:
    """Counts the optimizer steps of a loop, and keeps the line of code that calls them.

    Args:
        loop: the user's loop.
    """

    def __init__(self, loop: Callable[[list[Any], int], Any]):
        self._loop = loop
        self._line = ""
        self._count = 0
        # (updates made, windows) of the first call that accumulates.
        self._first: tuple[int, int] | None = None

    def run(self, microbatches: list[Any], accumulation_steps: int) -> None:
        """Runs the loop and counts its updates."""
        self._count = 0
        self._loop(microbatches, accumulation_steps)
        if accumulation_steps > 1 and self._first is None:
            self._first = self._count, -(-len(microbatches) // accumulation_steps)

    def see(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Counts an optimizer step. Called by a hook."""
        del optimizer, args, kwargs
        self._count += 1
        self._line = users_line(map(line_of, frames()), [OURS, folder(torch.__file__)])

    def told(self, found: Certificate) -> Certificate:
        """The certificate with the line and the count of updates, where something is wrong."""
        if found.exact or not self._line or self._first is None:
            return found
        findings = tuple(
            dataclasses.replace(each, where=f"{each.where}, updated at {self._line}")
            for each in found.findings
        )
        made, windows = self._first
        note = f"The optimizers made {made} updates in {windows} windows."
        return dataclasses.replace(found, findings=findings, notes=(*found.notes, note))


def _on_host(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    found = leaf.detach().cpu()
    # NumPy does not know bfloat16.
    return found.float() if found.dtype == torch.bfloat16 else found.clone()
