"""BatchNorm layers in several forward passes that count as one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch

from virtualbatch.torch._batchnorm import MergedStatistics, is_tracked, listeners
from virtualbatch.torch._state import Buffers


def one_update(
    stack: ExitStack, layers: Sequence[torch.nn.Module], before: Buffers
) -> Callable[[], AbstractContextManager[None]]:
    """Gives BatchNorm layers one momentum update for several forward passes.

    If a window around the passes already records the layers, the passes count as one call there.

    Args:
        stack: the update is made when this stack is left without an error.
        layers: modules, each once.
        before: their buffers before the passes.

    Returns:
        A function that makes the context of one forward pass.
    """
    tracked = [layer for layer in layers if is_tracked(layer)]
    windows = {id(x): x for layer in tracked for x in listeners(layer)}
    alone = [layer for layer in tracked if not listeners(layer)]
    heard = [stack.enter_context(window.in_parts()) for window in windows.values()]
    if alone:
        own = MergedStatistics(alone, before)
        # The update is made when the layers have their own momentum again.
        stack.push(lambda kind, *_: own.commit() if kind is None else None)
        stack.enter_context(own.attached())
        heard.append(own)

    @contextmanager
    def forward() -> Iterator[None]:
        with ExitStack() as passes:
            for statistics in heard:
                passes.enter_context(statistics.forward())
            yield

    return forward
