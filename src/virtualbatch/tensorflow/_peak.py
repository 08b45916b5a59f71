"""Peak memory of a window, measured: TensorFlow cannot tell it beforehand.

On a GPU its allocator counts, and on the host too where a process was started with
TF_CPU_ALLOCATOR_USE_BFC=true. Elsewhere the kernel keeps the peak of the resident memory and resets
it on request. What the allocator kept of an earlier window is then not seen to be used again, so
sizes are measured from small to large.
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
        self._device = _device_that_counts()
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


def _device_that_counts() -> str | None:
    """A device whose allocator tells what it holds and held."""
    gpus = tf.config.list_logical_devices("GPU")
    if gpus:
        return str(gpus[0].name)
    # The constant is held while the question is asked.
    held = tf.fill((1024,), 1.0)
    try:
        counted = tf.config.experimental.get_memory_info("CPU:0")["current"]
    except ValueError:
        # This allocator keeps no count.
        return None
    return "CPU:0" if counted >= held.shape[0] else None


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
