"""The dtypes that layers compute in, which parameters and the loss may not show.

A model may open autocast in its own forward pass, as with Accelerate. From outside it is float32.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import _global_forward_hooks, register_module_forward_hook

from virtualbatch.torch._undo import Undo
from virtualbatch.torch._unhook import unhook


@contextmanager
def heard_dtypes(found: set[torch.dtype]) -> Iterator[None]:
    """Collects the floating dtypes of what layers return inside the context.

    Args:
        found: the set that dtypes are added to.
    """

    def hear(module: torch.nn.Module, args: Any, output: Any) -> None:
        del module, args
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            found.add(output.dtype)

    filters: Any = warnings.filters
    before = list(filters)

    def leave() -> None:
        unhook(hear, _global_forward_hooks)
        filters[:] = before

    with Undo(leave):
        # A compiled module warns of hooks on all modules, but this hook is removed soon.
        warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)
        register_module_forward_hook(hear)
        yield
