"""How a plan should compare times: ways to choose a size, on the same disturbed times.

All sizes of a model are timed in turns, for minutes; the mean of each is taken for its true time.
Then every way chooses from moments of this record, as a plan would have met them: it begins at
many points of it, and each look that it takes moves it on by what the look took.

Usage: python benchmarks/races.py [--engines torch jax] [--models CNN] [--seconds 90] [--json FILE]
"""

import time
from collections.abc import Callable
from functools import partial
from statistics import fmean, stdev
from typing import Any, NamedTuple

import plan
from command import apart, parser_of, save
from plan_models import MODELS, ROWS, data, in_torch

from virtualbatch.bench.children import tell
from virtualbatch.plan.planner import BUDGET
from virtualbatch.plan.timing import FastestSize

SIZES = [4, 8, 16, 32, 64, 128, 256]
# Of one look, where a window can be run in part.
MOMENT = 0.1
STARTS = 200


class Look(NamedTuple):
    """What is timed at once of one size.

    Fields:
        run: runs it and waits for it.
        part: the share of the batch's rows that it is.
    """

    run: Callable[[], Any]
    part: float


class Moments:
    """What was recorded, read from one point on.

    Args:
        record: size -> seconds of the whole batch, by turn.
        parts: size -> the share of the batch that was run for it.
        start: a turn.
    """

    def __init__(self, record: dict[int, list[float]], parts: dict[int, float], start: int):
        self._record, self._parts = record, parts
        turns = zip(*(record[size] for size in SIZES), strict=True)
        self._lengths = [
            sum(seconds * parts[size] for size, seconds in zip(SIZES, turn, strict=True))
            for turn in turns
        ]
        self._turn, self._into = start, 0.0
        self.spent = 0.0

    def look(self, size: int) -> float:
        found = self._record[size][self._turn]
        self.spent += found * self._parts[size]
        self._into += found * self._parts[size]
        # From the last turn on with the first.
        while self._into >= self._lengths[self._turn]:
            self._into -= self._lengths[self._turn]
            self._turn = (self._turn + 1) % len(self._lengths)
        return found


def smallest(seconds: dict[int, float], tolerance: float) -> int:
    least = min(seconds.values())
    return min(size for size in seconds if seconds[size] <= (1 + tolerance) * least)


def shortest_of_three(moments: Moments) -> int:
    looks = [{size: moments.look(size) for size in SIZES} for _ in range(3)]
    return smallest({size: min(turn[size] for turn in looks) for size in SIZES}, 0.03)


def shortest_of_all(moments: Moments) -> int:
    """As many turns as the time allows."""
    looks = [{size: moments.look(size) for size in SIZES}]
    while moments.spent < BUDGET.seconds:
        looks.append({size: moments.look(size) for size in SIZES})
    return smallest({size: min(turn[size] for turn in looks) for size in SIZES}, 0.02)


def means_of_nine(moments: Moments) -> int:
    looks = [{size: moments.look(size) for size in SIZES} for _ in range(9)]
    return smallest({size: fmean(turn[size] for turn in looks) for size in SIZES}, 0.02)


def means_of_all(moments: Moments) -> int:
    """As many turns as the time allows."""
    looks = [{size: moments.look(size) for size in SIZES}]
    while moments.spent < BUDGET.seconds:
        looks.append({size: moments.look(size) for size in SIZES})
    return smallest({size: fmean(turn[size] for turn in looks) for size in SIZES}, 0.02)


def as_planned(moments: Moments, seconds: float = BUDGET.seconds) -> int:
    """What a plan does, with every size in the first turn."""
    found = FastestSize()
    for size in SIZES:
        found.tell(size, moments.look(size))
    while moments.spent < seconds and (size := found.next_measurement(BUDGET.rounds)) is not None:
        found.tell(size, moments.look(size))
    return found.chosen()[0]


WAYS: dict[str, Callable[[Moments], int]] = {
    "shortest of three": shortest_of_three,
    "shortest in its time": shortest_of_all,
    "means of nine": means_of_nine,
    "means in its time": means_of_all,
    "as a plan": as_planned,
    "as a plan in 20 s": partial(as_planned, seconds=20.0),
}


