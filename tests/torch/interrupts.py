"""Interrupts at any place of a call, and whether they leave it undone or done, nothing between."""

import contextlib
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules import module as of_all_modules

import virtualbatch
from virtualbatch.torch._signals import held_back

# Contexts of others that the package enters: a signal may come inside them too.
_CONTEXTS = (
    contextlib.__file__,
    *(
        str(Path(torch.__file__).parent / name)
        for name in (
            "autograd/grad_mode.py",
            "amp/autocast_mode.py",
            "utils/hooks.py",
            "utils/_python_dispatch.py",
        )
    ),
)
_OURS = str(Path(virtualbatch.__file__).parent)


class Subject(NamedTuple):
    """What is attacked.

    Fields:
        roots: modules.
        tensors: further tensors that may change.
        call: runs once.
        around: contexts of the user, which a signal may leave switched without our help.
    """

    roots: list[nn.Module]
    tensors: list[torch.Tensor]
    call: Callable[[], Any]
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


class Tracer:
    """Raises KeyboardInterrupt at one place, counted from 1; at 0 it only counts.

    Places are lines, and where a function returns; with `opcodes` each opcode too. Where signals
    are held back there are none.
    """

    def __init__(self, at: int, opcodes: bool = False):
        self.at, self.count = at, 0
        # What each place is.
        self.places: list[str] = []
        self._opcodes = opcodes

    def run(self, call: Callable[[], Any]) -> bool:
        """Whether the call was interrupted."""
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            call()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    def _enter(self, frame: Any, event: str, arg: Any) -> Any:
        # What is raised where a generator is thrown away goes nowhere.
        if not _is_ours(frame) or frame.f_code.co_name == "<genexpr>":
            return None
        frame.f_trace_opcodes = self._opcodes
        return self._place

    def _place(self, frame: Any, event: str, arg: Any) -> Any:
        if event in ("line", "return", "opcode") and not _are_held_back():
            self.count += 1
            file = frame.f_code.co_filename.rpartition("/")[2]
            self.places.append(f"{file}:{frame.f_lineno} {event}")
            if self.count == self.at:
                raise KeyboardInterrupt
        return self._place


def _is_ours(frame: Any) -> bool:
    """Whether a frame is one of the package, or of a context that it enters itself."""
    while frame.f_code.co_filename in _CONTEXTS and frame.f_back is not None:
        frame = frame.f_back
    return bool(frame.f_code.co_filename.startswith(_OURS))


def _are_held_back() -> bool:
    handler: Any = signal.getsignal(signal.SIGINT)
    return getattr(handler, "__module__", None) == held_back.__module__


class Alarm:
    """Raises out of a signal handler, some seconds after a call has begun."""

    def __init__(self, seconds: float):
        self._seconds = seconds

    def run(self, call: Callable[[], Any]) -> bool:
        """Whether the call was interrupted."""

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, self._seconds)
                call()
                return False
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            return True
        finally:
            signal.signal(signal.SIGALRM, before)


