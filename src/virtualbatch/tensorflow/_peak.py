"""Peak memory of a window, measured: TensorFlow cannot tell it beforehand.

On a GPU its allocator counts. On the host the kernel keeps the peak of the resident memory and
resets it on request; memory that an allocator keeps after a window counts as the next window's,
so sizes are measured from small to large.
"""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
# See proc(5): writing 5 resets the peak resident set size to the current one.
_RESET_PEAK = "5"


class PeakMemory:
    """Peaks of functions above what the process held when this was made.

    Raises:
        NotImplementedError: neither a GPU nor the kernel tells a peak.
    """

    def __init__(self) -> None:
        gpus = tf.config.list_logical_devices("GPU")
        self._device = gpus[0].name if gpus else None
        if self._device is None and not _kernel_tells():
            raise NotImplementedError(
                "A plan on TensorFlow needs a GPU, or Linux that shows VmHWM and clear_refs. "
                f"Got {sys.platform} without them. Pass microbatch_size as a number."
            )
        _trim()
        self._before = self._current()

    def of(self, run: Callable[[], Any]) -> int:
        """The most bytes that were held while a function ran, beyond the start.

        Args:
            run: called once; it must wait for its result.
        """
        if self._device is not None:
            tf.config.experimental.reset_memory_stats(self._device)
            run()
            peak = tf.config.experimental.get_memory_info(self._device)["peak"]
        else:
            _trim()
            _CLEAR_REFS.write_text(_RESET_PEAK)
            run()
            peak = _status_bytes("VmHWM")
        return max(0, int(peak) - self._before)

    def _current(self) -> int:
        if self._device is not None:
            return int(tf.config.experimental.get_memory_info(self._device)["current"])
        return _status_bytes("VmRSS")


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes that a function held beyond what was held before.

    Args:
        run: called once; it must wait for its result.
    """
    return PeakMemory().of(run)


def _trim() -> None:
    """Gives freed memory back to the system, where the C library can."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _kernel_tells() -> bool:
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
        return _status_bytes("VmHWM") > 0
    except (OSError, KeyError):
        return False


def _status_bytes(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise KeyError(key)
