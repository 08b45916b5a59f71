"""Planning on PyTorch: the peak memory of a window, and its time."""

import logging
import math
import time
from functools import partial
from typing import Any

import torch

from virtualbatch.plan import planner
from virtualbatch.plan.host_memory import host_memory
from virtualbatch.plan.plan import Plan
from virtualbatch.plan.planner import bytes_allowed
from virtualbatch.plan.retry import Memory
from virtualbatch.plan.search import ROOM_FOR_TOOLS
from virtualbatch.plan.timing import Timing
from virtualbatch.torch._batch import ReadBatch
from virtualbatch.torch._conclusion import take_back
from virtualbatch.torch._microbatch import Microbatch, known_rows
from virtualbatch.torch._modules import inventory
from virtualbatch.torch._plan.memory import ERRORS, left_bytes
from virtualbatch.torch._plan.peak import DeviceCount, can_fake, faked, peak_bytes
from virtualbatch.torch._random import RandomState
from virtualbatch.torch._replicas.found import refuse_in_step
from virtualbatch.torch._signals import held_back
from virtualbatch.torch._undo import Undo, all_or_nothing
from virtualbatch.torch._window import Program
from virtualbatch.window.shares import Shares

_log = logging.getLogger(__name__)

# The least seconds of one timed run, if the window is that long.
_MOMENT = 0.1
# The largest micro-batches come first. A few of them show what stays in memory between them.
_STEADY = 3


def planned(program: Program, batch: ReadBatch, memory_limit: int | str | None) -> Plan:
    """The plan for a batch.

    Args:
        program: the loss, its weight and its modules.
        batch: a batch, not a Window.
        memory_limit: bytes, a text, or None.

    Raises:
        ValueError: not even one row fits, the limit does not parse, or ranks must run together.
    """
    found = program.found
    refuse_in_step(found)
    device = found.accelerator
    held = _held_bytes(program, batch)
    memory = Memory(ERRORS, partial(left_bytes, device))
    limit = bytes_allowed(memory_limit, held, memory)
    count = DeviceCount(device) if device is not None and device.type == "cuda" else None
    with Undo(RandomState(device).restore):
        return planner.planned(
            lambda size: _Window(program, batch.cut(size, None), limit - held, count),
            known_rows(batch.whole),
            held,
            limit,
            ERRORS,
            remainder=True,
            tells_peaks=host_memory().left_bytes >= ROOM_FOR_TOOLS,
        )


class _Window:
    """The window of one size.

    Args:
        program: the loss, its weight and its modules.
        cut: the micro-batches.
        room: the bytes that the window may allocate. A window that is known to need more is not
            run.
        count: the count of the device; None if the device does not count.
    """

    def __init__(
        self, program: Program, cut: list[Microbatch], room: int, count: DeviceCount | None
    ):
        self._program, self._cut, self._room, self._count = program, cut, room, count
        self._shares = program.shares(cut)
        # A loss function may change its rows in place, but each run needs the original rows.
        protected = [microbatch.protected() for microbatch in cut]
        self.timing = _timing(program, protected, self._shares)
        self._peak: int | None = None

    def peak_bytes(self) -> int:
        if self._peak is None:
            self._peak = _peak(self._program, self._cut, self._shares, self._room, self._count)
        return self._peak


def _peak(
    program: Program,
    cut: list[Microbatch],
    shares: Shares,
    room: int,
    count: DeviceCount | None,
) -> int:
    """The most bytes that a window allocates, beyond what is held before it.

    Args:
        program: the loss, its weight and its modules.
        cut: the micro-batches.
        shares: the shares of the micro-batches.
        room: the bytes that the window may allocate. A window that is known to need more is not
            run.
        count: the count of the device; None if the device does not count.
    """
    cut, shares = _first(_STEADY, cut, shares)
    if can_fake(program.found.roots):
        # Outside the code that catches errors: errors of signal handlers are raised when
        # `held_back` ends.
        with held_back():
            found = _peak_on_fakes(program, cut, shares)
        if found is not None and (found > room or count is None):
            return found
    counted = peak_bytes if count is None else count.peak_bytes
    # Cloned before the count begins, because the planned window does not copy its rows.
    clones = [microbatch.with_tensors(torch.Tensor.clone) for microbatch in cut]
    return counted(lambda: program.run(clones, shares, take_back))


def _peak_on_fakes(program: Program, cut: list[Microbatch], shares: Shares) -> int | None:
    """The peak of a window on fake tensors; None if it cannot run on them."""
    roots = program.found.roots

    def run() -> int:
        with faked(roots) as fake:
            on_fakes = program._replace(found=inventory(roots, hands_over=True))
            pieces = [microbatch.with_tensors(fake) for microbatch in cut]
            return peak_bytes(lambda: on_fakes.run(pieces, shares, take_back))

    try:
        return all_or_nothing(run)
    except Exception as error:
        # The loss may need values, or an operation may not know its shapes. An error of the loss
        # function itself is raised again by the real window.
        _log.debug("No plan on fake tensors: %s", error)
        return None


def _timing(program: Program, cut: list[Microbatch], shares: Shares) -> Timing:
    """The time of a window, measured on a few of its micro-batches for a tenth of a second.

    Other load on a machine comes and goes within seconds. Many short runs of all sizes, in rounds,
    show which size is faster. A few whole windows do not.
    """

    def seconds(count: int) -> float:
        part = _first(count, cut, shares)
        start = time.perf_counter()
        program.run(*part, take_back)
        if program.found.accelerator is not None:
            torch.accelerator.synchronize(program.found.accelerator)
        return time.perf_counter() - start

    count = 0

    def load() -> None:
        nonlocal count
        # If memory is too small for the whole window, it is too small for these micro-batches.
        some = min(_STEADY, len(cut))
        count = min(len(cut), math.ceil(_MOMENT * some / seconds(some)))

    return Timing(lambda: seconds(count) * len(cut) / count, load)


def _first(count: int, cut: list[Microbatch], shares: Shares) -> tuple[list[Microbatch], Shares]:
    """A window of the first micro-batches alone."""
    return cut[:count], shares.mapped(lambda found: found[:count])


def _held_bytes(program: Program, batch: ReadBatch) -> int:
    """Bytes of parameters, gradients, buffers and the batch on the device of the modules."""
    device = program.found.accelerator or torch.device("cpu")
    tensors: list[Any] = [tensor for _, tensor in batch.whole.tensors()]
    for root in program.found.roots:
        tensors += [*root.parameters(), *root.buffers()]
        tensors += [parameter.grad for parameter in root.parameters()]
    storages = {
        found.untyped_storage()._cdata: found.untyped_storage().nbytes()
        for found in tensors
        if isinstance(found, torch.Tensor)
        and found.layout == torch.strided
        and found.device.type == device.type
    }
    return sum(storages.values())
