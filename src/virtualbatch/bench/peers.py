"""The peers of each engine and the packages that they need. No package is imported."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from virtualbatch.bench.case import MODELS, Case

# A contrastive loss compares rows, so a mean over micro-batches is another loss.
_PAIRS = ("pairs",)
_OF_ROWS = tuple(model for model in MODELS if model not in _PAIRS)
_COMPILED = ("CNN", "transformer")

_BUILT_IN = "gradient_accumulation_steps"
_IN_ONE_CALL = f"steps_per_execution={Case.accumulation_steps}"


@dataclass(frozen=True)
class Peer:
    """One alternative to virtualbatch.

    Args:
        name: the name of the alternative.
        package: the package that pip installs for it.
        models: the models that it can train.
    """

    name: str
    package: str
    models: Sequence[str] = MODELS


_PEERS = {
    "torch": (
        Peer("hand-written loop", "torch", _OF_ROWS),
        Peer("hand-written loop, torch.compile", "torch", _COMPILED),
        Peer("cached gradients by hand", "torch", _PAIRS),
        Peer("mean of micro-batches", "torch", _PAIRS),
        Peer("Accelerate", "accelerate"),
        Peer("Lightning", "lightning", _OF_ROWS),
        Peer("Hugging Face Trainer", "transformers", _OF_ROWS),
        Peer("CachedMultipleNegativesRankingLoss", "sentence-transformers", _PAIRS),
    ),
    "jax": (
        Peer("hand-written scan", "jax", _OF_ROWS),
        Peer("mean of micro-batches in a scan", "jax", _PAIRS),
        Peer("optax.MultiSteps, donated", "optax"),
        Peer("optax.microbatching", "optax>=0.2.8", _OF_ROWS),
    ),
    "tensorflow": (
        Peer("eager loop", "tensorflow"),
        Peer("compiled step, added in Python", "tensorflow"),
    ),
    "keras-tensorflow": tuple(
        Peer(", ".join(words), "keras")
        for jit in (True, False)
        for words in (
            (_BUILT_IN, f"jit_compile={jit}"),
            (_BUILT_IN, _IN_ONE_CALL, f"jit_compile={jit}"),
        )
    ),
    "keras-jax": (Peer(_BUILT_IN, "keras"), Peer(f"{_BUILT_IN}, {_IN_ONE_CALL}", "keras")),
    "keras-torch": (Peer(_BUILT_IN, "keras"),),
}


def peers_of(engine: str, models: Sequence[str] = MODELS) -> list[Peer]:
    """The peers of an engine that can train at least one of these models."""
    return [peer for peer in _PEERS[engine] if set(peer.models) & set(models)]


def pip_install(*packages: str) -> str:
    """The command that installs packages. Their names may have version bounds."""
    # A shell would read the > of a bound as a redirection.
    words = (found if re.fullmatch(r"[\w-]+", found) else f'"{found}"' for found in packages)
    return f"pip install {' '.join(words)}"
