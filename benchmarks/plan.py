"""How well a plan predicts memory, and whether the size that it chooses is fast.

Ten models for each engine, each in a process of its own. Two plans are made, one without a limit
and one in which 60 % of the batch's activations fit. The peaks that they state for the sizes that
they choose are compared with those of the user's own windows; and every larger peak that they met
with what the search predicts from 8 and 32 rows alone. Then all sizes are timed, in turns, and the
chosen one is compared with the fastest.

Usage: python benchmarks/plan.py [--engines torch jax] [--models MLP CNN] [--json FILE]
"""

import math
import os
import time
from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any, NamedTuple

from command import apart, parser_of, save
from plan_models import MODELS, ROWS, data, in_keras, in_torch

from virtualbatch.bench.children import tell
from virtualbatch.plan.search import Question, Search

ENGINES = ["jax", "torch", "tensorflow", "keras"]
# What the project promises: largest error of a predicted peak, and least share of the throughput.
ERRORS = {"jax": 0.03, "torch": 0.10, "tensorflow": 0.15, "keras": 0.15}
THROUGHPUT = 0.95
LIMIT = 0.6
# Turns of timing at least, and seconds at least and at most. It ends between them once the share of
# the best throughput is known to this standard error; times of one size move by more than 10 %.
TURNS = 5
SECONDS = (8.0, 90.0)
ERROR = 0.01
# Times up to 24 windows on TensorFlow, of which the largest peak counts, as in a plan. It moves
# from one to the next, because operations that do not wait for each other change their order.
LOOKS = 8
# The environment of TensorFlow's allocator that counts, as `virtualbatch plan` chooses it.
COUNTED = {"TF_CPU_ALLOCATOR_USE_BFC": "true"}


class Setting(NamedTuple):
    """One model on one engine.

    Fields:
        plan: memory limit -> plan.
        window: size -> function that runs a whole batch and waits for it.
        peak: (size, its window) -> its peak as the user's window has it; None if nothing tells.
    """

    plan: Callable[[int | None], Any]
    window: Callable[[int], Callable[[], Any]]
    peak: Callable[[int, Callable[[], Any]], int] | None


def on_jax(name: str, rows: int = ROWS) -> Setting:
    os.environ["KERAS_BACKEND"] = "jax"
    import jax
    import jax.numpy as jnp

    import virtualbatch.jax as vb

    model = in_keras(name)
    fixed = [variable.value for variable in model.non_trainable_variables]
    params = [variable.value for variable in model.trainable_variables]

    def loss(params: Any, batch: Any) -> Any:
        x, y = batch
        logits, _ = model.stateless_call(params, fixed, x, training=True)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

    batch = jax.tree.map(jnp.asarray, data(name, rows))

    compiled: dict[int, Any] = {}

    def window(size: int) -> Callable[[], Any]:
        run = jax.jit(vb.value_and_grad(loss, microbatch_size=size))
        compiled[size] = run.lower(params, batch).compile()
        return lambda: jax.block_until_ready(compiled[size](params, batch))

    def peak(size: int, run: Callable[[], Any]) -> int:
        found = compiled[size].memory_analysis()
        return int(
            found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
        )

    return Setting(lambda limit: vb.plan(loss, memory_limit=limit)(params, batch), window, peak)


def on_torch(name: str) -> Setting:
    import torch

    import virtualbatch.torch as vb
    from virtualbatch.torch._plan.peak import peak_bytes

    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    module, loss_fn = in_torch(name)
    module.to(device)
    batch = [torch.as_tensor(array, device=device) for array in data(name)]

    def window(size: int) -> Callable[[], Any]:
        def run() -> None:
            module.zero_grad()
            vb.backward(loss_fn, batch, module=module, microbatch_size=size)
            if on_gpu:
                torch.cuda.synchronize()

        return run

    if on_gpu:
        # Kernels take their workspaces once in a process: before, so that they are in no peak.
        window(ROWS)()
        module.zero_grad()

    def peak(size: int, run: Callable[[], Any]) -> int:
        # Of real tensors, where the plan had fake ones.
        module.zero_grad()
        held = sum(t.nbytes for t in [*module.parameters(), *module.buffers(), *batch])
        if not on_gpu:
            return held + peak_bytes(run)
        others = torch.cuda.memory_allocated() - held
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - others

    return Setting(
        lambda limit: vb.plan(loss_fn, batch, module=module, memory_limit=limit), window, peak
    )


