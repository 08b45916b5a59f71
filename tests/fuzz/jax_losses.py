"""Loss functions that only JAX's user can write. Frames of this file are the user's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tests.fuzz.call import Call

import virtualbatch.jax as vb


def _scalar(result: Any) -> Any:
    """The loss without aux, of terms their sum."""
    result = result[0] if type(result) is tuple else result
    return sum(result.values()) if isinstance(result, dict) else result


def _window(call: Call, before: Any, params: Any, batch: Any) -> Any:
    run = vb.value_and_grad(lambda p, b: _scalar(before(p, b)), microbatch_size=1)
    return run(params, batch)[0]


def _branches(call: Call, before: Any, params: Any, batch: Any) -> Any:
    result = _scalar(before(params, batch))
    return result if result > 0 else -result


# name -> (call, the loss function before, parameters, micro-batch) -> what it returns instead.
LOSSES: dict[str, Any] = {
    "a window in the window": _window,
    "branches on values": _branches,
    "a float": lambda call, before, p, b: float(_scalar(before(p, b))),
    "on the host": lambda call, before, p, b: np.asarray(_scalar(before(p, b))),
    "stopped": lambda call, before, p, b: jax.lax.stop_gradient(_scalar(before(p, b))),
    "a key": lambda call, before, p, b: jax.random.key(0),
    "bfloat16": lambda call, before, p, b: _scalar(before(p, b)).astype(jnp.bfloat16),
    "a compiled function": lambda call, before, p, b: jax.jit(before)(p, b),
}
