"""Every value that a forward pass computes, with the layer and the line that computed it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from virtualbatch.certify.activations import Activation, Recording
from virtualbatch.certify.users_line import OURS, folder, frames, line_of, users_line
from virtualbatch.torch._undo import Undo
from virtualbatch.torch._unhook import unhook

_LIBRARIES = (folder(torch.__file__), OURS)


class Recorder(TorchDispatchMode):
    """Keeps the floating results of all operations.

    Args:
        names: layer by identity -> its name.

    Attributes:
        recording: the recorded values.
    """

    def __init__(self, names: dict[int, str]):
        super().__init__()
        self.recording = Recording()
        self._names = names
        self._stack: list[torch.nn.Module] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        output = result[0] if isinstance(result, tuple) and result else result
        if (
            isinstance(output, torch.Tensor)
            and output.is_floating_point()
            and output.layout == torch.strided
        ):
            value = np.array(output.detach().to("cpu", torch.float64).numpy())
            layer = type(self._stack[-1]).__name__ if self._stack else ""
            self.recording.add(self._where(), layer, value)
        return result

    @contextmanager
    def following(self, layers: list[torch.nn.Module]) -> Iterator[None]:
        """Follows which layer runs, inside the context."""

        def enter(layer: torch.nn.Module, args: Any) -> None:
            self._stack.append(layer)

        def leave(layer: torch.nn.Module, args: Any, output: Any) -> None:
            self._stack.pop()

        def stop() -> None:
            for layer in layers:
                unhook(enter, layer._forward_pre_hooks)
                unhook(leave, layer._forward_hooks, layer._forward_hooks_always_called)

        with Undo(stop):
            for layer in layers:
                layer.register_forward_pre_hook(enter)
                layer.register_forward_hook(leave, always_call=True)
            yield

    def _where(self) -> str:
        line = users_line(map(line_of, frames()), _LIBRARIES)
        if not self._stack:
            return line or "loss_fn"
        layer = self._stack[-1]
        name = self._names.get(id(layer)) or "module"
        place = f"{name} ({type(layer).__name__})"
        return f"{place}, {line}" if line else place


def recorded(
    run: Callable[[], Any], layers: list[torch.nn.Module], names: dict[int, str]
) -> list[Activation]:
    """The values that a function computes, in order.

    Args:
        run: called once.
        layers: all layers that may run.
        names: layer by identity -> its name.
    """
    recorder = Recorder(names)
    with recorder.following(layers), recorder, torch.no_grad():
        run()
    return recorder.recording.activations
