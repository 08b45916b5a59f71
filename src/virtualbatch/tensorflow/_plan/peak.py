"""Peak memory of a window, measured, because TensorFlow cannot predict it.

On a GPU TensorFlow's allocator counts. It also counts on the host if the process was started with
TF_CPU_ALLOCATOR_USE_BFC=true. Otherwise the kernel of the operating system keeps the peak of the
resident memory, and resets it on request. The allocator keeps memory of an earlier window. If that
memory is used again, the peak does not show it, so sizes are measured from small to large.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from virtualbatch.plan.host_memory import give_back_freed_memory
from virtualbatch.plan.resident_memory import (
    kernel_tells_peak,
    peak_resident_bytes,
    reset_peak,
    resident_bytes,
)
from virtualbatch.plan.timing import Timing

# The most runs of one measurement, and the seconds after which no new run begins.
_RUNS = 24
_SECONDS = 1.0


class PeakMemory:
    """Peaks of functions, above what the process held when this object was made.

    Raises:
        NotImplementedError: neither a GPU nor the kernel reports a peak.
    """

    def __init__(self) -> None:
        self._device = _device_that_counts()
        if self._device is None and not kernel_tells_peak():
            raise NotImplementedError(
                "A plan on TensorFlow needs a GPU, or Linux that shows VmHWM and clear_refs. "
                f"Got {sys.platform} without them. Pass microbatch_size as a number."
            )
        give_back_freed_memory()
        self._before = self._current()

    def of(self, run: Callable[[], Any]) -> int:
        """The most bytes that were held while a function ran, beyond the start.

        Independent operations run in a changing order, so the peak changes from run to run. The
        largest peak of many runs must fit.

        Args:
            run: called up to 24 times. It must wait for its result.
        """
        peaks: list[int] = []
        begin = time.perf_counter()
        while len(peaks) < _RUNS and (not peaks or time.perf_counter() - begin < _SECONDS):
            peaks.append(self._once(run))
        return max(0, max(peaks) - self._before)

    def beside(self, run: Callable[[], float]) -> tuple[float, int]:
        """Runs a timed function, and measures its peak if that does not slow it down.

        Returns:
            (result of the function, its peak as in `of`; 0 if only the kernel reports peaks).
        """
        if self._device is None:
            return run(), 0
        self._reset(self._device)
        result = run()
        return result, max(0, self._peak(self._device) - self._before)

    def _once(self, run: Callable[[], Any]) -> int:
        if self._device is not None:
            self._reset(self._device)
            run()
            return self._peak(self._device)
        give_back_freed_memory()
        reset_peak()
        run()
        return peak_resident_bytes()

    def _reset(self, device: str) -> None:
        tf.config.experimental.reset_memory_stats(device)

    def _peak(self, device: str) -> int:
        return int(tf.config.experimental.get_memory_info(device)["peak"])

    def _current(self) -> int:
        if self._device is not None:
            return int(tf.config.experimental.get_memory_info(self._device)["current"])
        return resident_bytes()


class Watched:
    """A window whose runs report their time, and their peak where it can be measured.

    Args:
        run: () -> seconds. It runs the window and waits for it.
        peak: measures the peak.
    """

    def __init__(self, run: Callable[[], float], peak: PeakMemory):
        self._run = run
        self._peak = peak
        self._most: int | None = None
        self.timing = Timing(self._watched)

    def peak_bytes(self) -> int:
        """The most bytes that a run needed so far. The first call makes several runs."""
        if self._most is None:
            # The first run of a graph needs more memory than later runs.
            self.timing.run()
            self._most = self._peak.of(self.timing.run)
        return self._most

    def _watched(self) -> float:
        if self._most is None:
            return self._run()
        seconds, found = self._peak.beside(self._run)
        self._most = max(self._most, found)
        return seconds


def _device_that_counts() -> str | None:
    """A device whose allocator reports current and peak bytes."""
    gpus = tf.config.list_logical_devices("GPU")
    if gpus:
        return str(gpus[0].name)
    # The tensor must exist during the question, so that a counting allocator counts it.
    held = tf.fill((1024,), 1.0)
    try:
        counted = tf.config.experimental.get_memory_info("CPU:0")["current"]
    except ValueError:
        # This allocator keeps no count.
        return None
    return "CPU:0" if counted >= held.shape[0] else None