def looks_on_torch(name: str) -> dict[int, Look]:
    """Windows of the first rows only, of about the same length at each size."""
    import torch

    import virtualbatch.torch as vb

    torch.set_num_threads(1)
    module, loss_fn = in_torch(name)
    batch = [torch.as_tensor(array) for array in data(name)]

    def window(size: int, rows: int) -> Callable[[], Any]:
        part = [array[:rows] for array in batch]
        return lambda: vb.backward(loss_fn, part, module=module, microbatch_size=size)

    def look(size: int) -> Look:
        some = window(size, min(ROWS, 3 * size))
        some()
        start = time.perf_counter()
        some()
        each = (time.perf_counter() - start) / min(ROWS, 3 * size)
        rows = min(ROWS, max(1, round(MOMENT / each / size)) * size)
        return Look(window(size, rows), rows / ROWS)

    return {size: look(size) for size in SIZES}


def measured(engine: str, name: str, seconds: float) -> dict[str, Any]:
    """Records one model and has every way choose."""
    if engine == "torch":
        looks = looks_on_torch(name)
    else:
        setting: plan.Setting = getattr(plan, f"on_{engine}")(name)
        looks = {size: Look(setting.window(size), 1.0) for size in SIZES}
    for look in looks.values():
        look.run()
    record: dict[int, list[float]] = {size: [] for size in SIZES}
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        for size, look in looks.items():
            start = time.perf_counter()
            look.run()
            record[size].append((time.perf_counter() - start) / look.part)
    return scores(record, {size: look.part for size, look in looks.items()})


def scores(record: dict[int, list[float]], parts: dict[int, float]) -> dict[str, Any]:
    """What the choices of each way come to.

    Returns:
        turns: in the record; spread: standard deviation of a time, as a share of it; record and
        parts as given; and for each way reached: the share of its choices with 95 % of the best
        throughput, mean and least: of those throughputs, as shares of the best; seconds: of looks.
    """
    true = {size: fmean(times) for size, times in record.items()}
    best = min(true.values())
    turns = len(record[SIZES[0]])
    ways: dict[str, Any] = {}
    for way, choose in WAYS.items():
        shares, spent = [], []
        for start in range(0, turns, max(1, turns // STARTS)):
            moments = Moments(record, parts, start)
            shares.append(best / true[choose(moments)])
            spent.append(moments.spent)
        ways[way] = {
            "reached": fmean(share >= plan.THROUGHPUT for share in shares),
            "mean": fmean(shares),
            "least": min(shares),
            "seconds": fmean(spent),
        }
    spread = fmean(stdev(times) / fmean(times) for times in record.values())
    return {"turns": turns, "spread": spread, "ways": ways, "record": record, "parts": parts}


def main() -> None:
    engines = [engine for engine in plan.ENGINES if engine != "keras"]
    parser = parser_of(__doc__, seconds=90.0, engines=engines, models=MODELS)
    arguments = parser.parse_args()
    if arguments.one:
        tell(measured(*arguments.one, arguments.seconds))
        return
    print(f"choices with {plan.THROUGHPUT:.0%} of the best throughput, mean throughput, seconds")
    print(f"{'':32}{'spread':>7}  " + "".join(f"{way:>24}" for way in WAYS))
    results: dict[str, Any] = {}
    for engine in arguments.engines:
        for name in arguments.models:
            found = apart(engine, name, seconds=arguments.seconds + 300, **plan.COUNTED)
            results[f"{engine} {name}"] = found
            cells = [
                f"{way['reached']:.0%} {way['mean']:.2f} {way['seconds']:.1f} s"
                for way in found["ways"].values()
            ]
            line = "".join(f"{cell:>24}" for cell in cells)
            print(f"{engine + ' ' + name:32}{found['spread']:7.1%}  {line}", flush=True)
    save(arguments.json, results)


if __name__ == "__main__":
    main()
