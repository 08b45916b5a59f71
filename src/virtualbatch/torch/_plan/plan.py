"""Planning on PyTorch: what a window holds at its peak, and how long it takes."""

import logging
import math
import time
from typing import Any

import torch

from virtualbatch.plan.host_memory import host_memory
from virtualbatch.plan.patience import TimeBudget
from virtualbatch.plan.plan import Plan, parse_limit
from virtualbatch.plan.search import ROOM_FOR_TOOLS, Question, Search
from virtualbatch.plan.timing import Timing
from virtualbatch.torch._batch import Microbatch, microbatches, named_leaves
from virtualbatch.torch._modules import inventory
from virtualbatch.torch._plan.memory import is_out_of_memory, left_bytes
from virtualbatch.torch._plan.peak import DeviceCount, can_fake, faked, peak_bytes
from virtualbatch.torch._random import RandomState
from virtualbatch.torch._window import Program
from virtualbatch.window.shares import Shares

_log = logging.getLogger(__name__)

# Seconds of micro-batches that are timed at once.
_MOMENT = 0.1
# The window's largest micro-batches are its first; one more shows what stays between them.
_STEADY = 3


def planned(program: Program, batch: Any, memory_limit: int | str | None) -> Plan:
    """The plan for a batch.

    Args:
        program: what is to be run.
        batch: a batch, not a Window.
        memory_limit: bytes, a text, or None.

    Raises:
        ValueError: not even one row fits, or a limit does not parse.
    """
    found = program.found
    (whole,) = microbatches(batch, None, 1)
    held = _held_bytes(program, batch)
    limit = parse_limit(memory_limit, left_bytes(found.accelerator) + held)
    search = Search(whole.rows, limit)
    if host_memory().left_bytes < ROOM_FOR_TOOLS:
        search.only_try()
    random = RandomState(found.accelerator)
    device = found.accelerator
    count = DeviceCount(device) if device is not None and device.type == "cuda" else None
    peaks: dict[int, int] = {}
    timings: dict[int, Timing] = {}
    patience = TimeBudget()
    try:
        while (question := search.ask()) is not None:
            if patience.is_over(question):
                search.skip(question)
                continue
            size = question.microbatch_size
            cut = microbatches(batch, size, None)
            try:
                shares = program.shares(cut)
                if size not in timings:
                    timings[size] = _timing(program, cut, shares)
                if question.kind == "trial":
                    search.tell(question, timings[size].seconds())
                    continue
                if size not in peaks:
                    peaks[size] = held + _peak(program, cut, shares, limit - held, count)
                    search.tell(Question("memory", size), peaks[size])
                # A size that was only predicted to fit may need a little more.
                if question.kind == "time" and peaks[size] <= limit:
                    search.tell(question, timings[size].seconds())
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                search.tell(question, None)
    finally:
        random.restore()
    return search.plan()


def _peak(
    program: Program,
    cut: list[Microbatch],
    shares: Shares,
    room: int,
    count: DeviceCount | None,
) -> int:
    """The most bytes that a window makes, beside what is held before it.

    Args:
        program: what is to be run.
        cut: the micro-batches.
        shares: their shares.
        room: bytes that it may make; what is known to need more is not run.
        count: of the device, where it counts.
    """
    cut, shares = _first(_STEADY, cut, shares)
    roots = program.found.roots
    if can_fake(roots):
        try:
            with faked(roots) as fake:
                on_fakes = program._replace(found=inventory(roots))
                pieces = [microbatch.faked(fake) for microbatch in cut]
                found = peak_bytes(lambda: on_fakes.run(pieces, shares, commit=False))
            if found > room or count is None:
                return found
        except Exception as error:
            # Values may be needed, or an operation may not know its shapes. Whatever is wrong with
            # the loss function itself is raised again by the window that is run instead.
            _log.debug("No plan on fake tensors: %s", error)
    counted = peak_bytes if count is None else count.peak_bytes
    return counted(lambda: program.run(cut, shares, commit=False))


def _timing(program: Program, cut: list[Microbatch], shares: Shares) -> Timing:
    """The time of a window, by as many of its micro-batches as take a moment.

    What else a machine does comes and goes within seconds: many short runs of all sizes, in turns,
    tell them apart where a few whole windows do not.
    """

    def seconds(count: int) -> float:
        part = _first(count, cut, shares)
        start = time.perf_counter()
        program.run(*part, commit=False)
        if program.found.accelerator is not None:
            torch.accelerator.synchronize(program.found.accelerator)
        return time.perf_counter() - start

    count = 0

    def load() -> None:
        nonlocal count
        # If the whole window is out of memory, these are.
        some = min(_STEADY, len(cut))
        count = min(len(cut), math.ceil(_MOMENT * some / seconds(some)))

    return Timing(lambda: seconds(count) * len(cut) / count, load)


def _first(count: int, cut: list[Microbatch], shares: Shares) -> tuple[list[Microbatch], Shares]:
    """A window of the first micro-batches alone."""
    return cut[:count], shares.mapped(lambda found: found[:count])


def _held_bytes(program: Program, batch: Any) -> int:
    """Bytes of parameters, their gradients, buffers and the batch, where the modules are."""
    device = program.found.accelerator or torch.device("cpu")
    tensors: list[Any] = [leaf for _, leaf in named_leaves(batch)]
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
