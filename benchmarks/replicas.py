"""Two processes, one batch: a window here beside stock DistributedDataParallel and the trainers.

The same update of 8 micro-batches of 32 rows on each rank, in interleaved rounds of one run, each
with `zero_grad`, its gradients and one SGD update; gloo on one machine. The small model shows what
a window costs beside its arithmetic, the large one what gradients cost on their way. Then the same
ways on masked tokens, 3 and 8 on one rank, 20 and 21 on the other. "error" is how far the first
update is from that of all rows in one process, relative to its length.

Usage: python benchmarks/replicas.py [--models small large] [--rounds 60] [--json FILE]
"""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from command import parser_of, save
from replicas_problems import TOKENS, Part, mlp, tokens
from torch import distributed
from torch.distributed.run import main as torchrun

import virtualbatch.torch as vb
from virtualbatch.bench.comparison import compared
from virtualbatch.bench.contender import OURS, PEER, WHOLE, Absent, Contender
from virtualbatch.bench.result import Row
from virtualbatch.bench.torch_ways import trainer, weights_of

# Scale of the MLP, 0.1 and 4.5 MB.
MODELS = {"small": 1, "large": 8}
STOCK, EACH = "stock DDP, no_sync", "stock DDP, reduced each time"
# The least time over ours that is asked, for the large model.
ASKED = {STOCK: 1.0, EACH: 1.43}
UPDATES = {"small": 8, "large": 1}


def by_backward(part: Part) -> None:
    vb.backward(part.loss, part.window, module=part.ddp, weight=part.own.weight)


def by_loss(part: Part) -> None:
    vb.loss(part.loss, part.window, module=part.ddp, weight=part.own.weight).backward()


def by_no_sync(part: Part) -> None:
    *others, last = part.own.pieces
    with part.ddp.no_sync():
        for piece in others:
            (part.loss(piece) / len(part.own.pieces)).backward()
    (part.loss(last) / len(part.own.pieces)).backward()


def reduced_each_time(part: Part) -> None:
    for piece in part.own.pieces:
        (part.loss(piece) / len(part.own.pieces)).backward()


def uncut(part: Part) -> None:
    part.own.loss(part.own.model, part.own.batch).backward()


WAYS: dict[str, tuple[str, Callable[[Part], None]]] = {
    "virtualbatch.backward": (OURS, by_backward),
    "virtualbatch.loss": (PEER, by_loss),
    STOCK: (PEER, by_no_sync),
    EACH: (PEER, reduced_each_time),
    "all rows in one process": (WHOLE, uncut),
}


def contender(name: str, part: Part) -> Contender:
    role, gradients = WAYS[name]

    def train(updates: int) -> float:
        distributed.barrier()
        start = time.perf_counter()
        for _ in range(updates):
            part.own.optimizer.zero_grad()
            gradients(part)
            part.own.optimizer.step()
        # Until the last rank has its update.
        distributed.barrier()
        return (time.perf_counter() - start) / updates

    return Contender(name, role, train, weights_of(part.own.model))


def everybody(make: Callable[[], Part]) -> list[Contender | Absent]:
    found: list[Contender | Absent] = [contender(name, make()) for name in WAYS]
    for package in ("accelerate", "lightning", "transformers"):
        part = make()
        found.append(trainer(package, part.case, part.own))
    return found


def report_times(name: str, rows: list[Row]) -> None:
    print(f"\n{name} model\n{'':32}{'ms':>9}{'over ours':>13}  quartiles")
    for row in rows:
        if row.milliseconds is None or row.times_ours is None:
            print(f"{row.name:32} {row.verdict}: pip install {row.package}")
            continue
        low, median, high = row.times_ours
        least = ASKED.get(row.name) if name == "large" else None
        met = (
            "" if least is None else f", asked {least:.2f}: {'ok' if median >= least else 'MISSED'}"
        )
        print(
            f"{row.name:32}{row.milliseconds[1]:9.2f}{median:13.3f}  {low:.3f} to {high:.3f}{met}",
            flush=True,
        )


def report_errors(rows: list[Row]) -> None:
    print(f"\nmasked tokens {TOKENS}\n{'':32}{'error':>9}")
    for row in rows:
        if row.error is not None:
            print(f"{row.name:32}{row.error:9.1e}  {row.verdict}", flush=True)


def main() -> None:
    parser = parser_of(__doc__, models=MODELS, rounds=60)
    arguments = parser.parse_args()
    if not distributed.is_torchelastic_launched():
        torchrun(["--standalone", "--nproc_per_node=2", *sys.argv])
        return
    # Threads that wait for each other on a shared machine measure the machine.
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    makers = {name: partial(mlp, MODELS[name]) for name in arguments.models} | {"tokens": tokens}
    result = {}
    for name, make in makers.items():
        updates = UPDATES.get(name, 1)
        rounds = arguments.rounds if name in MODELS else 1
        (rows,) = compared([everybody(make)], rounds, lambda _, n=updates: n)
        result[name] = [asdict(row) for row in rows]
        if distributed.get_rank() == 0:
            if name in MODELS:
                report_times(name, rows)
            else:
                report_errors(rows)
        distributed.barrier()
    if distributed.get_rank() == 0:
        save(arguments.json, result)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
