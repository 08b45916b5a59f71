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
        before: the buffers.
        is_free: whether the first pass may be cut in another way than the second: it drew no
            random numbers, and changed no buffer.
    """

    def __init__(self, layers: Sequence[torch.nn.Module], device: torch.device | None):
        self._layers = layers
        self._device = device
        self._random, self._host = RandomState(device), HostRandom()
        self._versions = self._buffer_versions()
        self.before = Buffers(layers)
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
        self.is_free = (
            not any(map(is_tracked, self._layers))
            and self._buffer_versions() == self._versions
            and not self._random.has_moved()
            and not self._host.has_moved()
        )

    def put_back(self) -> None:
        """Lets everything be as it was where the first pass began."""
        self.before.restore()
        self._random.restore()
        self._host.restore()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Runs from the same state, and leaves no trace of it."""
        random, host, buffers = RandomState(self._device), HostRandom(), Buffers(self._layers)
        self.put_back()
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
