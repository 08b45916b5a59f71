"""The user's hooks on parameters: they get the gradient of the whole batch, or are not called.

Dictionaries of hooks are changed in place, because PyTorch holds them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch

from virtualbatch.torch._handover import emptied
from virtualbatch.torch._undo import Undo, all_or_nothing

Hook: TypeAlias = Callable[[Any], Any]


@contextmanager
def own_hooks_only(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Inside the context, the user's hooks do not get the gradients of micro-batches."""
    with emptied([hooks for x in parameters if (hooks := x._backward_hooks)]):
        yield


def spare_hooks(trained: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]) -> None:
    """Until the backward pass ends, hooks of a tensor without a gradient are not called.

    In an ordinary graph PyTorch does not call hooks of a tensor that the loss does not reach.
    Behind a node that is written in Python, it calls them with None.

    Args:
        trained: the inputs of the node that runs.
        gradients: the gradient of each input; None for no gradient.
    """
    spared: list[tuple[dict[int, Hook], Callable[[Hook, Any], Any]]] = []
    for x, gradient in zip(trained, gradients, strict=True):
        if gradient is not None:
            continue
        if hooks := x._backward_hooks:
            spared.append((hooks, _if_given))
        if hooks := x._post_accumulate_grad_hooks if x.is_leaf else None:
            spared.append((hooks, partial(_if_accumulated, _grad_of(x))))
    if not spared:
        return
    put_back = partial(_put_back, [hooks for hooks, _ in spared])
    # PyTorch calls this only if its backward pass ends without an error.
    torch.autograd.Variable._execution_engine.queue_callback(partial(_surely, put_back))
    with Undo(put_back) as undo:
        for hooks, call in spared:
            _spare(hooks, call)
        undo.instead(None)


class _Spared:
    """A user's hook that is called only if there is a gradient.

    In a later backward pass the hook is always called. If this object is still there then, the
    first pass has failed, and PyTorch tells nobody about that.
    """

    def __init__(self, call: Callable[[Hook, Any], Any], hook: Hook):
        self._call = call
        self._pass = torch._C._current_graph_task_id()
        self.hook = hook

    def __call__(self, argument: Any) -> Any:
        if torch._C._current_graph_task_id() != self._pass:
            return self.hook(argument)
        return self._call(self.hook, argument)


def _spare(hooks: dict[int, Hook], call: Callable[[Hook, Any], Any]) -> None:
    plain = {k: x.hook if isinstance(x, _Spared) else x for k, x in hooks.items()}
    hooks.update({k: _Spared(call, hook) for k, hook in plain.items()})


def _put_back(tables: Sequence[dict[int, Hook]]) -> None:
    for hooks in tables:
        hooks.update({k: hook.hook for k, hook in hooks.items() if isinstance(hook, _Spared)})


def _surely(put_back: Callable[[], None]) -> None:
    def run() -> None:
        with Undo(put_back):
            pass

    all_or_nothing(run)


def _if_given(hook: Hook, gradient: torch.Tensor | None) -> Any:
    return None if gradient is None else hook(gradient)


def _if_accumulated(before: tuple[int, int], hook: Hook, x: torch.Tensor) -> None:
    if _grad_of(x) != before:
        hook(x)


def _grad_of(x: torch.Tensor) -> tuple[int, int]:
    """The identity of `.grad`, and how often it was written."""
    return id(x.grad), 0 if x.grad is None else x.grad._version
