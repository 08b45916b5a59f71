"""PyTorch's modes. Contexts switch them, and an interrupt may leave them switched.

The contexts of PyTorch are written in Python, so a signal may arrive inside their `__exit__`.
"""

from functools import cache
from operator import call

import torch
from torch.utils import _python_dispatch


class Modes:
    """The present modes of this thread.

    They are: whether gradients are recorded, which dispatch modes are active, and autocast.

    Args:
        is_outermost: whether no other `Modes` object is restored after this one. Only then autocast
            is read, which takes longer.
    """

    def __init__(self, *, is_outermost: bool = True):
        self._records = torch.is_grad_enabled()
        self._dispatch = torch._C._len_torch_dispatch_stack()
        self._autocast = _Autocast() if is_outermost else None

    def restore(self) -> None:
        """Switches back."""
        while torch._C._len_torch_dispatch_stack() > self._dispatch:
            torch._C._pop_torch_dispatch_stack(None)
        if not self._dispatch:
            _tell_no_dispatch()
        torch.set_grad_enabled(self._records)
        if self._autocast is not None:
            self._autocast.restore()


class _Autocast:
    """Autocast on the host and on the accelerator, as it is now."""

    def __init__(self) -> None:
        self._kinds = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in _kinds()
        ]
        self._keeps_casts = torch.is_autocast_cache_enabled()
        self._nesting = _nesting()

    def restore(self) -> None:
        for kind, enabled, dtype in self._kinds:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(self._keeps_casts)
        while _nesting() < self._nesting:
            torch.autocast_increment_nesting()
        while _nesting() > self._nesting:
            torch.autocast_decrement_nesting()
        if not self._nesting:
            torch.clear_autocast_cache()


@cache
def _kinds() -> tuple[str, ...]:
    """The device types that have autocast."""
    accelerator = torch.accelerator.current_accelerator()
    kinds = {"cpu", "cpu" if accelerator is None else accelerator.type}
    return tuple(filter(torch.amp.is_autocast_available, sorted(kinds)))


def _nesting() -> int:
    """The number of open autocast contexts. Only a change of it has a meaning."""
    # One call in C: between two calls in Python a signal handler may raise.
    return list(map(call, (torch.autocast_increment_nesting, torch.autocast_decrement_nesting)))[1]


def _tell_no_dispatch() -> None:
    """Clears the flags of dispatch modes, which compiled functions and fake tensors read."""
    torch._C._set_only_lift_cpu_tensors(False)
    _python_dispatch._is_in_torch_dispatch_mode = False
    _python_dispatch._is_in_non_infra_torch_dispatch_mode = False
    _python_dispatch._is_in_any_mode_without_ignore_compile_internals = False
    _python_dispatch.set_is_in_mode_without_ignore_compile_internals(False)
