"""Peak memory of a window, counted tensor by tensor as PyTorch creates and frees them."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from virtualbatch.torch._modes import Modes
from virtualbatch.torch._signals import held_back
from virtualbatch.torch._undo import Undo


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes that tensors made by a function held at once, on any device.

    Args:
        run: called once.
    """
    # PyTorch ends the process if an exception leaves some of its dispatched operations.
    with held_back(), _Counted() as counted:
        run()
    return counted.peak


class DeviceCount:
    """Bytes that a CUDA device holds by its own count, which includes workspaces of kernels.

    Args:
        device: the device to count on. The bytes that it holds now are the base.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._before = torch.cuda.memory_allocated(device)

    def peak_bytes(self, run: Callable[[], Any]) -> int:
        """The most bytes above the base.

        Args:
            run: called once.
        """
        torch.cuda.reset_peak_memory_stats(self._device)
        run()
        return torch.cuda.max_memory_allocated(self._device) - self._before


class _Counted(TorchDispatchMode):
    """Counts the bytes of storages that operations create while the mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {
            x.untyped_storage()._cdata
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor) and x.layout == torch.strided
        }
        for found in tree_leaves(result):
            # Sparse gradients are small and have no storage of their own.
            if isinstance(found, torch.Tensor) and found.layout == torch.strided:
                self._count(found.untyped_storage(), given)
        return result

    def _count(self, storage: Any, given: set[int]) -> None:
        key = storage._cdata
        if key in self._known or key in given:
            return
        size = storage.nbytes()
        self._known.add(key)
        self._held += size
        self.peak = max(self.peak, self._held)
        weakref.finalize(storage, self._dropped, key, size)

    def _dropped(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._held -= size


def can_fake(modules: list[torch.nn.Module]) -> bool:
    """Whether fake tensors are as large as real ones would be.

    Recurrent layers run in a kernel with a workspace. PyTorch knows its size only for real tensors.
    """
    return not any(isinstance(x, torch.nn.RNNBase) for root in modules for x in root.modules())


@contextmanager
def faked(modules: list[torch.nn.Module]) -> Iterator[Callable[[Any], Any]]:
    """Gives modules fake parameters and buffers, which have no memory, inside the context.

    After the context, parameters, buffers and all other attributes of the modules are put back.

    Args:
        modules: the modules. Their submodules are included.

    Yields:
        tensor -> fake tensor, for the tensors of a batch.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    layers = list({id(layer): layer for module in modules for layer in module.modules()}.values())
    before = [
        (layer, dict(vars(layer)), dict(layer._parameters), dict(layer._buffers))
        for layer in layers
    ]
    fakes: dict[int, FakeTensor] = {}

    def fake(tensor: torch.Tensor) -> Any:
        if id(tensor) not in fakes:
            found = mode.from_tensor(tensor, static_shapes=True)
            if isinstance(tensor, torch.nn.Parameter):
                found = torch.nn.Parameter(found, requires_grad=tensor.requires_grad)
            fakes[id(tensor)] = found
        return fakes[id(tensor)]

    lifts = torch._C._only_lift_cpu_tensors()

    def put_back() -> None:
        modes.restore()
        torch._C._set_only_lift_cpu_tensors(lifts)
        for layer, attributes, parameters, buffers in before:
            layer.__dict__.clear()
            layer.__dict__.update(attributes)
            layer._parameters.update(parameters)
            layer._buffers.clear()
            layer._buffers.update(buffers)

    modes = Modes()
    with Undo(put_back):
        for layer in layers:
            for tensors in (layer._parameters, layer._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = fake(tensor)
        # `put_back` leaves the mode, because an interrupt may cut the mode's own `__exit__`.
        mode.__enter__()
        yield fake
