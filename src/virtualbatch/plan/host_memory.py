"""Memory of the host that this process may use.

A container sees the memory of the whole machine, although a control group (cgroup) or a resource
limit may allow less. The smallest limit counts.
"""

import ctypes
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class MemoryLimit:
    """One limit below the machine's memory.

    Args:
        source: the file or resource that sets it.
        limit_bytes: bytes that it allows.
        used_bytes: bytes of it that are in use.
    """

    source: str
    limit_bytes: int
    used_bytes: int = field(default=0, compare=False)


@dataclass(frozen=True)
class HostMemory:
    """Memory of the machine and the limits on this process.

    Args:
        total_bytes: the memory of the machine.
        available_bytes: the memory of the machine that is available without swapping.
        limits: the limits below `total_bytes`, smallest first.
    """

    total_bytes: int
    available_bytes: int
    limits: tuple[MemoryLimit, ...]

    @property
    def usable_bytes(self) -> int:
        """The machine's memory or the smallest limit, whichever is less, in bytes."""
        return min([self.total_bytes, *(limit.limit_bytes for limit in self.limits)])

    @property
    def left_bytes(self) -> int:
        """Bytes that this process may still allocate."""
        left = (limit.limit_bytes - limit.used_bytes for limit in self.limits)
        return max(0, min([self.available_bytes, *left]))


def give_back_freed_memory() -> None:
    """Returns freed memory to the system, if the C library can (glibc)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def host_memory(root: Path = Path("/")) -> HostMemory:
    """Reads the machine's memory and the limits on this process.

    Args:
        root: folder that holds `proc` and `sys`.
    """
    total, available = _machine_memory(root)
    limits = [*_cgroup_limits(root), *_resource_limits(root)]
    return HostMemory(
        total_bytes=total,
        available_bytes=available,
        limits=tuple(
            sorted(
                # "No limit" is written as a number near 2**63 in cgroup v1.
                (limit for limit in limits if limit.limit_bytes < total),
                key=lambda limit: limit.limit_bytes,
            )
        ),
    )


def _machine_memory(root: Path) -> tuple[int, int]:
    """Total and available bytes of the machine."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        # This is not Linux. The import is here, because engines must not import psutil.
        import psutil

        memory = psutil.virtual_memory()
        return memory.total, memory.available
    found = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    # The file says kB but means 1,024 bytes.
    return found["MemTotal"] * 1024, found["MemAvailable"] * 1024


def _cgroup_limits(root: Path) -> list[MemoryLimit]:
    """Limits of this process's control group and of every group above it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            mount, name, used = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            used = "memory.usage_in_bytes"
        else:
            continue
        folder = mount / group.lstrip("/")
        for level in (folder, *folder.parents):
            limit, taken = _number_in(level / name), _number_in(level / used) or 0
            if limit is not None:
                limits.append(MemoryLimit(str(level / name), limit, taken - _cache(level)))
            if level == mount:
                break
    return limits


def _number_in(file: Path) -> int | None:
    # Inside a container the group's own path may not be mounted; the levels above it still are.
    try:
        content = file.read_text().strip()
    except OSError:
        return None
    return int(content) if content.isdecimal() else None


def _cache(group: Path) -> int:
    """Bytes of a group that cache files; the kernel frees them on demand."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    found = dict(line.split() for line in lines)
    return int(found.get("total_inactive_file", found.get("inactive_file", 0)))


def _resource_limits(root: Path) -> list[MemoryLimit]:
    if sys.platform == "win32":
        return []
    import resource

    soft, _hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return []
    try:
        pages = int((root / "proc/self/statm").read_text().split()[0])
    except OSError:
        pages = 0
    return [MemoryLimit("RLIMIT_AS", soft, pages * os.sysconf("SC_PAGE_SIZE"))]
