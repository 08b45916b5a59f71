"""What the JAX engine costs beside a scan written by hand, and beside optax's accumulation.

One update of Adam on 8 micro-batches of 32, in interleaved rounds in one process: our call;
`lax.scan` written by hand; `optax.MultiSteps`, called once per micro-batch as its users do;
`optax.microbatching`; and the whole batch. All are jitted, with parameters and optimizer state
donated. Then the temporary memory that XLA plans for 4 and for 64 micro-batches.

Usage: python benchmarks/jax_loop.py [--models MLP CNN] [--rounds 200] [--json FILE]
"""

from dataclasses import asdict

import jax
from command import parser_of, save
from updates import measured

from virtualbatch.bench.case import Case
from virtualbatch.bench.contender import FLOOR
from virtualbatch.bench.jax_models import problem
from virtualbatch.bench.jax_ways import entries, ours

# In the CNN XLA on CPU is slow where convolutions are in a loop.
MODELS = ("MLP", "transformer", "CNN")


def temporary_memory(name: str) -> dict[str, int]:
    """Bytes that XLA plans beside arguments and results, by the number of micro-batches."""
    result = {}
    for steps in (4, 64):
        case = Case("jax", name, accumulation_steps=steps)
        given = problem(case)
        whole = jax.value_and_grad(given.loss)
        for label, gradients in (
            ("virtualbatch", ours(given, case.microbatch_size)),
            ("whole batch", whole),
        ):
            compiled = jax.jit(gradients).lower(given.params, given.batch).compile()
            result[f"{label}, {steps}"] = compiled.memory_analysis().temp_size_in_bytes
    return result


def main() -> None:
    arguments = parser_of(__doc__, models=MODELS, rounds=200).parse_args()
    result = {}
    for name in arguments.models:
        case = Case("jax", name)
        contenders = [way for way in entries(case) if getattr(way, "role", None) != FLOOR]
        rows = measured(contenders, arguments.rounds)
        memory = temporary_memory(name)
        result[name] = {"rows": [asdict(row) for row in rows], "temporary bytes": memory}
        print(f"\n{name}: {case.accumulation_steps} micro-batches of {case.microbatch_size}")
        for row in rows:
            ratio = row.times_ours[1]
            print(f"{row.name:25} {row.milliseconds[1]:8.2f} ms, {ratio:6.3f} of ours")
        for label, size in memory.items():
            print(f"temporary memory, {label:20} {size:12,} bytes")
    save(arguments.json, result)


if __name__ == "__main__":
    main()