class State:
    """Everything that a call may change, with what it was when this was made."""

    def __init__(self, subject: Subject):
        self._subject = subject
        self._before = self._look()

    def now(self) -> dict[str, Any]:
        """What there is now, and whether it is still the same object."""
        return {
            name: (found is self._before.get(name), _value(found))
            for name, found in self._look().items()
        }

    def _look(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for k, root in enumerate(self._subject.roots):
            for name, layer in root.named_modules():
                place = f"{k}.{name}"
                for key, value in sorted(vars(layer).items()):
                    if isinstance(value, bool | int | float | None):
                        found[f"{place} {key}"] = value
                    elif key.endswith("_hooks"):
                        found[f"{place} {key}"] = _Hooks(value)
                for key, buffer in layer._buffers.items():
                    found[f"{place} buffer {key}"] = buffer
                for key, parameter in layer._parameters.items():
                    found |= _of(f"{place} {key}", parameter)
        for k, tensor in enumerate(self._subject.tensors):
            found |= _of(f"tensor {k}", tensor)
        return found | _of_process()


class _Hooks:
    """Hooks of others, by identity; those of the package show by their number."""

    def __init__(self, hooks: Any):
        self.number = len(hooks or ())


def _of(name: str, tensor: torch.Tensor | None) -> dict[str, Any]:
    if tensor is None:
        return {name: None}
    found: dict[str, Any] = {name: tensor, f"{name} grad": tensor.grad}
    found[f"{name} requires_grad"] = tensor.requires_grad
    found[f"{name} hooks"] = _Hooks(tensor._backward_hooks)
    found[f"{name} post hooks"] = _Hooks(tensor._post_accumulate_grad_hooks)
    if tensor.is_leaf and tensor.requires_grad:
        with torch.enable_grad():
            node = get_gradient_edge(tensor).node
        handle = node.register_hook(lambda *_: None)
        found[f"{name} node hooks"] = _Hooks(list(handle.hooks_dict_ref())[1:])
        handle.remove()
    return found


def _of_process() -> dict[str, Any]:
    found: dict[str, Any] = {
        "grad mode": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": str(torch.get_autocast_dtype("cpu")),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "autocast nesting": _nesting(),
        "default dtype": str(torch.get_default_dtype()),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "warnings": len(warnings.filters),
    }
    for key, value in vars(of_all_modules).items():
        if key.startswith("_global") and key.endswith("_hooks"):
            found[key] = _Hooks(value)
    return found


def _nesting() -> int:
    torch.autocast_increment_nesting()
    return int(torch.autocast_decrement_nesting())


def _reset() -> None:
    """What an interrupt has left of the process must not reach the next one."""
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.set_autocast_enabled("cpu", False)
    torch.set_autocast_cache_enabled(True)
    while torch._C._len_torch_dispatch_stack():
        torch._C._pop_torch_dispatch_stack(None)
    while _nesting():
        torch.autocast_decrement_nesting()
    for key, hooks in vars(of_all_modules).items():
        if key.startswith("_global") and key.endswith("_hooks"):
            hooks.clear()


def _value(found: Any) -> Any:
    if isinstance(found, _Hooks):
        return found.number
    if not isinstance(found, torch.Tensor):
        return found
    dense = (found.to_dense() if found.is_sparse else found).detach().contiguous().reshape(-1)
    return str(found.dtype), tuple(found.shape), dense.view(torch.uint8).numpy().tobytes()


class Attack:
    """One kind of call: its state before it and after it has run.

    Args:
        make: a new subject, the same each time.
    """

    def __init__(self, make: Callable[[], Subject]):
        self._make = make
        # What is imported, or made once for a process, is no change of a call.
        first = make()
        with first.around():
            first.call()
        _reset()
        whole = make()
        with whole.around():
            state = State(whole)
            self._done = [self._before(state), None]
            whole.call()
            self._done[1] = _comparable(state.now())

    def _before(self, state: State) -> dict[str, Any]:
        return _comparable(state.now())

    def places(self, opcodes: bool = False) -> list[str]:
        """The places of a call, in order."""
        tracer = Tracer(0, opcodes)
        subject = self._make()
        with subject.around():
            tracer.run(subject.call)
        _reset()
        return tracer.places

    def between(self, interrupt: Tracer | Alarm) -> list[str] | None:
        """What an interrupt has left that is neither as before nor done; None if nothing came."""
        subject = self._make()
        with subject.around():
            state = State(subject)
            if not interrupt.run(subject.call):
                return None
            found = _comparable(state.now())
        _reset()
        if found in self._done:
            return []
        return [
            name
            for name in sorted(found.keys() | self._done[0].keys())
            if found.get(name) != self._done[0].get(name)
        ]


def _comparable(now: dict[str, Any]) -> dict[str, Any]:
    """Numbers and texts may be other objects with the same value."""
    return {
        name: (same if isinstance(value, tuple) else None, value)
        for name, (same, value) in now.items()
    }
