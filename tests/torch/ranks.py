"""Runs a function in several processes of one gloo group on loopback, within a time limit.

Processes are forked from the one of the tests, so that none imports torch: a group costs tenths of
a second. Each finds the others through a file of its own group. No port is chosen, so none is
taken by somebody else meanwhile.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import distributed

# How long a rank may stay that nobody ends: longer than any parent waits.
_ORPHAN_S = 5.0
# How long a killed rank has to write down where it hangs.
_TRACE_S = 0.3


class Did(NamedTuple):
    """What one rank did.

    Fields:
        ended: how its function ended.
        value: what it returned.
        error: "TypeOfError: text" of what it raised.
        trace: where it raised or hangs.
        seconds: from the start of all ranks to its answer.
    """

    ended: Literal["returned", "raised", "hung", "died"]
    value: Any = None
    error: str | None = None
    trace: str = ""
    seconds: float = 0.0


def run(
    fn: Callable[..., Any], world: int, *args: Any, limit: float = 20, group_limit: float = 10
) -> list[Any]:
    """What `fn(rank, world, *args)` returns on each rank.

    Args:
        fn: any function, also a nested one; what it returns is pickled.
        world: how many ranks.
        args: given on to `fn`.
        limit: seconds until all must have answered.
        group_limit: seconds that a collective waits for the other ranks.

    Raises:
        AssertionError: some rank raised, hung or died; with the trace of each.
    """
    found = outcomes(fn, world, *args, limit=limit, group_limit=group_limit)
    if any(did.ended != "returned" for did in found):
        texts = [
            f"rank {n} {did.ended}. {did.error or ''}\n{did.trace}" for n, did in enumerate(found)
        ]
        raise AssertionError("\n".join(texts))
    return [did.value for did in found]


def outcomes(
    fn: Callable[..., Any], world: int, *args: Any, limit: float = 20, group_limit: float = 10
) -> list[Did]:
    """What each rank did with `fn(rank, world, *args)`; see `run`, but nothing is raised."""
    # The constructor of DistributedDataParallel imports it, which costs seconds in every child.
    import torch._dynamo  # noqa: F401

    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        ranks = []
        for rank in range(world):
            answers, answer = context.Pipe(duplex=False)
            given = (Path(folder), rank, world, fn, args, answer, limit, group_limit)
            process = context.Process(target=_child, args=given, daemon=True)
            with warnings.catch_warnings():
                # Threads of libraries are idle here, and a child starts its own.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            answer.close()
            ranks.append((process, answers))
        try:
            return _collect([answers for _, answers in ranks], ranks, began, limit, Path(folder))
        finally:
            for process, answers in ranks:
                process.kill()
                process.join()
                answers.close()


def _collect(
    waiting: list[Any], ranks: Sequence[Any], began: float, limit: float, folder: Path
) -> list[Did]:
    found: dict[int, Did] = {}
    numbers = {id(answers): rank for rank, (_, answers) in enumerate(ranks)}
    while waiting:
        ready = connection.wait(waiting, max(0.0, began + limit - time.monotonic()))
        if not ready:
            break
        for answers in ready:
            seconds = time.monotonic() - began
            try:
                did = Did(*pickle.loads(answers.recv_bytes()), seconds)
            except EOFError:
                did = Did("died", seconds=seconds)
            found[numbers[id(answers)]] = did
            waiting.remove(answers)
    late = [rank for rank in range(len(ranks)) if rank not in found]
    for rank in late:
        os.kill(ranks[rank][0].pid, signal.SIGUSR1)
    if late:
        time.sleep(_TRACE_S)
    for rank in late:
        found[rank] = Did("hung", trace=_trace_file(folder, rank).read_text(), seconds=limit)
    return [found[rank] for rank in range(len(ranks))]


def _child(
    folder: Path,
    rank: int,
    world: int,
    fn: Callable[..., Any],
    args: Sequence[Any],
    answer: Any,
    limit: float,
    group_limit: float,
) -> None:
    with _trace_file(folder, rank).open("w") as trace:
        # Works inside a collective as well, where no Python code runs.
        faulthandler.register(signal.SIGUSR1, trace)
        faulthandler.dump_traceback_later(limit + _ORPHAN_S, exit=True, file=trace)
        torch.set_num_threads(1)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        try:
            distributed.init_process_group(
                "gloo",
                init_method=f"file://{folder / 'group'}",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=group_limit),
            )
            # Tensors as bytes: they must outlive this process.
            did = pickle.dumps(("returned", fn(rank, world, *args), None, ""))
        except BaseException as error:  # It is told to the tests, whatever it is.
            text = f"{type(error).__name__}: {error}"
            did = pickle.dumps(("raised", None, text, traceback.format_exc()))
        answer.send_bytes(did)
        answer.close()
        # The end of this process would end collectives in which others still are.
        while True:
            signal.pause()


def _trace_file(folder: Path, rank: int) -> Path:
    return folder / f"trace{rank}"
