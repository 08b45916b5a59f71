"""The peak of this process's resident memory, which Linux keeps (VmHWM) and resets on request."""

from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
# See proc(5): writing 5 resets the peak resident set size to the current one.
_RESET_PEAK = "5"


def kernel_tells_peak() -> bool:
    """Whether the kernel reports the peak; if so, the peak is reset."""
    # Other systems lack the file; some sandboxes refuse the write or report no peak.
    try:
        reset_peak()
        return peak_resident_bytes() > 0
    except (OSError, KeyError):
        return False


def reset_peak() -> None:
    """Sets the peak to the current resident memory."""
    _CLEAR_REFS.write_text(_RESET_PEAK)


def resident_bytes() -> int:
    """Resident memory now, in bytes."""
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """The most resident memory since the last reset, in bytes."""
    return _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            kibibytes, _unit = value.split()
            return int(kibibytes) * 1024
    raise KeyError(key)
