"""Sweeps: time and memory for other cuts of the batch and other widths of the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from virtualbatch.bench.case import Case

ROWS = 256
# (rows of a micro-batch, micro-batches, scale of the model).
_Cut = tuple[int, int, int]
# The peer that is measured in sweeps.
_PEERS = {
    "torch": "Accelerate",
    "jax": "optax.MultiSteps, donated",
    "tensorflow": "compiled step, added in Python",
    "keras-tensorflow": "gradient_accumulation_steps, jit_compile=False",
    "keras-jax": "gradient_accumulation_steps",
    "keras-torch": "gradient_accumulation_steps",
}


@dataclass(frozen=True)
class Sweep:
    """One sweep.

    Args:
        label: the quantity that changes.
        cuts: model -> the points that are timed, as (rows of a micro-batch, micro-batches, scale of
            the model).
        memory_cuts: the points at which memory is measured, each in its own process.
    """

    label: str
    cuts: Mapping[str, Sequence[_Cut]]
    memory_cuts: Sequence[_Cut]

    def cases(self, engine: str, model: str) -> list[Case]:
        """The points of an engine and a model."""
        return [Case(engine, model, *cut) for cut in self.cuts[model]]

    def peak_cases(self, engine: str) -> list[Case]:
        """The points at which memory is measured, on a model with large activations."""
        return [Case(engine, "transformer", *cut) for cut in self.memory_cuts]


SWEEPS = {
    "accumulation_steps": Sweep(
        "micro-batches of 32 rows",
        {
            "MLP": [(32, steps, 1) for steps in (1, 2, 4, 8, 16, 32, 64)],
            "transformer": [(32, steps, 1) for steps in (1, 4, 16, 64)],
        },
        [(32, steps, 1) for steps in (2, 8, 32)],
    ),
    "microbatch_size": Sweep(
        f"rows of a micro-batch, of a batch of {ROWS}",
        {
            "MLP": [(size, ROWS // size, 1) for size in (1, 4, 16, 64, 256)],
            "transformer": [(size, ROWS // size, 1) for size in (1, 4, 16, 64, 256)],
        },
        [(size, ROWS // size, 1) for size in (8, 64, 256)],
    ),
    "scale": Sweep(
        "width of the model, times the usual one",
        {
            "MLP": [(32, 8, scale) for scale in (1, 2, 4, 8)],
            "transformer": [(32, 8, scale) for scale in (1, 2, 4)],
        },
        (),
    ),
}


def peer_along(engine: str) -> str:
    """The peer that takes part in sweeps."""
    return _PEERS[engine]
