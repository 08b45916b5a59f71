"""The state in which the first pass began, and in which the second pass must begin too.

It consists of random states, autocast, buffers, `training` of layers and `requires_grad`.
"""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

import torch

from virtualbatch.certify.randomness import HostRandom
from virtualbatch.torch._batchnorm import is_tracked
from virtualbatch.torch._modules import Inventory
from virtualbatch.torch._random import RandomState
from virtualbatch.torch._state import Buffers
from virtualbatch.torch._undo import Undo

_VERSION = torch.Tensor._version.__get__


class Replay:
    """The state at the start of a first pass.

    One snapshot is enough, because both passes run in the same order.

    Args:
        found: what the modules hold.
        devices: the devices, other than the host, whose random numbers are drawn.

    Attributes:
        before: the buffers before the pass; empty if the pass changed none.
        is_free: whether the two passes may be cut in different ways, because the first pass drew
            no random numbers and changed no buffer.
    """

    def __init__(self, found: Inventory, devices: Collection[torch.device]):
        layers = self._layers = found.with_buffers
        self._devices = devices
        self._random, self._host = _Generators(devices), HostRandom()
        self._trained = found.parameters
        self._modes = [(layer, layer.training) for layer in found.layers]
        self._versions = self._buffer_versions()
        self.before = Buffers(layers)
        self._changes_buffers = True
        self.is_free = False
        kinds = {"cpu", *(device.type for device in devices)}
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in sorted(kinds)
            if torch.amp.is_autocast_available(kind)
        ]
        self._keeps_casts = torch.is_autocast_cache_enabled()

    def begin(self) -> None:
        """Clears cached casts, so that a micro-batch casts anew, as in the second pass."""
        if any(enabled for _, enabled, _ in self._autocast):
            torch.clear_autocast_cache()

    def end(self) -> None:
        """Notes what the first pass has changed."""
        # The kernels of BatchNorm write buffers without a change of their versions.
        self._changes_buffers = (
            any(map(is_tracked, self._layers)) or self._buffer_versions() != self._versions
        )
        if not self._changes_buffers:
            self.before = Buffers(())
        moved = self._random.has_moved() or self._host.has_moved()
        self.is_free = not moved and not self._changes_buffers

    @contextmanager
    def again(self) -> Iterator[None]:
        """A context that starts in the state of the first pass, and restores the state after it."""
        random, host = _Generators(self._devices), HostRandom()
        buffers = Buffers(self._layers if self._changes_buffers else ())

        def put_back() -> None:
            buffers.restore()
            random.restore()
            host.restore()

        with Undo(put_back):
            self.before.restore()
            self._random.restore()
            self._host.restore()
            with self._switched():
                yield

    def autocast(self) -> ExitStack:
        """A context for a forward pass with the autocast settings of the first pass."""
        stack = ExitStack()
        for kind, enabled, dtype in self._autocast:
            stack.enter_context(
                torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=self._keeps_casts)
            )
        return stack

    @contextmanager
    def _switched(self) -> Iterator[None]:
        """A context with `training` and `requires_grad` as in the first pass."""
        others = [(x, x.training) for x, training in self._modes if x.training != training]
        frozen = [x for x in self._trained if not x.requires_grad]

        def switch_back() -> None:
            for layer, training in others:
                layer.training = training
            for parameter in frozen:
                parameter.requires_grad_(False)

        with Undo(switch_back):
            for layer, training in others:
                layer.training = not training
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield

    def _buffer_versions(self) -> list[tuple[int, int]]:
        buffers = [b for layer in self._layers for b in layer._buffers.values() if b is not None]
        return [(id(b), 0 if b.is_inference() else _VERSION(b)) for b in buffers]


class _Generators:
    """The random generators of PyTorch on the host and on devices, as they are now."""

    def __init__(self, devices: Collection[torch.device]):
        self._states = [RandomState(device) for device in devices or (None,)]

    def has_moved(self) -> bool:
        return any(state.has_moved() for state in self._states)

    def restore(self) -> None:
        for state in self._states:
            state.restore()
