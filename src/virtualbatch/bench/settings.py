"""The settings of `virtualbatch bench`."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from virtualbatch.bench.case import ENGINES, MODELS
from virtualbatch.bench.contender import ALL_PEERS, LIST_PEERS, NO_PEERS
from virtualbatch.bench.peers import pip_install

# One model that is bound by overhead, and one with a loss that peers get wrong.
_QUICK_MODELS = ("MLP", "tokens")


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Args:
        engines: some of `ENGINES`; empty for all that are installed.
        models: some of `MODELS`; empty for all, or with `quick` for MLP and tokens.
        peers: `ALL_PEERS` or `NO_PEERS`; with `LIST_PEERS` nothing is measured.
        quick: whether there are fewer rounds.
        sweeps: whether sweeps are measured too.

    Raises:
        ValueError: a name is unknown, a named engine is not installed, or no engine is installed.
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
        """The engines to measure."""
        return list(self.engines) or [engine for engine in ENGINES if not missing(engine)]

    @property
    def absent_engines(self) -> list[str]:
        """The engines that are left out because a package is not installed."""
        return [engine for engine in ENGINES if not self.engines and missing(engine)]

    @property
    def chosen_models(self) -> Sequence[str]:
        """The models to measure."""
        return self.models or (_QUICK_MODELS if self.quick else MODELS)

    @property
    def rounds(self) -> int:
        """The number of rounds."""
        return 5 if self.quick else 9

    @property
    def sweep_rounds(self) -> int:
        """The number of rounds at each point of a sweep."""
        return 5

    @property
    def seconds_per_round(self) -> float:
        """The approximate time that a contender trains in a round."""
        return 0.05 if self.quick else 0.25


def _needed(engine: str) -> list[str]:
    # JAX takes Adam from optax; TensorFlow takes models and optimizers from Keras.
    more = {"torch": [], "jax": ["optax"]}.get(engine, ["keras"])
    return [engine.removeprefix("keras-"), *more]


def missing(engine: str) -> list[str]:
    """The packages of an engine that are not installed."""
    return [package for package in _needed(engine) if importlib.util.find_spec(package) is None]
