"""Memory of the host as this process may use it.

A container is shown the whole machine's memory, while a control group (cgroup) or a resource
limit may grant it less. The smallest of them is what counts.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class MemoryLimit:
    """One limit below the machine's memory.

    Args:
        source: the file or resource that sets it.
        limit_bytes: what it grants, in bytes.
    """

    source: str
    limit_bytes: int


@dataclass(frozen=True)
class HostMemory:
    """Memory of the machine and the limits on this process.

    Args:
        total_bytes: of the machine.
        available_bytes: of the machine, without swapping.
        limits: those below `total_bytes`, smallest first.
    """

    total_bytes: int
    available_bytes: int
    limits: tuple[MemoryLimit, ...]

    @property
    def usable_bytes(self) -> int:
        """The least of the machine's memory and every limit, in bytes."""
        return min([self.total_bytes, *(limit.limit_bytes for limit in self.limits)])


def host_memory(root: Path = Path("/")) -> HostMemory:
    """Reads the machine's memory and the limits on this process.

    Args:
        root: folder that holds `proc` and `sys`.
    """
    memory = psutil.virtual_memory()
    limits = [*_cgroup_limits(root), *_resource_limits()]
    return HostMemory(
        total_bytes=memory.total,
        available_bytes=memory.available,
        limits=tuple(
            sorted(
                # "No limit" is written as a number near 2**63 in cgroup v1.
                (limit for limit in limits if limit.limit_bytes < memory.total),
                key=lambda limit: limit.limit_bytes,
            )
        ),
    )


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
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        folder = mount / group.lstrip("/")
        for level in (folder, *folder.parents):
            limits += _limit_in(level / name)
            if level == mount:
                break
    return limits


def _limit_in(file: Path) -> list[MemoryLimit]:
    # Inside a container the group's own path may not be mounted; the levels above it still are.
    try:
        content = file.read_text().strip()
    except OSError:
        return []
    return [MemoryLimit(str(file), int(content))] if content.isdecimal() else []


def _resource_limits() -> list[MemoryLimit]:
    if sys.platform == "win32":
        return []
    import resource

    soft, _hard = resource.getrlimit(resource.RLIMIT_AS)
    return [] if soft == resource.RLIM_INFINITY else [MemoryLimit("RLIMIT_AS", soft)]
