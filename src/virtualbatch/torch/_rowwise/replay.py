"""What the second pass must find as the first one did: random numbers, autocast, buffers."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from virtualbatch.certify.randomness import HostRandom
from virtualbatch.torch._batchnorm import is_tracked
from virtualbatch.torch._random import RandomState
from virtualbatch.torch._state import Buffers

_VERSION = torch.Tensor._version.__get__


class Replay:
    """Where a first pass begins. One snapshot is enough: both passes run in the same order.

    Args:
        layers: modules that have buffers of their own.
        device: a device beside the host whose random numbers are drawn.

    Attributes:
        before: the buffers, where the pass changes some.
        is_free: whether the first pass may be cut in another way than the second: it drew no
            random numbers, and changed no buffer.
    """

    def __init__(self, layers: Sequence[torch.nn.Module], device: torch.device | None):
        self._layers = layers
        self._device = device
        self._random, self._host = RandomState(device), HostRandom()
        self._versions = self._buffer_versions()
        self.before = Buffers(layers)
        self._changes_buffers = True
        self.is_free = False
        kinds = {"cpu"} | ({device.type} if device is not None else set())
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in sorted(kinds)
            if torch.amp.is_autocast_available(kind)
        ]
        self._keeps_casts = torch.is_autocast_cache_enabled()

    def begin(self) -> None:
        """Lets a micro-batch of the first pass make casts of its own, as in the second pass."""
        if any(enabled for _, enabled, _ in self._autocast):
            torch.clear_autocast_cache()

    def end(self) -> None:
        """Notes what the first pass has moved."""
        # The kernels of BatchNorm write what no version tells.
        self._changes_buffers = (
            any(map(is_tracked, self._layers)) or self._buffer_versions() != self._versions
        )
        if not self._changes_buffers:
            self.before = Buffers(())
        moved = self._random.has_moved() or self._host.has_moved()
        self.is_free = not moved and not self._changes_buffers

    @contextmanager
    def again(self) -> Iterator[None]:
        """Runs from the same state, and leaves no trace of it."""
        random, host = RandomState(self._device), HostRandom()
        buffers = Buffers(self._layers if self._changes_buffers else ())
        self.before.restore()
        self._random.restore()
        self._host.restore()
        try:
            yield
        finally:
            buffers.restore()
            random.restore()
            host.restore()

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """A forward pass with the casts of the first one."""
        with ExitStack() as stack:
            for kind, enabled, dtype in self._autocast:
                stack.enter_context(
                    torch.autocast(
                        kind, enabled=enabled, dtype=dtype, cache_enabled=self._keeps_casts
                    )
                )
            yield

    def _buffer_versions(self) -> list[int]:
        buffers = [b for layer in self._layers for b in layer._buffers.values() if b is not None]
        return list(map(_VERSION, buffers))
