"""What `loss(...).backward()` costs beside `backward(...)`: time, and peak memory.

The same update of 8 micro-batches of 32, in interleaved rounds in one process, each with
`zero_grad`, its gradients and one SGD update. Peaks are those of one window, in a process of its
own, above what the process held before it, on a model of 66 MiB whose gradients are most of that.

Usage: python benchmarks/loss.py [--models MLP transformer] [--rounds 60] [--json FILE]
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from command import apart, parser_of, save
from updates import measured

import virtualbatch.torch as vb
from virtualbatch.bench.case import Case
from virtualbatch.bench.children import FREED_AT_ONCE, tell
from virtualbatch.bench.contender import OURS, PEER, WHOLE, Contender, looped
from virtualbatch.bench.torch_models import Problem, problem
from virtualbatch.bench.torch_ways import weights_of
from virtualbatch.demo.peak_memory import PeakMemory

MODELS = {
    "MLP": (Case("torch", "MLP"), 1.20),
    "transformer": (Case("torch", "transformer"), 1.02),
}
LARGE = Case("torch", "MLP", scale=32)
# What the kernel counts of a process moves by so much from run to run.
MEMORY = 1.01
_MIB = 1024**2


def backward(given: Problem) -> torch.Tensor:
    return vb.backward(
        lambda batch: given.loss(given.model, batch),
        given.batch,
        module=given.model,
        microbatch_size=len(given.pieces[0][0]),
    )


def loss(given: Problem) -> torch.Tensor:
    found = vb.loss(
        lambda batch: given.loss(given.model, batch),
        given.batch,
        module=given.model,
        microbatch_size=len(given.pieces[0][0]),
    )
    found.backward()
    return found


def whole(given: Problem) -> torch.Tensor:
    found = given.loss(given.model, given.batch)
    found.backward()
    return found


WAYS: dict[str, tuple[str, Callable[[Problem], torch.Tensor]]] = {
    "backward": (OURS, backward),
    "loss": (PEER, loss),
    "whole batch": (WHOLE, whole),
}


def contender(name: str, case: Case) -> Contender:
    role, gradients = WAYS[name]
    given = problem(case)
    optimizer = torch.optim.SGD(given.model.parameters(), 1e-3)

    def update() -> torch.Tensor:
        optimizer.zero_grad()
        found = gradients(given)
        optimizer.step()
        return found.detach()

    return Contender(name, role, looped(update, float), weights_of(given.model))


def peak_of(name: str, kept: bool) -> int:
    """Peak bytes of one window, measured in this process, after one that needed as much.

    Args:
        name: of the way.
        kept: whether `.grad` is there before, and added to.
    """
    given = problem(LARGE)
    _, gradients = WAYS[name]
    gradients(given)
    given.optimizer.zero_grad(set_to_none=not kept)
    peak = PeakMemory()
    gradients(given)
    return peak.stop()


def main() -> None:
    parser = parser_of(__doc__, models=MODELS, rounds=60)
    arguments = parser.parse_args()
    # Threads that wait for each other on a shared machine measure the machine.
    torch.set_num_threads(1)
    if arguments.one:
        name, kept = arguments.one
        tell(peak_of(name, kept == "kept"))
        return
    result: dict[str, Any] = {"time": {}, "peak_bytes": {}}
    for name in arguments.models:
        case, asked = MODELS[name]
        rows = measured([contender(way, case) for way in WAYS], arguments.rounds)
        result["time"][name] = [asdict(row) for row in rows]
        low, median, high = next(row for row in rows if row.name == "loss").times_ours
        verdict = "ok" if median <= asked else "MISSED"
        print(
            f"{name:12} loss / backward {median:.3f} ({low:.3f} to {high:.3f}), "
            f"asked {asked:.2f} {verdict}",
            flush=True,
        )
    for kept in ("empty", "kept"):
        peaks = {way: apart(way, kept, **FREED_AT_ONCE) for way in WAYS}
        result["peak_bytes"][kept] = peaks
        verdict = "ok" if peaks["loss"] <= MEMORY * peaks["backward"] else "MISSED"
        line = "  ".join(f"{way} {peak / _MIB:.1f}" for way, peak in peaks.items())
        print(f"peak MiB, .grad {kept}: {line} {verdict}", flush=True)
    save(arguments.json, result)


if __name__ == "__main__":
    main()