def on_tensorflow(name: str, rows: int = ROWS) -> Setting:
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import keras
    import tensorflow as tf

    import virtualbatch.tensorflow as vb
    from virtualbatch.tensorflow._plan.peak import PeakMemory
    from virtualbatch.tensorflow._plan.plan import held_bytes

    model = in_keras(name)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    batch = tuple(tf.constant(array) for array in data(name, rows))

    def loss_fn(batch: Any) -> Any:
        return loss_of(batch[1], model(batch[0], training=True))

    def window(size: int) -> Callable[[], Any]:
        def run(batch: Any) -> Any:
            return vb.value_and_gradients(
                loss_fn, batch, model.trainable_variables, microbatch_size=size
            )

        compiled = tf.function(run)
        return lambda: compiled(batch)[0].numpy()

    def peak(size: int, run: Callable[[], Any]) -> int:
        variables = [variable.value for variable in model.trainable_variables]
        looks = PeakMemory()
        return held_bytes(variables, batch) + max(looks.of(run) for _ in range(LOOKS))

    return Setting(
        lambda limit: vb.plan(loss_fn, batch, model.trainable_variables, memory_limit=limit),
        window,
        peak,
    )


def on_keras(name: str, rows: int = ROWS) -> Setting:
    import keras

    import virtualbatch.keras as vb

    def compiled() -> Any:
        model = in_keras(name)
        model.compile(
            optimizer="adam", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        )
        return model

    model = compiled()
    # Tensors already, so that a window holds no copy of the batch.
    batch = tuple(keras.ops.convert_to_tensor(array) for array in data(name, rows))

    def window(size: int) -> Callable[[], Any]:
        model = compiled()
        vb.accumulate(model, microbatch_size=size)
        return lambda: model.train_on_batch(*batch)

    def peak(size: int, run: Callable[[], Any]) -> int:
        from virtualbatch.tensorflow._plan.peak import PeakMemory

        variables = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
        held = {id(variable): variable.value for variable in variables}.values()
        bytes_held = sum(math.prod(x.shape) * x.dtype.size for x in [*held, *batch])
        looks = PeakMemory()
        return bytes_held + max(looks.of(run) for _ in range(LOOKS))

    on_tensorflow = keras.backend.backend() == "tensorflow"
    return Setting(
        lambda limit: vb.plan(model, batch, memory_limit=limit),
        window,
        peak if on_tensorflow else None,
    )


def measured(engine: str, name: str) -> dict[str, Any]:
    """Plans one model and checks what the plan says."""
    begin = time.perf_counter()
    setting: Setting = globals()[f"on_{engine}"](name)
    found = setting.plan(None)
    spent = time.perf_counter() - begin
    small, whole = found.rows[0].peak_bytes, found.rows[-1].peak_bytes
    limit = int(max(small, small + LIMIT * (whole - small)))
    try:
        plans = [found, setting.plan(limit)]
    except ValueError:
        # Where sizes make no difference to a peak, its noise decides.
        plans = [found]
    sizes = [size for size in (4, 8, 16, 32, 64, 128, 256) if size <= ROWS]
    sizes = sorted({*sizes, *(plan.microbatch_size for plan in plans)})
    programs = {size: setting.window(size) for size in sizes}
    for run in programs.values():
        run()
    peaks = stated_peaks(setting, plans, programs)
    chosen = found.microbatch_size
    times = timed(programs, chosen)
    shares = {size: ratio(times, size, chosen) for size in programs}
    fastest = min(shares, key=lambda size: shares[size][0])
    return {
        "chosen": chosen,
        "fastest": fastest,
        "throughput": shares[fastest][0],
        "throughput_error": shares[fastest][1],
        "against_uncut": shares[ROWS][0],
        "against_uncut_error": shares[ROWS][1],
        "stated_peaks": peaks,
        "error": max((abs(stated / true - 1) for _, stated, true in peaks), default=None),
        "line_error": line_error(plans),
        "times": times,
        "limit": limit,
        "limited": [[r.microbatch_size, r.peak_bytes, r.measured] for r in plans[-1].rows],
        "seconds_to_plan": spent,
        "rows": [[row.microbatch_size, row.peak_bytes, row.measured] for row in found.rows],
    }


