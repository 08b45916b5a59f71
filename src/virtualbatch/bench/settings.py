"""What `virtualbatch bench` was asked to measure."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from virtualbatch.bench.case import ENGINES, MODELS
from virtualbatch.bench.contender import ALL_PEERS, LIST_PEERS, NO_PEERS
from virtualbatch.bench.peers import pip_install

# One that is bound by overhead and one with a loss that peers get wrong.
_QUICK_MODELS = ("MLP", "tokens")


@dataclass(frozen=True)
class Settings:
    """What was asked.

    Args:
        engines: of `ENGINES`; none for all that are installed.
        models: of `MODELS`; none for all, or with `quick` for the two that are fast.
        peers: `ALL_PEERS` or `NO_PEERS`; with `LIST_PEERS` nothing is measured.
        quick: fewer rounds.
        sweeps: whether time and memory along the size of the cut are measured too.

    Raises:
        ValueError: a name is unknown, an engine that was named is not installed, or none is.
    """

    engines: Sequence[str] = ()
    models: Sequence[str] = ()
    peers: str = ALL_PEERS
    quick: bool = False
    sweeps: bool = False

    def __post_init__(self) -> None:
        for option, given, known in (
            ("--engine", self.engines, ENGINES),
            ("--model", self.models, MODELS),
            ("--peers", [self.peers], (ALL_PEERS, NO_PEERS, LIST_PEERS)),
        ):
            for name in given:
                if name not in known:
                    raise ValueError(
                        f"{option} must be one of {', '.join(known)}. Got {option} {name}. "
                        f"Pass {option} {known[0]}."
                    )
        for engine in self.engines:
            if absent := missing(engine):
                raise ValueError(
                    f"--engine {engine} needs {', '.join(_needed(engine))}. "
                    f"Got no {', '.join(absent)}. Run: {pip_install(*absent)}"
                )
        if not self.chosen_engines:
            raise ValueError(
                "bench needs a framework. Got none. "
                'Run: pip install "virtualbatch[torch,bench]", or another engine.'
            )

    @property
    def chosen_engines(self) -> list[str]:
        """Those to measure."""
        return list(self.engines) or [engine for engine in ENGINES if not missing(engine)]

    @property
    def absent_engines(self) -> list[str]:
        """Those that are left out because something is not installed."""
        return [engine for engine in ENGINES if not self.engines and missing(engine)]

    @property
    def chosen_models(self) -> Sequence[str]:
        """Those to measure."""
        return self.models or (_QUICK_MODELS if self.quick else MODELS)

    @property
    def rounds(self) -> int:
        """In how many each contender is timed."""
        return 5 if self.quick else 9

    @property
    def sweep_rounds(self) -> int:
        """The same at each point along a line."""
        return 5

    @property
    def seconds_per_round(self) -> float:
        """How long a contender trains in a round, about."""
        return 0.05 if self.quick else 0.25


def _needed(engine: str) -> list[str]:
    # Adam comes from optax in JAX, models and optimizers from Keras in TensorFlow.
    more = {"torch": [], "jax": ["optax"]}.get(engine, ["keras"])
    return [engine.removeprefix("keras-"), *more]


def missing(engine: str) -> list[str]:
    """The packages of an engine that are not installed."""
    return [package for package in _needed(engine) if importlib.util.find_spec(package) is None]
