"""Measures the peak memory of a part of a process's run, above what the process held before.

On Linux the kernel records the peak of the resident memory (VmHWM) and resets it on request, so
nothing is missed. Elsewhere a thread samples the resident memory, and may miss memory that is freed
between two samples.
"""

import threading

import psutil

from virtualbatch.plan.resident_memory import (
    kernel_tells_peak,
    peak_resident_bytes,
    resident_bytes,
)

_SECONDS_BETWEEN_SAMPLES = 0.002


class PeakMemory:
    """Measures the peak from its creation on.

    Attributes:
        baseline_bytes: resident memory of the process at the start, in bytes.
        method: "VmHWM", the kernel's own peak, or "sampled RSS".
    """

    baseline_bytes: int
    method: str

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._sampler: _Sampler | None = None
        if kernel_tells_peak():
            self.method = "VmHWM"
            self.baseline_bytes = resident_bytes()
        else:
            self.method = "sampled RSS"
            self.baseline_bytes = self._process.memory_info().rss
            self._sampler = _Sampler(self._process)
            self._sampler.start()

    def stop(self) -> int:
        """Ends the measurement.

        Returns:
            The peak above the baseline, in bytes, >= 0.
        """
        peak = peak_resident_bytes() if self._sampler is None else self._sampler.finish()
        return max(0, peak - self.baseline_bytes)


class _Sampler(threading.Thread):
    def __init__(self, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self._process = process
        self._finished = threading.Event()
        self._peak = 0

    def run(self) -> None:
        while not self._finished.wait(_SECONDS_BETWEEN_SAMPLES):
            self._sample()

    def finish(self) -> int:
        self._finished.set()
        self.join()
        self._sample()
        return self._peak

    def _sample(self) -> None:
        self._peak = max(self._peak, self._process.memory_info().rss)
