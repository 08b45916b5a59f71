"""The project's goals for speed: the least ratio of a peer's time to ours."""

from virtualbatch.bench.contender import FLOOR

# (engine, beginning of the peer's name): (goal for the MLP, which is bound by overhead; goal for
# models that are bound by arithmetic).
_OF_PEERS = {
    ("keras-tensorflow", "gradient_accumulation_steps, jit"): (2.5, 1.4),
    ("keras-tensorflow", "gradient_accumulation_steps, steps"): (1.5, 1.1),
    ("keras-jax", "gradient_accumulation_steps"): (2.3, 1.2),
    ("tensorflow", "eager loop"): (20.0, 5.0),
    ("jax", "optax.MultiSteps"): (2.2, 1.15),
    ("jax", "optax.microbatching"): (1.0, 1.0),
    ("torch", "Accelerate"): (1.25, 1.0),
    ("torch", "Hugging Face Trainer"): (1.5, 1.0),
    ("torch", "Lightning"): (1.6, 1.0),
}
# The least ratio of the floor's time to ours.
_OF_FLOORS = (1 / 1.15, 1 / 1.03)
_OVERHEAD, _ARITHMETIC = ("MLP",), ("CNN", "transformer")


def asked(engine: str, model: str, name: str, role: str) -> float | None:
    """The goal for the ratio of a contender's time to ours; None if there is none."""
    if model not in _OVERHEAD + _ARITHMETIC:
        return None
    column = _ARITHMETIC.count(model)
    if role == FLOOR:
        return _OF_FLOORS[column]
    for (of_engine, beginning), least in _OF_PEERS.items():
        if of_engine == engine and name.startswith(beginning):
            return least[column]
    return None