def timed(programs: dict[int, Callable[[], Any]], chosen: int) -> dict[int, list[float]]:
    """Times of all sizes in turns, until it is known what the chosen one has of the best.

    Returns:
        size -> its seconds, of each turn; fewer turns for sizes that were surely slower.
    """
    times: dict[int, list[float]] = {size: [] for size in programs}
    running, begin = list(programs), time.perf_counter()
    while True:
        for size in running:
            start = time.perf_counter()
            programs[size]()
            times[size].append(time.perf_counter() - start)
        spent = time.perf_counter() - begin
        if len(times[chosen]) < TURNS:
            continue
        shares = {size: ratio(times, size, chosen) for size in running}
        known = max(error for _, error in shares.values()) <= ERROR
        if spent > SECONDS[1] or (known and spent > SECONDS[0]):
            return times
        running = [
            size
            for size, (share, error) in shares.items()
            # Slower than the fastest by more than chance; the whole batch is compared by itself.
            if size in (chosen, ROWS) or share - 3 * error < min(s for s, _ in shares.values())
        ]


def ratio(times: dict[int, list[float]], size: int, chosen: int) -> tuple[float, float]:
    """(time of a size / that of the chosen one, standard error), of the turns that both ran in.

    What else the machine did slowed all that ran in a turn, so turns are compared one by one.
    """
    both = list(zip(times[size], times[chosen], strict=False))
    share = fmean(a for a, _ in both) / fmean(b for _, b in both)
    left_over = [a - share * b for a, b in both]
    return share, stdev(left_over) / fmean(b for _, b in both) / math.sqrt(len(both))


def stated_peaks(
    setting: Setting, plans: list[Any], programs: dict[int, Any]
) -> list[tuple[int, int, int]]:
    """(size that a plan chooses, peak that it states, peak of the user's window); [] if unknown."""
    if setting.peak is None:
        return []
    found = []
    for plan in plans:
        size = plan.microbatch_size
        stated = next(row.peak_bytes for row in plan.rows if row.microbatch_size == size)
        found.append((size, stated, setting.peak(size, programs[size])))
    return found


def line_error(plans: list[Any]) -> float | None:
    """The largest error of what the search predicts once it was told the peaks of 8 and 32 rows.

    The whole batch does not count: uncut, no sum of gradients stands beside those of a part.

    Returns:
        A share of the measured peak; None where no larger size was measured.
    """
    known = {r.microbatch_size: r.peak_bytes for plan in plans for r in plan.rows if r.measured}
    if not {8, 32} <= set(known):
        return None
    search = Search(ROWS, memory_limit=2**60)
    for size in (8, 32):
        search.tell(Question("memory", size), known[size])
    errors = [
        abs(search.predicted(size) / peak - 1) for size, peak in known.items() if 32 < size < ROWS
    ]
    return max(errors, default=None)


def main() -> None:
    arguments = parser_of(__doc__, engines=ENGINES, models=MODELS).parse_args()
    if arguments.one:
        tell(measured(*arguments.one))
        return
    results: dict[str, dict[str, Any]] = {}
    for engine in arguments.engines:
        print(f"\n{engine}: peaks within {ERRORS[engine]:.0%}, {THROUGHPUT:.0%} of the fastest")
        print(
            f"{'':20}{'chosen':>8}{'fastest':>8}{'speed':>15}{'/ uncut':>14}{'peak off':>9}"
            f"{'line off':>9}{'s':>7}"
        )
        for name in arguments.models:
            found = apart(engine, name, seconds=900, **COUNTED)
            results.setdefault(engine, {})[name] = found
            off, line = (
                "" if found[key] is None else f"{found[key]:.1%}" for key in ("error", "line_error")
            )
            print(
                f"{name:20}{found['chosen']:8}{found['fastest']:8}"
                f"{found['throughput']:8.3f} ±{found['throughput_error']:.3f}"
                f"{found['against_uncut']:8.2f} ±{found['against_uncut_error']:.2f}"
                f"{off:>9}{line:>9}{found['seconds_to_plan']:7.1f}",
                flush=True,
            )
    save(arguments.json, results)


if __name__ == "__main__":
    main()
